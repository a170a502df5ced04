"""The run's log: what it keeps on resume, and when it stops a run."""

import json

import pytest
import torch

from configs.errors import UserError
from launch import runlog
from launch.runlog import Mean, RunLog


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(runlog, "sum_over_ranks", lambda x: x)


def losses(value: float) -> Mean:
    mean = Mean(torch.device("cpu"))
    mean.add(torch.tensor(value))
    mean.add(torch.tensor(value + 1))
    return mean


def write(folder, steps, first_step=0):
    log = RunLog(folder, {"a": 1}, 10, first_step, 32, active=True)
    for step in steps:
        log.train(step, "epoch 1/1", losses(step), 0.1, torch.tensor(2.0))
    log.close()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_mean_over_the_interval(tmp_path, capsys):
    entries = write(tmp_path, [1, 2])
    assert [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries] == [(1, 1.5, 2), (2, 2.5, 2)]
    assert "step 2/10  loss 2.5000" in capsys.readouterr().out


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a killed process
    assert [entry["step"] for entry in write(tmp_path, [3, 4, 5], first_step=2)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value, tmp_path):
    with pytest.raises(UserError, match=r"at step 7: lower optim\.lr"):
        RunLog(tmp_path, {}, 10, 0, 32, active=False).train(7, "", losses(value), 0.1, torch.tensor(1.0))
