"""Damaged images in a real run: logged, replaced, counted; too many end it."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import has, losses, run
from tests.data.test_loader import damage
from tests.launch.training.helpers import Job, saved, train


def damaged_digits(digits, folder, split, *samples):
    shutil.copytree(digits, folder)
    damage(folder / f"{split}-000000.tar", *samples)
    return folder


def complaints(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["damaged"] for entry in lines if "damaged" in entry]


@pytest.mark.slow
def test_damaged_images_are_replaced_on_every_rank_alike(digits, tmp_path):
    shards = damaged_digits(digits, tmp_path / "shards", "train", 3, 50, 200)
    for name, ranks in (("one", 1), ("two", 2)):
        printed = train(shards, tmp_path / name, ranks, "--data.workers", "1", epochs=2)
        assert len([line for line in printed.splitlines() if has(line, "damaged replaced")]) == 3
    assert [x for _, x in losses(tmp_path / "two")] == pytest.approx([x for _, x in losses(tmp_path / "one")], rel=1e-4)
    for name in ("one", "two"):
        damaged = complaints(tmp_path / name)
        assert {entry["sample"] for entry in damaged} == {3, 50, 200}
        assert all("train-000000.tar" in entry["error"] for entry in damaged)


@pytest.mark.slow
def test_too_many_damaged_images_end_the_run_with_its_state_saved(digits, tmp_path):
    shards = damaged_digits(digits, tmp_path / "shards", "train", *range(0, 240, 2))
    with Job(shards, tmp_path / "run", 2, epochs=50) as job:
        assert job.end(120) == 2
        assert has(job.text(), "train damaged data.max_damaged 0.01")
        assert "--repair" in job.text() and not job.tracebacks()
        assert saved(job.folder)
    with Job(shards, tmp_path / "run", 0, "--data.max_damaged", ".2", "--resume", "must", epochs=2) as job:
        job.process.wait(120)
        assert "optim.epochs 50 -> 2" in job.text()
    with Job(shards, tmp_path / "run", 2, "--data.max_damaged", ".2", "--resume", "must", epochs=50) as job:
        job.wait_for_step(saved(job.folder)[-1] + 2)


def test_damaged_images_are_left_out_of_the_scores(digits, pretrained, tmp_path):
    shards = damaged_digits(digits, tmp_path / "shards", "val", 7)
    words = ["--data.path", shards, "--run.folder", tmp_path, "--run.name", "fine", "--optim.epochs", "1"]
    more = ["--optim.batch_size", "240", "--run.device", "cpu", "--data.workers", "0"]
    done = run("python", "finetune/main.py", "--init", pretrained / "fcmae.pt", *words, *more)
    assert has(done.stdout, "damaged val-000000.tar")
    assert json.loads((tmp_path / "fine/summary.json").read_text())["best"]["images"] == 354
    assert [entry["sample"] for entry in complaints(tmp_path / "fine")] == [7]
    assert np.isfinite([x for _, x in losses(tmp_path / "fine")]).all()
