"""A run fits before it starts: batches of few images, micro batches within the free memory, on all ranks alike."""

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from configs.errors import UserError
from configs.schema import Augment, Data, Encoder, Finetune, Optim, Pretrain, Run
from launch.training import fit
from launch.training.fit import MARGIN, announced, any_batch, fit_batch, fit_memory, largest, measure_need
from launch.training.memory import Activations, owner
from launch.training.parameter_groups import parameter_groups
from launch.training.world import World
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from pretrain.objectives.fcmae import Objective
from tests.conftest import QUICK, ROOT, has, losses, run, run_ranks
from tests.launch.training.helpers import SMALL
from tests.models.helpers import tiny
from tests.processes import on_ranks

SIZE = 32


def even(micro: int) -> None:
    """The check of mixup."""
    if micro % 2:
        raise UserError(f"optim.micro_batch {micro} must be even")


# ---- the batch


@pytest.mark.parametrize(
    ("images", "ranks", "repeats", "micro", "fitted"),
    [
        (264, 1, 1, None, (264, None)),
        (264, 5, 1, None, (260, None)),
        (264, 1, 1, "auto", (264, "auto")),
        (264, 1, 1, 64, (256, 64)),  # accumulation stays possible
        (264, 2, 1, 64, (256, 64)),
        (100, 2, 1, 64, (100, None)),  # fewer than a micro batch of each rank
        (264, 1, 7, None, (259, None)),
        (263, 2, 4, None, (260, None)),
        (1, 1, 1, None, (1, None)),
        (1, 1, 1, 8, (1, None)),
    ],
)
def test_the_batch_shrinks_to_the_images(images, ranks, repeats, micro, fitted, capsys):
    found = fit_batch(Optim(batch_size=6720, micro_batch=micro), images, ranks, repeats)
    assert (found.batch_size, found.micro_batch) == fitted
    found.accumulation(ranks)  # divides
    (line,) = capsys.readouterr().out.splitlines()
    assert has(line, f"{images} optim.batch_size 6720 {fitted[0]}")


def test_the_learning_rate_follows(capsys):
    optim = Optim(lr=7.5e-4, batch_size=512)
    found = fit_batch(optim, 264, 1)
    assert capsys.readouterr().out == (
        "264 images are fewer than optim.batch_size 512: using 264, lr 0.0015 -> 0.00077\n"
    )
    assert found.lr == optim.lr and found.lr_at(40, 1) == pytest.approx(7.5e-4 * 264 / 256)  # after the warm-up


@pytest.mark.parametrize("images", [512, 513, 10**6])
def test_enough_images_change_nothing(images, capsys):
    optim = Optim(batch_size=512, micro_batch=64)
    assert fit_batch(optim, images, 2) is optim and capsys.readouterr().out == ""


def test_the_batch_suits_the_task():
    assert fit_batch(Optim(batch_size=512), 263, 1, check=even).batch_size == 262
    assert fit_batch(Optim(batch_size=512), 263, 3, check=even).batch_size == 258
    with pytest.raises(UserError, match="must be even"):
        fit_batch(Optim(batch_size=512), 1, 1, check=even)


@pytest.mark.parametrize(
    ("images", "ranks", "repeats", "check", "says"),
    [
        (1, 2, 1, any_batch, r"1 image is too few for 2 ranks: start fewer ranks$"),
        (
            3,
            1,
            4,
            any_batch,
            r"3 images are too few for 1 rank with data\.repeats 4: add images, or use data\.repeats 1$",
        ),
        (1, 1, 2, even, r"1 image is too few for 1 rank with data\.repeats 2: add images$"),
        (3, 2, 2, even, r"3 images are too few for 2 ranks with data\.repeats 2: start fewer ranks$"),
        (1, 1, 1, even, r"optim\.micro_batch 1 must be even"),
    ],
)
def test_too_few_images_for_any_batch(images, ranks, repeats, check, says):
    with pytest.raises(UserError, match=says):
        fit_batch(Optim(batch_size=512), images, ranks, repeats, check)


