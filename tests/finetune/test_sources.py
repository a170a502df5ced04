"""The commands read images from every kind of source by the same rules, with the same options of reading."""

import io
import json

import numpy as np
import pytest
import tifffile
import torch

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from finetune import curate, embed, export, probe
from finetune.feature_file import read_features
from models.fcmae import FCMAE, flat_config, from_flat
from models.weights import Weights, cpu_state, save, split_by_prefix
from pretrain import reconstruct
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip, collection
from tests.data.test_catalog import as_table
from tests.data.test_layouts import sizes
from tests.data.test_prepare import prepared
from tests.finetune.test_evaluate import call

IMAGES = collection({"train/cat": 8, "train/dog": 7, "val/cat": 2, "val/dog": 2})


def deep(seed: int) -> bytes:
    """A TIFF of three channels of floating-point numbers."""
    out = io.BytesIO()
    pixels = 30_000 * np.random.default_rng(seed).random((24, 20, 3), np.float32)
    tifffile.imwrite(out, pixels, photometric="rgb")
    return out.getvalue()


FLOATS = {name.replace("jpg", "tif"): deep(i) for i, name in enumerate(IMAGES)}


def plainly(main, *words) -> None:
    """Call a command without --device."""
    main([*map(str, words)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of an autoencoder."""
    torch.manual_seed(0)
    given = from_flat({"decoder_dim": 16, "stem_stride": 1, "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)})
    model = FCMAE(*given)
    decoder, _ = split_by_prefix(cpu_state(model), ("proj.", "mask_token", "decoder.", "pred."))
    image, encoder = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3), cpu_state(model.encoder)
    path = tmp_path_factory.mktemp("weights") / "fcmae.pt"
    save(path, Weights(model.encoder.arch, image, encoder, decoder, flat_config(*given)))
    return path


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar, as_table])
def test_embed_curate_and_prepare(make, weights, tmp_path, capsys):
    source = make(IMAGES, tmp_path / "in")
    call(embed.main, weights, source, tmp_path / "x.parquet", "--workers", "0", "--split", "train", "val")
    listed = [tmp_path / "x.parquet", tmp_path / "l.csv", "--sheet", tmp_path / "sheet.png"]
    call(curate.main, *listed, "--subset", "6", "--clusters", "2")
    assert (tmp_path / "sheet.png").exists()
    names = [line.split(",")[0] for line in (tmp_path / "l.csv").read_text().splitlines()[1:]]
    assert len(names) == 6 and set(names) <= IMAGES.keys()
    prepared(source, tmp_path / "without", "--without", str(tmp_path / "l.csv"))
    prepared(source, tmp_path / "only", "--only", str(tmp_path / "l.csv"))
    assert sum(sizes(tmp_path / "without").values()) == 13 and sum(sizes(tmp_path / "only").values()) == 6


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar, as_table])
def test_probe_reconstruct_and_export(make, weights, tmp_path, capsys):
    source, more = make(FLOATS, tmp_path / "in"), ["--value-range", "0", "30000"]
    files = [tmp_path / name for name in ("x.json", "x.png", "x.pt")]
    with pytest.raises(UserError, match="--value-range"):  # what is white?
        plainly(reconstruct.main, source, "--weights", weights, "--out", files[1])
    call(probe.main, weights, source, "--out", files[0], "--k", "3", "--epochs", "1", "--workers", "0", *more)
    assert json.loads(files[0].read_text())["train_images"] == 15
    plainly(reconstruct.main, source, "--weights", weights, "--out", files[1], *more)
    assert has(capsys.readouterr().out, "4 images")
    plainly(
        reconstruct.main,
        source,
        "--weights",
        weights,
        "--out",
        files[1],
        "--split",
        "train",
        "--max-images",
        "5",
        *more,
    )
    assert has(capsys.readouterr().out, "5 images")
    plainly(export.main, weights, files[2], "--to", "torchscript", "--images", source, "--features", *more)
    assert files[2].exists()


def test_a_value_range_changes_the_features(weights, tmp_path):
    source, found = as_folder(FLOATS, tmp_path / "in"), []
    for name, high in (("a", "65535"), ("b", "30000")):
        out = tmp_path / f"{name}.parquet"
        call(embed.main, weights, source, out, "--workers", "0", "--value-range", "0", high)
        table = read_features(out)
        assert table.origin.reading.value_range == (0, float(high))
        found.append(table.x)
    assert not np.allclose(*found)
    query = source / "train/cat/0.tif"  # curate reads it as the others were read
    call(curate.main, tmp_path / "b.parquet", tmp_path / "l.csv", "--nearest", query, "--k", "1")
    name, score = (tmp_path / "l.csv").read_text().splitlines()[1].split(",")[:2]
    assert name == "train/cat/0.tif" and float(score) > 0.9999


def test_options_of_files_do_not_apply_to_shards(weights, tmp_path):
    prepared(as_folder(IMAGES, tmp_path / "in"), tmp_path / "shards")
    with pytest.raises(UserError, match=r"--no-exif applies to files, but .*shards"):
        call(probe.main, weights, tmp_path / "shards", "--no-exif")


def test_reconstruct_takes_shards(weights, tmp_path, capsys):
    prepared(as_folder(IMAGES, tmp_path / "in"), tmp_path / "shards")
    plainly(reconstruct.main, tmp_path / "shards", "--weights", weights, "--out", tmp_path / "x.png")
    assert has(capsys.readouterr().out, "4 images")
