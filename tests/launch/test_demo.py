"""The demo, run as a user does, in a copy of the checkout."""

import csv
import json
import os
import shutil
import subprocess

import onnxruntime
import pytest
import torch

from data.decode import decode
from data.shards import Split
from data.transforms import EvalTransform, to_float
from models.opening import open_classifier
from tests.conftest import ROOT, run


@pytest.mark.slow
def test_demo(tmp_path):
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "shards", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored)
    (project / ".venv").symlink_to(ROOT / ".venv")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # on all cores
    for attempt in ("first", "again"):
        done = subprocess.run(
            ["bash", "launch/demo.sh"], cwd=project, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{attempt}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "done before" in done.stdout
    summary = json.loads((project / "runs/demo/summary.json").read_text())
    scores = {"finetune_top1", "scratch_top1", "segmentation_miou"}
    assert summary.keys() == {"pretrain_loss_first", "pretrain_loss_last", "seconds"} | scores
    assert summary["segmentation_miou"] >= 0.8
    assert summary["finetune_top1"] >= 0.97
    assert summary["pretrain_loss_last"] < 0.5 * summary["pretrain_loss_first"]
    assert (project / "runs/demo/reconstruction.png").stat().st_size > 10_000
    check_results_agree(project, tmp_path)


def check_results_agree(project, folder):
    """evaluate, predict and the exported model give the same results on all validation images."""
    best, shards = project / "runs/demo/finetune/best.pt", project / "shards/digits"
    run("python", "finetune/evaluate.py", best, shards, "--out", folder / "evaluation")
    with (folder / "evaluation/predictions.csv").open() as file:
        evaluated = list(csv.DictReader(file))
    split = Split(shards, "val")
    assert len(evaluated) == len(split) == 355
    (folder / "images").mkdir()
    for i in range(len(split)):
        (folder / f"images/{i:04}.png").write_bytes(split.read(i)[0])
    run("python", "finetune/predict.py", best, folder / "images", "--top", "10", "--json", folder / "predicted.json")
    predicted = json.loads((folder / "predicted.json").read_text())
    run("python", "finetune/export.py", best, folder / "x.onnx", "--to", "onnx", "--images", shards)
    session, trained = onnxruntime.InferenceSession(str(folder / "x.onnx")), open_classifier(str(best))
    transform = EvalTransform.of(trained.preprocessing)
    images = torch.stack([to_float(transform(decode(split.read(i)[0], 1))["image"]) for i in range(len(split))])
    logits = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    for row, pairs, shares in zip(evaluated, predicted, logits.softmax(1).tolist(), strict=True):
        first, *_ = pairs["classes"]
        assert row["top1"] == first["name"] and abs(float(row["confidence"]) - first["probability"]) < 1e-4
        assert all(abs(pair["probability"] - shares[int(pair["name"])]) < 1e-4 for pair in pairs["classes"])
    scores = json.loads((folder / "evaluation/evaluation.json").read_text())["scores"]
    summary = json.loads((project / "runs/demo/finetune/summary.json").read_text())
    assert scores["top1"] == summary["best"]["top1"] and abs(scores["loss"] - summary["best"]["loss"]) < 1e-4