def test_a_resumed_run_keeps_its_batch():
    """Two ranks took 262 of 263 images; one rank could take all, but that would be another run."""
    optim, before = Optim(batch_size=512), {"batch_size": 262, "micro_batch": None}
    assert fit_batch(optim, 263, 1, recorded=before).batch_size == 262
    assert fit_batch(optim, 263, 1).batch_size == 263
    assert fit_batch(optim, 263, 1, recorded={"batch_size": 512}).batch_size == 263  # of other data


# ---- the micro batch


@pytest.mark.parametrize(
    ("limit", "roomy", "share", "check", "micro"),
    [
        (1000, 500, 512, fit.any_batch, 256),
        (1000, 512, 512, fit.any_batch, 512),
        (500, 100, 264, fit.any_batch, 88),
        (500, 100, 262, fit.any_batch, 2),  # 262 = 2 x 131
        (500, 100, 263, fit.any_batch, 1),
        (500, 32, 66, even, 22),
        (2, 0, 512, fit.any_batch, 1),  # tight, but it fits by the estimate
        (0, 0, 512, fit.any_batch, None),
        (1, 1, 512, even, None),
    ],
)
def test_the_largest_micro_batch_that_fits(limit, roomy, share, check, micro):
    assert largest(limit, roomy, share, check) == micro


def pretraining(**optim) -> tuple[Pretrain, FCMAE]:
    own, settings = tiny()
    config = Pretrain(data=Data(size=SIZE), model=own, objective=settings, optim=Optim(**optim), run=Run(device="cpu"))
    return config, FCMAE(own, settings)


