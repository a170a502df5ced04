"""Skipped steps and damaged images: counts, log entries, limits."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from launch.training import faults, runlog
from launch.training.faults import Faults
from launch.training.runlog import RunLog


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "gather", lambda value: [value])
    monkeypatch.setattr(runlog, "sum_over_ranks", lambda x: x)
    made = RunLog(tmp_path, {}, 10, 0, 32, active=True)
    yield made
    made.close()


def entries(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def part(loss, *samples):
    return torch.tensor(loss), torch.tensor(samples)


def test_a_skipped_step_names_its_samples(log):
    found = Faults(2, 0.1, [], log)
    found.skip(7, [part(1.0, 5, 3), part(float("nan"), 9, 8)])
    found.skip(8, [part(1.0, 5, 3), part(2.0, 9, 8)])
    assert entries(log) == [
        {"step": 7, "skipped": {"not_finite": "loss", "samples": [8, 9]}},
        {"step": 8, "skipped": {"not_finite": "gradient", "samples": [3, 5, 8, 9]}},
    ]
    with pytest.raises(UserError, match=r"3 steps .* 9 .*optim\.max_skipped 2"):
        found.skip(9, [part(float("inf"), 1)])


def test_applied_steps_begin_a_new_row_and_the_count_survives(log):
    found = Faults(1, 0.1, [], log)
    for step in range(5):
        found.skip(step, [part(float("nan"), 1)])
        found.applied()
    found.skip(5, [part(float("nan"), 1)])
    again = Faults(1, 0.1, [], log)
    again.load_state(json.loads(json.dumps(found.state())))
    assert again.skipped == 6
    with pytest.raises(UserError):
        again.skip(6, [part(float("nan"), 1)])


def test_a_run_without_an_applied_step_is_refused(log):
    found = Faults(9, 0.1, [], log)
    for step in range(3):
        found.skip(step, [part(float("nan"), 1)])
    with pytest.raises(UserError, match=r"no step was applied: .* all 3"):
        found.check_applied(3)
    found.check_applied(4)
    Faults(9, 0.1, [], log).check_applied(0)


def loader(size):
    split = type("Split", (), {"name": "train", "shards": [1], "__len__": lambda self: size})()
    return SimpleNamespace(
        samples=SimpleNamespace(split=split, describe_damage=lambda sample: f"sample {sample} is cut")
    )


def batch(*samples, damaged=()):
    return {"sample": torch.tensor(samples), "damaged": torch.tensor([sample in damaged for sample in samples])}


def test_damaged_images_are_named_once_and_counted(log):
    source = loader(100)
    splits = [source.samples.split]
    found = Faults(1, 0.02, splits, log)
    found.note_damaged(source, batch(1, 2))
    assert not found.unreported
    found.note_damaged(source, batch(3, 4, damaged=[4]))
    found.note_damaged(source, batch(4, 5, damaged=[4]))
    found.report_damaged(10)
    found.note_damaged(source, batch(4, 5, damaged=[4, 5]))
    found.report_damaged(20)
    reported = [entry["damaged"]["sample"] for entry in entries(log)]
    assert reported == [4, 5] and entries(log)[0]["damaged"]["error"] == "sample 4 is cut"
    again = Faults(1, 0.02, splits, log)
    again.load_state(json.loads(json.dumps(found.state())))
    again.note_damaged(source, batch(4, 6, damaged=[4, 6]))
    with pytest.raises(UserError, match=r"3 of 100 images .*train.* data\.max_damaged 0\.02"):
        again.report_damaged(30)
