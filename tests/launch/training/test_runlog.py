"""The log of a run: means, and entries kept on resume."""

import json

import pytest
import torch

from launch.training import runlog
from launch.training.runlog import Mean, RunLog


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
        log.train(step, "epoch 1/1", losses(step), 0.1, 2.0)
    log.close()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_mean_over_the_interval(tmp_path, capsys):
    entries = write(tmp_path, [1, 2])
    assert [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries] == [(1, 1.5, 2), (2, 2.5, 2)]
    assert "step 2/10  loss 2.5000" in capsys.readouterr().out


def test_a_rate_of_crops_is_named_so(tmp_path, capsys):
    log = RunLog(tmp_path, {}, 10, 0, 32, active=True, unit="crop")
    log.train(1, "epoch 1/1", losses(1.0), 0.1, 2.0)
    log.close()
    entry = json.loads(log.path.read_text())
    assert entry["crops_per_s"] > 0 and "images_per_s" not in entry
    assert " crops/s  0:" in capsys.readouterr().out


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a killed process
    assert [entry["step"] for entry in write(tmp_path, [3, 4, 5], first_step=2)] == [1, 2, 3, 4, 5]


def test_the_time_of_a_run_goes_on(tmp_path):
    first = write(tmp_path, [1])
    assert 0 <= first[0]["seconds"] < 60
    (tmp_path / "log.jsonl").write_text(json.dumps(first[0] | {"seconds": 500.0}) + "\n")
    assert 500 <= write(tmp_path, [2], first_step=1)[1]["seconds"] < 560
    assert [entry["step"] for entry in write(tmp_path, [1])] == [1]  # no checkpoint: a new log


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_left_out(value, tmp_path):
    """The loss of a skipped step is not in the mean, and all lines are JSON."""
    log = RunLog(tmp_path, {}, 10, 0, 32, active=True)
    mixed = losses(1.0)
    mixed.add(torch.tensor(value))
    log.train(1, "", mixed, 0.1, value)
    log.train(2, "", losses(value), 0.1, 2.0)
    log.close()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines())
    assert first["loss"] == 1.5 and "grad_norm" not in first
    assert "loss" not in second and second["grad_norm"] == 2


def test_a_mean_goes_on_from_a_checkpoint(monkeypatch):
    """With the same number of ranks all restore their own part, otherwise the first takes the sum."""
    for ranks, expected in ((2, [[3, 2], [5, 1]]), (3, [[8, 3], [0, 0], [0, 0]])):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            mean = Mean(torch.device("cpu"))
            mean.load_state([[3.0, 2.0], [5.0, 1.0]], rank)
            assert mean.state() == expected[rank]