def inputs(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    objective = Objective(Pretrain(data=Data(size=SIZE), model=tiny()[0]))
    return objective.inputs(image, objective.example(len(image)))


def fitted(monkeypatch, free: float, recorded: dict | None = None, check=fit.any_batch, **optim) -> Optim:
    """`fit_memory` on one rank of a machine with so many free bytes."""
    config, model = pretraining(**optim)
    monkeypatch.setattr(fit, "barrier", lambda: None)
    monkeypatch.setattr(fit, "gather", lambda value: [value])
    held = 4 * sum(p.numel() for p in model.parameters())  # is already taken from what is free
    monkeypatch.setattr(fit, "free_bytes", lambda device: int(free) - held)
    world = World(0, 1, torch.device("cpu"))
    return fit_memory(config, model, parameter_groups(model, config.optim), world, inputs, check, recorded)


def needs(micro: int, **optim) -> int:
    config, model = pretraining(**{"batch_size": 64, **optim})
    return measure_need(config, model, parameter_groups(model, config.optim), 1, inputs).bytes(micro)


def test_a_run_that_does_not_fit_is_refused_with_what_fits(monkeypatch):
    free = MARGIN * needs(16) + 1
    assert needs(64) > free
    with pytest.raises(UserError, match=r"micro batch of 64 images.* GiB.* GiB free.*--optim\.micro_batch 16$"):
        fitted(monkeypatch, free, batch_size=64)
    assert fitted(monkeypatch, free, batch_size=64, micro_batch=16).micro_batch == 16


def test_a_run_that_fits_by_the_estimate_starts_and_a_tight_one_warns(monkeypatch, capsys):
    fitted(monkeypatch, MARGIN * needs(64) + 1, batch_size=64)
    assert capsys.readouterr().out == ""
    assert fitted(monkeypatch, needs(64) + 1, batch_size=64).micro_batch is None
    warning = capsys.readouterr().out
    assert has(warning, "memory 64 images") and int(re.search(r"micro_batch (\d+)", warning)[1]) in (16, 32)
    with pytest.raises(UserError):
        fitted(monkeypatch, needs(64) - 2**16, batch_size=64)


def test_nothing_fits(monkeypatch):
    for free in (needs(1) - 2**16, 1000):
        for micro in (None, "auto", 1):
            with pytest.raises(UserError, match=r"recompute.*zero_stage.*data\.size.*model\.name"):
                fitted(monkeypatch, free, batch_size=64, micro_batch=micro)


def test_auto_takes_the_largest_that_leaves_a_margin(monkeypatch, capsys):
    for micro in (1, 8, 64):
        found = fitted(monkeypatch, MARGIN * needs(micro) + 1, batch_size=64, micro_batch="auto")
        assert found.micro_batch == micro
        assert has(capsys.readouterr().out, f"optim.micro_batch auto: {micro}")
    assert fitted(monkeypatch, MARGIN * needs(40), batch_size=66, micro_batch="auto", check=even).micro_batch == 22


def test_auto_keeps_the_micro_batch_of_the_run_while_it_fits(monkeypatch, capsys):
    auto = {"batch_size": 64, "micro_batch": "auto"}
    plenty, scarce = 1e12, MARGIN * needs(8) + 1
    assert fitted(monkeypatch, plenty, {"batch_size": 64, "micro_batch": 4}, **auto).micro_batch == 4
    assert fitted(monkeypatch, plenty, {"batch_size": 64, "micro_batch": None}, **auto).micro_batch == 64
    assert "rounding" not in capsys.readouterr().out
    assert fitted(monkeypatch, scarce, {"batch_size": 64, "micro_batch": 64}, **auto).micro_batch == 8
    assert "rounding" in capsys.readouterr().out


def rank_fits(rank: int, cases: list[tuple[list[float], list[str]]]) -> list:
    """In a rank: for free bytes and machines of the ranks, the chosen micro batch or the refusal."""
    config, model = pretraining(batch_size=64, micro_batch="auto")
    groups, answers = parameter_groups(model, config.optim), []
    for free, machines in cases:
        fit.free_bytes = lambda device, free=free: free[rank]
        fit.owner = lambda device, machines=machines: machines[rank]
        try:
            world = World(rank, len(free), torch.device("cpu"))
            answers.append(fit_memory(config, model, groups, world, inputs).micro_batch)
        except UserError as error:
            answers.append(str(error))
    return answers


def test_ranks_agree_on_the_smallest(tmp_path):
    need = MARGIN * needs(8)
    cases = [([1e12, need], ["x", "y"]), ([2 * need] * 2, ["x", "x"]), ([1e12, 1000], ["x", "y"])]
    first, second = on_ranks(2, rank_fits, tmp_path, cases)
    assert first == second and first[:2] == [8, 8] and has(first[2], "rank 1 GiB")


def test_the_need_counts_what_is_frozen_and_averaged():
    arch = Encoder("convnextv2_atto", 3, 1, (1, 1, 1, 1), (8, 16, 32, 64))
    config = Finetune(data=Data(size=SIZE), optim=Optim(batch_size=8))
    images, states = (lambda image: (image,)), []
    for ema, frozen in ((0.0, False), (0.9, False), (0.0, True)):
        model = ConvNeXt(arch, classes=10)
        model.requires_grad_(not frozen)
        model.head.requires_grad_(True)
        own = replace(config, augment=Augment(ema=ema))
        states.append(measure_need(own, model, parameter_groups(model, config.optim), 1, images).state)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert states[1] - states[0] == weights < states[2] < states[0]


def test_measuring_leaves_the_generators_as_they_were():
    config, model = pretraining(batch_size=8)
    before = torch.get_rng_state()
    measure_need(config, model, parameter_groups(model, config.optim), 1, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_images_are_measured_than_a_micro_batch_has():
    config, model = pretraining(batch_size=1)
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    need = measure_need(config, model, parameter_groups(model, config.optim), 1, inputs)
    assert seen == [1] and need.activations.per_image > 0
    config = replace(config, optim=Optim(batch_size=9, micro_batch=3))
    measure_need(config, model, parameter_groups(model, config.optim), 1, inputs)
    assert seen == [1, 2, 3]
    measure_need(config, model, parameter_groups(model, config.optim), 1, inputs, free=1000)  # less than the state
    assert seen == [1, 2, 3]


def test_images_in_a_number_of_bytes():
    need = fit.Need(100, Activations(10, 5))
    assert [need.images(free) for free in (0, 109, 114, 115, 210)] == [0, 0, 0, 1, 20] and need.bytes(20) == 210


def test_a_slow_estimate_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(fit, "SILENCE", 0.05)
    with announced("counting"):
        pass
    assert capsys.readouterr().out == ""
    with announced("counting"):
        time.sleep(0.2)
    assert "counting" in capsys.readouterr().out


def test_ranks_of_a_machine_share_its_memory():
    assert owner(torch.device("cpu")) == owner(torch.device("cpu")) != ""


# three real steps: bytes by the estimate, and the peak of the process above what it had before
STEPS = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import psutil, torch
from configs.machine import peak_memory
from configs.schema import Data, FCMAESettings, Optim, Pretrain, PretrainModel, Run
from launch.training.engine import Engine
from launch.training.fit import measure_need
from launch.training.parameter_groups import parameter_groups
from launch.training.world import destroy_world, init_world
from models.fcmae import FCMAE
from pretrain.objectives.fcmae import Objective

name, micro = sys.argv[2], int(sys.argv[3])
world = init_world(Run(device="cpu"))
config = Pretrain(model=PretrainModel(name), objective=FCMAESettings(), optim=Optim(batch_size=micro, precision="fp32"))
objective, model = Objective(config), FCMAE(config.model, config.objective)
before = psutil.Process().memory_info().rss - 4 * sum(p.numel() for p in model.parameters())
groups = parameter_groups(model, config.optim)
inputs = lambda image: objective.inputs(image, objective.example(len(image)))
estimate = measure_need(config, model, groups, 1, inputs).bytes(micro)
engine = Engine(model, groups, config.optim, world)
for _ in range(3):
    engine.step(engine(*inputs(torch.rand(micro, 3, 224, 224))))
print(json.dumps([estimate, peak_memory() - before]))
destroy_world()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "micro"), [("convnextv2_atto", 64), ("convnextv2_tiny", 16)])
def test_real_steps_take_more_than_the_estimate_but_not_more_than_the_margin(name, micro, tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    done = run("python", tmp_path / "steps.py", ROOT, name, micro)
    estimate, peak = json.loads(done.stdout.splitlines()[-1])
    assert estimate < peak < MARGIN * estimate


# ---- commands

# pretrain/main.py on a machine with as many free bytes as the first argument says; those of several ranks differ
PATCHED = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import launch.training.fit as fit
free = [float(word) for word in sys.argv.pop(1).split(",")]
fit.free_bytes = lambda device: int(free[int(os.environ.get("RANK", 0)) % len(free)])
fit.owner = lambda device: os.environ.get("RANK", "0")
runpy.run_path({str(ROOT / "pretrain/main.py")!r}, run_name="__main__")
"""
SCARCE = 6e6  # bytes: too few for the whole batch of 240


@pytest.fixture
def patched(tmp_path):
    path = tmp_path / "patched.py"
    path.write_text(PATCHED)
    return path


def words(shards, folder, *more, epochs=2):
    where = ["--data.path", shards, "--run.folder", folder.parent, "--run.name", folder.name]
    return [*where, *SMALL, "--optim.epochs", epochs, *more]


def recorded(folder) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())["optim"]


def test_the_micro_batch_that_a_refusal_names_fits(digits, patched, tmp_path):
    done = run("python", patched, SCARCE, *words(digits, tmp_path / "x"), code=2)
    (line,) = done.stderr.splitlines()
    assert has(line, "error: 240 images GiB free") and not (tmp_path / "x").exists()
    more = re.search(r"(--optim\.micro_batch) (\d+)$", line).groups()
    done = run("python", patched, SCARCE, *words(digits, tmp_path / "x", *more, "--run.max_steps", 1))
    assert "memory" not in done.stdout


def test_auto_is_recorded_and_resumed_on_two_ranks(digits, patched, tmp_path):
    """The second rank has little memory. Resumed with plenty, the run keeps its micro batch, and its losses."""
    auto = ["--optim.micro_batch", "auto"]
    run_ranks(2, patched, f"1e12,{SCARCE}", *words(digits, tmp_path / "whole", *auto))
    micro = recorded(tmp_path / "whole")["micro_batch"]
    assert 0 < micro < 120 and 120 % micro == 0
    run_ranks(2, patched, f"1e12,{SCARCE}", *words(digits, tmp_path / "x", *auto, "--run.max_steps", 6))
    done = run_ranks(2, patched, "1e12", *words(digits, tmp_path / "x", *auto))
    assert has(done.stdout, f"auto: {micro} resuming") and recorded(tmp_path / "x")["micro_batch"] == micro
    assert losses(tmp_path / "x") == losses(tmp_path / "whole")


def test_fewer_images_than_a_batch(digits, tmp_path):
    """1,442 digits and a batch of 2,000: every epoch is a step, also of a resumed run."""
    more = ["--optim.batch_size", "2000", "--optim.lr", "1e-3", "--optim.warmup_epochs", "0"]
    done = run("python", "pretrain/main.py", *words(digits, tmp_path / "whole", *more))
    assert has(done.stdout, "1,442 optim.batch_size 2000 1442 0.0078 0.0056")
    assert recorded(tmp_path / "whole")["batch_size"] == 1442 and len(losses(tmp_path / "whole")) == 2
    entries = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert next(entry["lr"] for entry in entries if "lr" in entry) == pytest.approx(1e-3 * 1442 / 256)
    run("python", "pretrain/main.py", *words(digits, tmp_path / "x", *more, "--run.max_steps", 1))
    assert "resuming" in run("python", "pretrain/main.py", *words(digits, tmp_path / "x", *more)).stdout
    assert losses(tmp_path / "x") == losses(tmp_path / "whole")


def test_one_image(tmp_path):
    """Steps, pictures and weights of a single image."""
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.random.default_rng(0).integers(0, 256, (24, 24, 1), np.uint8))
    run("python", "data/prepare.py", "--no-plan", tmp_path / "in", tmp_path / "shards", "--no-labels")
    done = run("python", "pretrain/main.py", *words(tmp_path / "shards", tmp_path / "x"))
    assert has(done.stdout, "1 image using 1") and (tmp_path / "x/reconstruction.png").exists()
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "x")) and len(losses(tmp_path / "x")) == 2
    failed = run_ranks(2, "pretrain/main.py", *words(tmp_path / "shards", tmp_path / "y"), code=2)
    assert has(failed.stdout, "error: 1 image 2 ranks") and not (tmp_path / "y").exists()


def test_fine_tuning_on_fewer_images_than_a_batch(digits, tmp_path):
    """One image per class: ten, mixed in pairs."""
    model = ["--init", "none", "--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]"]
    more = [*model, "--task.label_share", "0.001", "--task.mixup", "0.8"]
    where = ["--data.path", digits, "--run.folder", tmp_path, "--run.name", "x", "--run.max_steps", "1"]
    command = ["finetune/main.py", *where, *QUICK, *more, "--optim.micro_batch", "auto"]
    done = run("python", *command)
    assert has(done.stdout, "10 images using 10 auto: 10") and recorded(tmp_path / "x")["micro_batch"] == 10
    assert recorded(tmp_path / "x")["batch_size"] == 10
