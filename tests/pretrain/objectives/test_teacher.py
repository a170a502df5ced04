"""Distillation as an objective: settings, pictures, and runs that resume, use several ranks and lower the loss."""

import shutil

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Data, Encoder, Optim, Pretrain
from data.transforms import sample_rng
from launch.training.fit import measure_need
from launch.training.parameter_groups import parameter_groups
from models.convnext import ConvNeXt
from models.opening import Opened, open_encoder, open_weights
from models.weights import Weights, cpu_state, save
from pretrain.feature_pictures import COLUMNS
from pretrain.objectives.teacher import Objective, Settings
from tests.conftest import QUICK, TINY, has, losses, names, run, run_ranks
from tests.models.helpers import random_weights, tiny
from tests.pretrain.objectives.helpers import scores, state

SHORT = ["--objective.name", "teacher", "--objective.masks", "2"]


def own_teacher(folder, seed: int = 0, channels: int = 3) -> str:
    """A classifier of this project, with patches of 8 pixels."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ConvNeXt(Encoder("convnextv2_atto", channels, 1, (1, 1, 1, 1), (8, 8, 16, 16)), classes=2)
        random_weights(model)
    tensors = cpu_state(model)
    head = {name: x for name, x in tensors.items() if name.startswith("head.")}
    encoder = {name: x for name, x in tensors.items() if name not in head}
    image = Preprocessing((32, 32), channels, (0.5,) * channels, (0.25,) * channels)
    path = folder / f"teacher-{seed}.pt"
    save(path, Weights(model.arch, image, encoder, head=head, classes=["a", "b"]))
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return own_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> str:
    """For the digits."""
    return own_teacher(tmp_path_factory.mktemp("grey"), channels=1)


def made(teacher: str, channels: int = 3, **settings) -> Objective:
    model, _ = tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), channels=channels)
    settings = Settings(name="teacher", teacher=teacher, decoder_dim=16, **settings)
    return Objective(Pretrain(data=Data(size=(16, 24)), model=model, objective=settings, optim=Optim(zero_stage=3)))


@pytest.mark.parametrize("masks", [1, 3])
def test_samples_example_and_inputs_fit_the_model(masks, teacher):
    objective = made(teacher, masks=masks)
    model, images = objective.build(), torch.rand(4, 3, 16, 24)
    sample = objective.transform()(torch.zeros(3, 40, 40, dtype=torch.uint8), -1, sample_rng(0, 0, 0))
    assert sample["visible"].shape == objective.example(5)["visible"].shape[1:]
    batch = objective.inputs(images, objective.example(4))
    assert batch[2].shape == (4, 2, 3, 16) and batch[3].shape == (4, 16)
    before = cpu_state(objective.teacher)
    model(*batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert not any(x.requires_grad for x in batch[2:])
    assert all(torch.equal(x, before[name]) for name, x in objective.teacher.state_dict().items())
    assert not any("teacher" in name or "network" in name for name in model.state_dict())
    assert has(objective.describe(), f"{teacher} 16x24 cosine")


def test_initial_weights_do_not_depend_on_the_kind_of_teacher(teacher, tmp_path):
    torch.manual_seed(0)
    first = made(teacher).build()
    torch.manual_seed(0)
    second = made(own_teacher(tmp_path, seed=1)).build()
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_the_estimate_counts_the_teacher(teacher):
    objective = made(teacher)
    model = objective.build()
    groups = parameter_groups(model, Optim())

    def inputs(image):
        return objective.inputs(image, objective.example(len(image)))

    without, counted = (
        measure_need(objective.config, model, groups, 1, inputs, beside=beside).state
        for beside in (0, objective.beside())
    )
    size = sum(p.numel() for p in ConvNeXt(Encoder("convnextv2_atto", 3, 1, (1, 1, 1, 1), (8, 8, 16, 16))).parameters())
    assert counted - without == 4 * (size + 6)  # and scale and shift of three channels


def test_teachers_that_do_not_exist_or_fit(tmp_path):
    for name, words in (
        ("none", "objective.teacher timm:NAME"),
        (str(tmp_path / "absent.pt"), "absent.pt does not exist timm:NAME"),
        ("hf://nobody", "hf://nobody hf://USER/REPO"),
    ):
        with pytest.raises(UserError) as error:
            made(name)
        assert has(error.value, words) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        made(own_teacher(tmp_path), channels=2).build()
    assert has(error.value, "objective.teacher 3 channels model.channels 2")
    assert made(own_teacher(tmp_path, channels=2), channels=2).build().pred.out_features == 16


def test_init_from_another_run(teacher):
    """Encoder and decoder are loaded; for other targets the encoder only. The file has no weights of the teacher."""
    objective = made(teacher)
    source, model = objective.build(), objective.build()
    random_weights(source)
    tensors, settings = objective.decoder(source)
    assert settings["teacher_digest"] == objective.teacher.digest and settings["teacher"] == teacher
    assert not any("network" in name for name in tensors)
    arch = source.encoder.arch
    init = Opened("teacher.pt", Weights(arch, None, cpu_state(source.encoder), tensors, settings, objective="teacher"))
    objective.load(model, init)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.state_dict().items())
    other = made(teacher, pooled_weight=0.0)
    student = other.build()
    other.load(student, init)
    assert torch.equal(student.encoder.stem[0].weight, source.encoder.stem[0].weight)
    assert not torch.equal(student.pred.weight, source.pred.weight)


@pytest.mark.parametrize(("masks", "visible_weight"), [(1, 0.0), (2, 1.0)])
@torch.no_grad()
def test_picture(masks, visible_weight, teacher):
    """A colour for each patch; visible ones are hatched where they are not predicted."""
    objective = made(teacher, masks=masks, visible_weight=visible_weight)
    model = objective.build().eval()
    random_weights(model)
    inputs = objective.inputs(torch.randn(3, 3, 16, 24), objective.example(3))
    visible = objective.first_mask(*inputs[:2])[1]
    _, sheet = objective.picture(model, inputs, torch.zeros(3), torch.ones(3))
    assert [[cell.lines for cell in group.cells] for group in sheet.groups] == [list(COLUMNS)] * 3
    *_, target, predicted = (np.asarray(cell.picture) for cell in sheet.groups[0].cells)
    side = target.shape[0] // 2
    for i, shown in enumerate(visible[0].flatten().tolist()):
        rows, columns = (slice(k * side, (k + 1) * side) for k in divmod(i, 3))
        assert target[rows, columns].std((0, 1)).max() == 0
        assert (predicted[rows, columns].std((0, 1)).max() > 0) == (shown and not visible_weight)


def words(digits, folder, name, teacher, *more):
    where = ["--data.path", digits, "--run.folder", folder, "--run.name", name, "--optim.epochs", "2"]
    more = ["--objective.teacher", teacher, "--optim.lr", "4e-3", "--optim.warmup_epochs", ".5", *more]
    return ["pretrain/main.py", *where, *TINY, *QUICK, *SHORT, *more]


@pytest.fixture(scope="module")
def whole(digits, grey, tmp_path_factory):
    """An undisturbed run of 12 steps."""
    folder = tmp_path_factory.mktemp("distilled")
    run("python", *words(digits, folder, "whole", grey))
    return folder / "whole"


def test_files_of_a_run_and_its_loss(whole, grey):
    assert {"teacher.pt", "reconstruction.png", "report.html"} < names(whole)
    weights = open_weights(whole / "teacher.pt").weights
    assert weights.objective == "teacher" and weights.decoder_config["teacher"] == grey
    assert open_encoder(whole / "teacher.pt").model.arch.dims == (8, 16, 16, 16)
    found = scores(whole, "teacher")
    assert len(found) == 12 and set(found[0]) == {"hidden_loss", "visible_loss", "pooled_loss"}
    assert all(found[-1][name] < found[0][name] - 0.1 for name in found[0])
    assert not any("network" in name for name in state(whole))


def test_a_resumed_run_equals_an_uninterrupted_one(whole, digits, grey, tmp_path):
    """Losses and weights, from the middle of an epoch; another teacher is refused, a moved one is not."""
    run("python", *words(digits, tmp_path, "stopped", grey, "--run.max_steps", "4"))
    other = own_teacher(tmp_path, seed=1, channels=1)
    refusal = run("python", *words(digits, tmp_path, "stopped", other, "--resume", "must"), code=2).stderr
    assert has(refusal, "teacher_digest")
    moved = shutil.copy(grey, tmp_path / "moved.pt")
    run("python", *words(digits, tmp_path, "stopped", moved, "--resume", "must"))
    stopped = tmp_path / "stopped"
    assert losses(stopped) == losses(whole) and scores(stopped, "teacher") == scores(whole, "teacher")
    expected, found = state(whole), state(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_and_accumulation_give_the_losses_of_one(zero_stage, whole, digits, grey, tmp_path):
    more = ["--optim.micro_batch", "60", "--optim.zero_stage", zero_stage]
    run_ranks(2, *words(digits, tmp_path, "two", grey, *more))
    assert [x for _, x in losses(tmp_path / "two")] == pytest.approx([x for _, x in losses(whole)], rel=1e-4)


@pytest.mark.slow
def test_dry_run_lists_the_teacher(digits, grey, tmp_path):
    out = run("python", *words(digits, tmp_path, "plan", grey, "--dry-run", "2")).stdout
    assert has(out, "frozen activations") and not (tmp_path / "plan").exists()
