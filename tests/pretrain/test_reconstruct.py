"""`pretrain/reconstruct.py`: picture, options, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from data.sheets import read_sheet
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, flat_config, from_flat
from models.opening import open_weights
from models.weights import Weights, cpu_state, save, split_by_prefix
from pretrain.pictures import COLUMNS
from pretrain.reconstruct import main
from tests.conftest import has, run
from tests.data.helpers import picture

SHAPE = {"stem_stride": 1, "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
IMAGE = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def weights(tmp_path):
    given = from_flat({"decoder_dim": 16, **SHAPE})
    decoder, _ = split_by_prefix(cpu_state(FCMAE(*given)), ("proj.", "mask_token", "decoder.", "pred."))
    model = FCMAE(*given)
    content = Weights(model.encoder.arch, IMAGE, cpu_state(model.encoder), decoder, flat_config(*given))
    save(tmp_path / "fcmae.pt", content)
    return tmp_path / "fcmae.pt"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / f"photos/{i}.png").write_bytes(picture(i, (40, 30), kind="png"))
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "photos/3.tiff")
    return tmp_path / "photos"


@pytest.fixture
def grid(monkeypatch, capsys):
    """Calls the command in this process; returns its output."""

    def call(*words) -> str:
        monkeypatch.setattr("sys.argv", ["reconstruct.py", *map(str, words)])
        main()
        return capsys.readouterr().out

    return call


def test_a_folder_is_shown(grid, weights, photos, tmp_path):
    output = grid(photos, "--weights", weights, "--out", tmp_path / "grid.png")
    assert has(output, "4 images 6 16 variance")
    sheet = read_sheet(tmp_path / "grid.png")
    assert [[cell.lines for cell in group.cells] for group in sheet.groups] == 4 * [list(COLUMNS)]
    assert {cell.picture.size for group in sheet.groups for cell in group.cells} == {(128, 128)}
    assert has(sheet.note, "hatched mean variance")


def test_options(grid, weights, photos, tmp_path):
    more = ["--max-images", "1", "--size", "[48,64]", "--ratio", "0.75"]
    output = grid(photos, "--weights", weights, "--out", tmp_path / "folder.png", *more)
    assert has(output, "1 12 48")
    for name, seed in (("file", 0), ("seed", 1)):
        grid(photos / "0.png", "--weights", weights, "--out", tmp_path / f"{name}.png", *more, "--seed", seed)
    bytes_of = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("folder", "file", "seed")}
    assert bytes_of["file"] == bytes_of["folder"] != bytes_of["seed"]


def test_models_of_pixels_have_no_remark_on_statistics(grid, weights, photos, tmp_path):
    content = open_weights(weights).weights
    content.decoder_config["norm_pix"] = False
    save(weights, content)
    assert "variance" not in grid(photos, "--weights", weights, "--out", tmp_path / "x.png")


def test_objectives_that_add_to_fcmae_have_its_decoder(grid, weights, photos, tmp_path):
    content = open_weights(weights).weights
    content.decoder |= {"projector.0.weight": torch.zeros(2, 16)}
    content.decoder_config |= {"sigreg_weight": 0.05}
    for objective in ("lejepa", "teacher"):
        content.objective = objective
        save(tmp_path / f"{objective}.pt", content)
    words = [photos / "0.png", "--out", tmp_path / "x.png", "--weights"]
    grid(*words, weights)
    expected = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").unlink()
    grid(*words, tmp_path / "lejepa.pt")
    assert (tmp_path / "x.png").read_bytes() == expected
    with pytest.raises(UserError, match=r"teacher\.pt has no decoder of pixels"):
        grid(*words, tmp_path / "teacher.pt")


def test_bad_input(grid, weights, photos, tmp_path):
    model = ConvNeXt(open_weights(weights).weights.arch)
    save(tmp_path / "encoder.pt", Weights(model.arch, IMAGE, cpu_state(model)))
    (photos / "broken.png").write_bytes(b"nonsense")
    out = ["--out", tmp_path / "x.png"]
    for words, message in [
        ([photos / "broken.png", "--weights", weights, *out], "broken.png"),
        ([tmp_path / "none.png", "--weights", weights, *out], "none.png exist"),
        ([photos / "0.png", "--weights", tmp_path / "encoder.pt", *out], "encoder.pt decoder"),
        ([photos / "0.png", "--weights", weights, "--size", "33", *out], "33 patch"),
        ([photos / "0.png", "--weights", weights, "--ratio", "1.5", *out], "--ratio 1.5"),
        ([photos / "0.png", "--weights", weights, "--out", tmp_path / "no/x.png"], "no folder"),
    ]:
        with pytest.raises(UserError) as error:
            grid(*words)
        assert has(error.value, message)
        assert not (tmp_path / "x.png").exists()


def test_an_unreadable_picture_is_named_and_the_others_are_drawn(grid, weights, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"nonsense")
    said = grid(photos, "--weights", weights, "--out", tmp_path / "x.png")
    assert "left out" in said and "broken.png" in said and (tmp_path / "x.png").exists()


def test_as_a_command(weights, tmp_path):
    done = run("python", "pretrain/reconstruct.py", "none.png", "--weights", weights, "--out", "x.png", code=2)
    assert done.stderr.startswith("error: none.png ") and len(done.stderr.splitlines()) == 1
