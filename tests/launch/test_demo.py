"""The demo, as a user starts it, in a copy of the checkout."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_demo(tmp_path):
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "shards", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored)
    (project / ".venv").symlink_to(ROOT / ".venv")
    for attempt in ("first", "again"):
        done = subprocess.run(["bash", "launch/demo.sh"], cwd=project, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{attempt}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "done before" in done.stdout
    summary = json.loads((project / "runs/demo/summary.json").read_text())
    assert summary.keys() == {"pretrain_loss_first", "pretrain_loss_last", "finetune_top1", "scratch_top1", "seconds"}
    assert summary["finetune_top1"] >= 0.97
    assert summary["pretrain_loss_last"] < 0.5 * summary["pretrain_loss_first"]
    assert (project / "runs/demo/reconstruction.png").stat().st_size > 10_000
