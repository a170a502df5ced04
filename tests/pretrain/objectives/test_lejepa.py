"""LeJEPA as an objective: settings, views in a batch, pictures, runs that resume or use several ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, FCMAEChoice, Optim, Pretrain
from data.transforms import sample_rng
from models.opening import Opened, open_encoder, open_weights
from models.weights import Weights, cpu_state
from pretrain.objectives import fcmae
from pretrain.objectives.lejepa import Objective, Settings
from tests.conftest import QUICK, TINY, has, losses, names, run, run_ranks
from tests.models.helpers import random_weights, tiny

LEJEPA = ["--objective.name", "lejepa", "--objective.width", "16", "--objective.dim", "8", "--data.repeats", "2"]
UNCOLOURED = {"color_jitter": 0.0, "hue": 0.0, "grayscale": 0.0}


def made(repeats: int = 2, channels: int = 3, **settings) -> Objective:
    model, _ = tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), channels=channels)
    settings = Settings(name="lejepa", **{"width": 16, "dim": 8, "decoder_dim": 8} | settings)
    data = Data(size=(16, 24), repeats=repeats)
    return Objective(Pretrain(data=data, model=model, objective=settings, optim=Optim(batch_size=6)))


def test_settings_that_do_not_fit():
    with pytest.raises(UserError) as error:
        made(repeats=1)
    assert has(error.value, "data.repeats 2")
    with pytest.raises(UserError) as error:
        made(channels=4)
    assert has(error.value, "objective.color_jitter 3 channels 4 0")
    made(channels=4, **UNCOLOURED)
    with pytest.raises(UserError) as error:
        made(repeats=3).check_batch(8)
    assert has(error.value, "optim.micro_batch 8 data.repeats 3")


def test_views_differ_in_colour_place_and_mask_and_repeat():
    objective = made(grayscale=0.5)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))
    views = [objective.transform()(image, -1, sample_rng(0, 0, 0, view)) for view in range(20)]
    again = objective.transform()(image, -1, sample_rng(0, 0, 0, 3))
    for key in ("image", "visible"):
        assert torch.equal(views[3][key], again[key]) and any(not torch.equal(x[key], again[key]) for x in views)
    grey = [bool((view["image"] == view["image"][:1]).all()) for view in views]
    assert 0 < sum(grey) < 20
    plain = made(**UNCOLOURED).transform()(image, -1, sample_rng(0, 0, 0, 3))
    assert torch.equal(plain["visible"], again["visible"]) and not torch.equal(plain["image"], again["image"])


def test_directions_depend_on_the_samples_only():
    objective, image, entries = made(), torch.zeros(4, 3, 16, 24), made().example(4)
    samples = ([1, 1, 2, 2], [1, 1, 2, 3])
    first, second = (objective.inputs(image, entries | {"sample": torch.tensor(s)})[2] for s in samples)
    assert first.shape == (8, 256) and not torch.equal(first, second)
    assert torch.equal(first, objective.inputs(image, entries | {"sample": torch.tensor([1, 1, 2, 2])})[2])


def test_init_keeps_decoder_and_projector_of_the_same_shape(capsys):
    """From a file of LeJEPA all, of FCMAE all but the projector, from a decoder of another shape the encoder."""

    def loaded(source_of, name, **settings) -> set[str]:
        source, model = source_of.build(), made(**settings).build()
        random_weights(source)
        parts = source_of.decoder(source)
        weights = Weights(source.encoder.arch, None, cpu_state(source.encoder), *parts, objective=name)
        made(**settings).load(model, Opened("x.pt", weights))
        theirs = source.state_dict()
        return {
            key.partition(".")[0] for key, x in model.state_dict().items() if torch.equal(x, theirs.get(key, x + 1))
        }

    decoder = {"proj", "mask_token", "decoder", "pred"}
    assert loaded(made(), "lejepa") == {"encoder", "projector", *decoder}
    config = replace(made().config, objective=FCMAEChoice("fcmae", mask_ratio=0.5, decoder_dim=8))
    assert loaded(fcmae.Objective(config), None) == loaded(fcmae.Objective(config), "fcmae") == {"encoder", *decoder}
    assert "new one" not in capsys.readouterr().out
    assert loaded(made(), "lejepa", decoder_dim=16) == {"encoder"}
    assert "new one" in capsys.readouterr().out


def test_fcmae_continues_with_the_decoder(capsys):
    objective, source = made(), made().build()
    random_weights(source)
    parts = objective.decoder(source)
    weights = Weights(source.encoder.arch, None, cpu_state(source.encoder), *parts, objective="lejepa")
    config = replace(objective.config, objective=FCMAEChoice("fcmae", mask_ratio=0.5, decoder_dim=8))
    model = fcmae.Objective(config).build()
    fcmae.Objective(config).load(model, Opened("x.pt", weights))
    theirs = source.state_dict()
    assert all(torch.equal(x, theirs[key]) for key, x in model.state_dict().items())
    assert "new one" not in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("masks", [1, 2])
def test_picture(masks):
    objective = made(repeats=3, masks=masks)
    model = objective.build().eval()
    random_weights(model)
    inputs = objective.inputs(torch.randn(8, 3, 16, 24), objective.example(8))
    _, sheet = objective.picture(model, inputs, torch.zeros(3), torch.ones(3))
    assert objective.pictured == 24 and [len(group.cells) for group in sheet.groups] == [3, 3]  # the third is not whole
    assert all(group.cells[0].lines[0].startswith("1.00 (") for group in sheet.groups)


def words(digits, folder, name, *more):
    where = ["--data.path", digits, "--run.folder", folder, "--run.name", name, "--optim.epochs", "2"]
    colours = [word for key in UNCOLOURED for word in (f"--objective.{key}", "0")]
    return ["pretrain/main.py", *where, *TINY, *QUICK, *LEJEPA, *colours, *more]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lejepa")
    run("python", *words(digits, folder, "whole"))
    return folder / "whole"


def test_files_of_a_run(whole):
    assert {"fcmae.pt", "reconstruction.png", "report.html"} < names(whole)
    weights = open_weights(whole / "fcmae.pt").weights
    assert weights.objective == "lejepa" and weights.decoder_config["crops"] == 2
    assert open_encoder(whole / "fcmae.pt").model.arch.dims == (8, 16, 16, 16)
    assert '"sigreg"' in (whole / "log.jsonl").read_text()
    assert "SIGReg of embeddings" in (whole / "report.html").read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(whole, digits, tmp_path):
    run("python", *words(digits, tmp_path, "stopped", "--run.max_steps", "4"))
    run("python", *words(digits, tmp_path, "stopped", "--resume", "must"))
    assert losses(tmp_path / "stopped") == losses(whole)
    one, other = (open_weights(folder / "fcmae.pt").weights for folder in (whole, tmp_path / "stopped"))
    assert all(torch.equal(tensor, other.encoder[name]) for name, tensor in one.encoder.items())
    assert all(torch.equal(tensor, other.decoder[name]) for name, tensor in one.decoder.items())  # batch norm too


def test_two_ranks_have_all_crops_of_their_images(digits, tmp_path):
    """A rank's loss is that of its images; one that has half of the crops of an image is refused."""
    run_ranks(2, *words(digits, tmp_path, "two", "--run.max_steps", "3"))
    assert len(losses(tmp_path / "two")) == 3
    done = run("python", *words(digits, tmp_path, "odd", "--optim.micro_batch", "15"), code=2)
    assert has(done.stderr, "optim.micro_batch 15 data.repeats 2")
