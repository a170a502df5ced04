"""Latent targets as an objective: settings, monitor, pictures, and runs that resume or use several ranks."""

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, Optim, Pretrain
from data.transforms import sample_rng
from models.opening import Opened, open_encoder, open_weights
from models.weights import Weights, cpu_state
from pretrain.latent_pictures import COLUMNS
from pretrain.objectives import fcmae
from pretrain.objectives.latent import COLLAPSED, Objective, Settings
from pretrain.pretraining import Pretraining
from tests.conftest import QUICK, TINY, has, losses, names, run, run_ranks
from tests.models.helpers import random_weights, tiny
from tests.pretrain.objectives.helpers import scores, state

LATENT = ["--objective.name", "latent", "--objective.masks", "2", "--objective.pixel_weight", ".5"]
LATENT += ["--objective.ema", "[.8,.99]", "--objective.ema_steps", "10"]


def made(zero_stage: int = 1, **settings) -> Objective:
    model, _ = tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    settings = Settings(name="latent", decoder_dim=16, **settings)
    optim = Optim(zero_stage=zero_stage)
    return Objective(Pretrain(data=Data(size=(16, 24)), model=model, objective=settings, optim=optim))


def stored(objective: Objective | fcmae.Objective, model: torch.nn.Module, name: str) -> Opened:
    """A weight file as a run of an objective writes it."""
    weights = Weights(model.encoder.arch, None, cpu_state(model.encoder), *objective.decoder(model), objective=name)
    return Opened(f"{name}.pt", weights)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("masks", [1, 3])
def test_samples_and_the_example_have_the_same_masks(masks):
    objective = made(masks=masks)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))
    sample = objective.transform()(image, -1, sample_rng(0, 0, 0))
    assert sample["visible"].shape == objective.example(5)["visible"].shape[1:]
    assert sample["visible"].shape == ((2, 3) if masks == 1 else (3, 2, 3))
    model, images = objective.build(), torch.rand(4, 3, 16, 24)
    assert model(*objective.inputs(images, objective.example(4))).requires_grad


def test_the_decay_rises_linearly():
    objective = made(ema=(0.9, 0.98), ema_steps=4)
    assert [objective.decay(step) for step in (0, 1, 4, 100)] == pytest.approx([0.9, 0.92, 0.98, 0.98])


def test_the_stage_passes_the_step_of_an_update():
    """Micro batches do not count: the teacher follows an update with the decay of its step."""
    objective = made(ema=(0.0, 0.9), ema_steps=9)
    stage = object.__new__(Pretraining)
    model = objective.build()
    stage.objective, stage.step = objective, 5
    stage.engine = type("Engine", (), {"model": model})
    before = cpu_state(model.teacher)["stem.0.weight"].clone()
    random_weights(model.encoder)
    stage.after_update()
    expected = 0.5 * before + 0.5 * model.encoder.stem[0].weight.detach()
    torch.testing.assert_close(model.teacher.stem[0].weight.detach(), expected)


def test_zero_3_is_refused():
    with pytest.raises(UserError) as error:
        made(zero_stage=3)
    assert has(error.value, "objective.name optim.zero_stage 0, 1 2")


def test_collapsed_targets_are_reported_once(alone):
    objective = made()
    model = objective.build()
    batch = objective.inputs(torch.randn(4, 3, 16, 24), objective.example(4))
    model(*batch)
    report = objective.monitor(model)
    assert not report.lines and report.scores["latent"]["collapsed"] == 0
    assert report.scores["latent"]["target_spread"] > 5 * COLLAPSED
    model.teacher.stem[0].weight.data.zero_()  # its features do not depend on the image
    model(*batch)
    report = objective.monitor(model)
    assert report.scores["latent"]["collapsed"] == 1 and len(report.lines) == 1
    assert has(report.lines[0], "warning objective.pixel_weight objective.ema optim.lr") and "\n" not in report.lines[0]
    assert not objective.monitor(model).lines


