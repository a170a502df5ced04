"""The loop: an inert constructor, the order of what it does, and what it passes to the log."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, FCMAESettings, Optim, Pretrain, Run
from launch.training.trainer import Report, Trainer
from launch.training.world import World
from tests.conftest import has

STEPS = 3  # of an epoch
IDENTITY = {"stage": "pretraining", "optim": {"zero_stage": 0}}


class Engine:
    """Records its calls."""

    grad_norm, loss_scale = 1.0, None

    def __init__(self, calls: list):
        self.calls = calls

    def train(self) -> None:
        self.calls.append("train")

    def set_lr(self, lr: float) -> None:
        self.calls.append(f"lr {lr:.2f}")

    def step(self, loss: torch.Tensor) -> bool:
        self.calls.append("step")
        return True

    def save(self, folder, tag: str, state: dict) -> None:
        (folder / tag).mkdir()
        self.calls.append("save")

    def load(self, folder, tag: str, universal: bool = False) -> dict:
        self.calls.append("load")
        return {"faults": {"skipped": 0, "consecutive": 0, "damaged": {}}, "losses": [[0.0, 0.0]], "stage": {"seen": 9}}


class Stage:
    """Records its calls, and reports a score after each epoch."""

    def __init__(self, calls: list):
        self.calls, self.seen = calls, 0

    def describe(self) -> list[str]:
        return ["a stage"]

    def start(self, step: int, watch) -> Report:
        self.calls.append(f"start {step}")
        return Report(scores={"first": {"x": 0.5}})

    def loss(self, batch: dict, step: int, micro: int) -> torch.Tensor:
        self.calls.append(f"loss {step}.{micro}")
        return torch.tensor(2.0)

    def after_update(self) -> None:
        self.seen += 1

    def monitor(self) -> Report:
        return Report()

    def end_epoch(self, epoch: int, last: bool, watch) -> Report:
        assert list(watch([1, 2], 2, "evaluation")) == [1, 2]
        self.calls.append(f"epoch {epoch}{' last' if last else ''}")
        return Report(score=float(epoch), scores={"val": {"top1": 0.1 * epoch}}, lines=[f"epoch {epoch} scored"])

    def should_stop(self) -> bool:
        return False

    def state(self) -> dict:
        return {"seen": self.seen}

    def load_state(self, state: dict) -> None:
        self.seen = state["seen"]


class Loader:
    """Endless batches from a step."""

    batches = SimpleNamespace(steps_per_epoch=STEPS)

    def __init__(self, calls: list):
        self.calls, self.samples = calls, SimpleNamespace(split=Split())

    def iterate(self, first_step: int = 0):
        self.calls.append(f"from {first_step}")
        while True:
            yield {"sample": torch.arange(4), "damaged": torch.zeros(4, dtype=torch.bool)}


@pytest.fixture
def world():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def trainer(folder, world: World, epochs: int = 2, **run) -> tuple[Trainer, list]:
    calls: list = []
    optim = Optim(lr=256 / 4, batch_size=4, micro_batch=2, epochs=epochs, warmup_epochs=0)
    config = Pretrain(data=Data(), objective=FCMAESettings(), optim=optim, run=Run(name="x", folder=str(folder), **run))
    identity = IDENTITY | {"optim": {"epochs": epochs, "zero_stage": 0}}
    return Trainer(config, Engine(calls), Loader(calls), Stage(calls), world, identity), calls


class Split:
    """A split of eight images."""

    name = "train"

    def __len__(self) -> int:
        return 8


def test_the_constructor_does_nothing(tmp_path):
    """No process group is there to talk to, and no file is written."""
    made, calls = trainer(tmp_path, World(0, 2, torch.device("cpu")))
    assert calls == [] and not list(tmp_path.iterdir()) and made.steps == 2 * STEPS


def test_the_order_of_a_run(tmp_path, world):
    made, calls = trainer(tmp_path, world)
    made.run()
    micro = [word for i in range(2) for word in (f"loss {{}}.{i}", "step")]
    step = [[f"lr {made.config.optim.lr_at(i, STEPS):.2f}", *(word.format(i) for word in micro)] for i in range(6)]
    expected = ["train", "start 0", "from 0", *step[0], *step[1], *step[2], "epoch 1", "save"]
    expected += [*step[3], *step[4], *step[5], "epoch 2 last", "save"]
    assert [call for call in calls if call != "from 0"] == [call for call in expected if call != "from 0"]


def test_reports_are_logged(tmp_path, world, capsys):
    made, _ = trainer(tmp_path, world)
    made.run()
    lines = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    assert {"step": 0, "first": {"x": 0.5}} in lines and {"step": 3, "val": {"top1": 0.1}} in lines
    printed = capsys.readouterr().out
    assert "a stage" in printed and "epoch 2 scored" in printed


def test_a_second_run_resumes_from_the_checkpoint(tmp_path, world):
    first, _ = trainer(tmp_path, world, max_steps=4)
    first.run()
    second, calls = trainer(tmp_path, world)
    second.run()
    assert calls[:3] == ["load", "train", "start 4"] and "from 4" in calls
    assert second.stage.seen == 9 + 2  # restored, then two updates


def test_the_stage_hears_of_applied_steps_only(tmp_path, world):
    """Once a step, whatever its micro batches; here the second of three steps is skipped."""
    made, _ = trainer(tmp_path, world, max_steps=3)
    applied = iter([True, True, True, False, True, True])  # of each micro batch
    made.engine.step = lambda loss: next(applied)
    made.run()
    assert made.stage.seen == 2


def test_more_epochs_extend_a_run_and_fewer_than_done_are_refused(tmp_path, world, capsys):
    trainer(tmp_path, world)[0].run()
    longer, calls = trainer(tmp_path, world, epochs=4)
    longer.run()
    lrs = [float(call.split()[1]) for call in calls if call.startswith("lr ")]
    expected = [longer.config.optim.lr_at(i, STEPS) for i in range(2 * STEPS, 4 * STEPS)]
    assert lrs == pytest.approx(expected, abs=0.005) and lrs[0] == pytest.approx(0.5, abs=0.01)  # half of the cosine
    assert has(capsys.readouterr().out, f"optim.epochs 2 -> 4 step {2 * STEPS} 4 epochs 5.00e-01")
    with pytest.raises(UserError, match=r"optim\.epochs is 3, but .* 4: give at least 4"):
        trainer(tmp_path, world, epochs=3)[0].run()
