"""Comparison of exported detectors: objects are counted, and those of unlikely proposals are found too."""

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from finetune.exporters.comparison import compare
from finetune.tasks import make_inference
from models.opening import open_classifier, open_weights
from models.weights import save
from tests.conftest import has, run
from tests.finetune.tasks.detection.helpers import QUICK, make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards and a detector whose proposals are all unlikely: sigmoid(-30)."""
    folder = tmp_path_factory.mktemp("detection")
    place = ["--data.path", make_shards(folder), "--run.folder", folder, "--run.name", "box", "--optim.epochs", "2"]
    run("python", "finetune/main.py", *place, "--init", "none", *QUICK)
    weights = open_weights(folder / "box/best.pt").weights
    name = next(name for name in weights.head if name.endswith("cls_logits.bias"))
    save(folder / "unlikely.pt", replace(weights, head=weights.head | {name: weights.head[name] - 30}))
    return folder


def test_unlikely_proposals(folder, tmp_path):
    """The sigmoid of onnxruntime ends at 0, that of torch does not."""
    images = ["--images", folder / "shards"]
    done = run("python", "finetune/export.py", folder / "unlikely.pt", tmp_path / "x.onnx", "--to", "onnx", *images)
    count = done.stdout.partition(" objects in common")[0].split("have ")[1].split(" of ")
    assert count[0] == count[1] != "0" and "NMS" not in done.stdout


def objects(count, moved=0, missing=0):
    """Boxes, scores and labels of an image, some moved by half of it; missing ones have score 0."""
    boxes = torch.tensor([[i, i, i + 5, i + 5] for i in range(count)], dtype=torch.float32)
    boxes[:moved] += 32
    scores = torch.linspace(0.9, 0.3, count)
    scores[count - missing :] = 0
    return [boxes[None], scores[None], torch.zeros(1, count, dtype=torch.int64)]


def test_objects_are_counted(folder):
    difference = make_inference(open_classifier(folder / "box/best.pt")).difference
    images, model = [torch.zeros(1, 3, 64, 96)], [objects(40)]

    def text(found, expected=model):
        return compare(expected, lambda _: found, images, False, "x.onnx", difference, True)

    assert text(objects(40)) == "have 40 of 40 objects in common, which differ by at most 0.0e+00"
    assert has(text(objects(40, moved=1)), "have 39 of 41 objects in common others NMS")
    assert has(text(objects(40, missing=1)), "have 39 of 40 objects in common others NMS")
    assert has(text(objects(40), [objects(40, missing=1)]), "have 39 of 40 objects in common others NMS")
    with pytest.raises(UserError, match="finds 3 of 40 objects elsewhere"):
        text(objects(40, missing=3))
    with pytest.raises(UserError, match="finds 40 of 40"):
        text([torch.full_like(part, torch.nan) if part.is_floating_point() else part for part in objects(40)])
    assert has(text(objects(2, missing=2), [objects(2, missing=2)]), "no object to compare")