def test_init_from_fcmae_and_from_latent():
    """The encoder is loaded into the teacher as well, the decoder if it predicts the same."""
    objective = made(pixel_weight=1.0)
    source = objective.build()
    random_weights(source)
    model = objective.build()
    objective.load(model, stored(objective, source, "latent"))
    for name, tensor in model.state_dict().items():
        other = name.replace("teacher.", "encoder.")
        assert torch.equal(tensor, source.state_dict()[other]), name
    masked = fcmae.Objective(objective.config)
    autoencoder = masked.build()
    random_weights(autoencoder)
    objective.load(model, stored(masked, autoencoder, "fcmae"))
    assert torch.equal(model.teacher.stem[0].weight, autoencoder.encoder.stem[0].weight)
    assert torch.equal(model.pred.weight, source.pred.weight)  # not of pixels
    features_only = made()
    other = features_only.build()
    features_only.load(other, stored(objective, source, "latent"))
    assert torch.equal(other.encoder.stem[0].weight, source.encoder.stem[0].weight)


@pytest.mark.parametrize("masks", [1, 2])
@torch.no_grad()
def test_picture(masks):
    """A colour for each patch: of all patches in the target, of the hidden ones in the prediction."""
    objective = made(masks=masks)
    model = objective.build().eval()
    random_weights(model)
    image, visible = objective.inputs(torch.randn(3, 3, 16, 24), objective.example(3))
    _, sheet = objective.picture(model, (image, visible), torch.zeros(3), torch.ones(3))
    assert [[cell.lines for cell in group.cells] for group in sheet.groups] == [list(COLUMNS)] * 3
    for group in sheet.groups:
        *_, target, predicted = (np.asarray(cell.picture) for cell in group.cells)
        side = target.shape[0] // 2
        for i, shown in enumerate((visible if masks == 1 else visible[:, 0])[0].flatten().tolist()):
            rows, columns = (slice(k * side, (k + 1) * side) for k in divmod(i, 3))
            assert target[rows, columns].std((0, 1)).max() == 0
            assert (predicted[rows, columns].std((0, 1)).max() > 0) == shown  # hatched
    assert np.asarray(sheet.groups[0].cells[2].picture).std() > 10


def words(digits, folder, name, *more):
    where = ["--data.path", digits, "--run.folder", folder, "--run.name", name, "--optim.epochs", "2"]
    return ["pretrain/main.py", *where, *TINY, *QUICK, *LATENT, *more]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An undisturbed run of 12 steps."""
    folder = tmp_path_factory.mktemp("latent")
    run("python", *words(digits, folder, "whole"))
    return folder / "whole"


def test_files_of_a_run(whole):
    assert {"latent.pt", "reconstruction.png", "report.html"} < names(whole)
    weights = open_weights(whole / "latent.pt").weights
    assert weights.objective == "latent" and weights.decoder_config["target_stages"] == 1
    assert not any(name.startswith(("teacher", "encoder")) for name in weights.decoder)
    assert open_encoder(whole / "latent.pt").model.arch.dims == (8, 16, 16, 16)
    found = scores(whole, "latent")
    assert len(found) == 12 and all(0 < each["latent_loss"] < 3 and each["collapsed"] == 0 for each in found)


def test_a_resumed_run_equals_an_uninterrupted_one(whole, digits, tmp_path):
    """Losses, monitor, weights and teacher, from the middle of an epoch."""
    run("python", *words(digits, tmp_path, "stopped", "--run.max_steps", "4"))
    run("python", *words(digits, tmp_path, "stopped", "--resume", "must"))
    stopped = tmp_path / "stopped"
    assert losses(stopped) == losses(whole) and scores(stopped, "latent") == scores(whole, "latent")
    expected, found = state(whole), state(stopped)
    assert expected.keys() == found.keys() and any("teacher." in name for name in found)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("zero_stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_two_ranks_and_accumulation_give_the_losses_of_one(zero_stage, whole, digits, tmp_path):
    """With the teacher; then the run ends on one rank."""
    more = ["--optim.micro_batch", "60", "--optim.zero_stage", zero_stage]
    run_ranks(2, *words(digits, tmp_path, "two", *more, "--run.max_steps", "8"))
    run("python", *words(digits, tmp_path, "two", *more, "--resume", "must"))
    two = tmp_path / "two"
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-4)
    for name, tensor in state(two).items():
        torch.testing.assert_close(tensor, state(whole)[name], rtol=1e-3, atol=1e-4)
