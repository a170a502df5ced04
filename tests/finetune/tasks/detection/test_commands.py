"""Detection as commands: training, resume, evaluation, prediction, export; bad input."""

import csv
import io
import json
import shutil
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.decode import decode
from finetune import evaluate, export, predict
from finetune.main import main
from finetune.tasks import make_inference
from models.opening import open_classifier, open_weights
from tests.conftest import has, losses, names, run, run_ranks
from tests.finetune.resuming import killed_and_resumed
from tests.finetune.tasks.detection.helpers import NAMES, QUICK, make_shards

MASKS = ["--task.masks", "true"]


def words(shards, runs, name, *more, epochs=2):
    place = ["--data.path", shards, "--run.folder", runs, "--run.name", name, "--optim.epochs", epochs]
    return [*place, "--init", "none", *QUICK, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, the pictures they are from, and a trained Mask R-CNN, `mask`, and Faster R-CNN, `box`."""
    folder = tmp_path_factory.mktemp("detection")
    shards = make_shards(folder)
    for name, more in (("mask", MASKS), ("box", ["--augment.ema", "0.5", "--augment.color_jitter", "0.2"])):
        run("python", "finetune/main.py", *words(shards, folder, name, *more, epochs=8))
    return folder


def test_files_and_scores_of_a_run(folder):
    assert names(folder / "mask") == {
        "config.yaml", "log.jsonl", "tensorboard", "checkpoints", "best.pt", "last.pt", "summary.json", "report.html",
        "examples.png",
    }  # fmt: skip
    summary = json.loads((folder / "mask/summary.json").read_text())
    assert {"ap", "ap50", "ap75", "mask_ap", "mask_ap50", "images", "boxes"} <= summary["best"].keys()
    assert summary["best"]["images"] == 7 and "AP50" in summary["shown"]
    weights = open_weights(folder / "mask/best.pt").weights
    assert weights.classes == NAMES and weights.task == "detection" and weights.task_config["ids"] == [1, 2]
    first, last = (sum(loss for _, loss in part) for part in np.split(losses(folder / "mask"), [4])[:2])
    assert losses(folder / "mask")[-1][1] < losses(folder / "mask")[0][1], (first, last)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path):
    """torchvision samples proposals at random: the generator is seeded in each step."""
    more = ["--model.drop_path", "0.2", "--augment.ema", "0.9", "--optim.micro_batch", "2", *MASKS]
    command = partial(words, folder / "shards", tmp_path)
    *_, whole, killed = killed_and_resumed(lambda name: command(name, *more, epochs=4), tmp_path)
    assert all(killed[key] == whole[key] for key in ("epoch", "best", "last"))


def test_any_number_of_ranks_evaluates_alike_and_as_pycocotools(folder, tmp_path):
    command = ["finetune/evaluate.py", folder / "mask/best.pt", folder / "shards", "--batch", "2", "--device", "cpu"]
    for ranks in (1, 2, 3):
        run_ranks(ranks, *command, "--out", tmp_path / str(ranks))
    files = ("evaluation.json", "predictions.json", "examples.png")
    for ranks in (2, 3):
        assert all((tmp_path / str(ranks) / f).read_bytes() == (tmp_path / "1" / f).read_bytes() for f in files)
    result = json.loads((tmp_path / "1/evaluation.json").read_text())
    found = json.loads((tmp_path / "1/predictions.json").read_text())
    truth = json.loads((folder / "scenes/val.json").read_text())
    number = {f"val/{entry['file_name']}": entry["id"] for entry in truth["images"]}
    of = {entry["id"]: number[entry["file_name"]] for entry in found["images"]}
    results = [{**entry, "image_id": of[entry["image_id"]]} for entry in found["annotations"]]
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        with redirect_stdout(io.StringIO()):
            reference = COCO(folder / "scenes/val.json")
            keep = [{k: v for k, v in entry.items() if kind == "segm" or k != "segmentation"} for entry in results]
            evaluation = COCOeval(reference, reference.loadRes(keep), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for i, name in enumerate(("ap", "ap50", "ap75")):
            assert result["scores"][prefix + name] == pytest.approx(evaluation.stats[i], abs=1e-6)
        mean = np.mean([row[f"{prefix}ap50"] for row in result["classes"]])
        assert mean == pytest.approx(result["scores"][f"{prefix}ap50"], abs=1e-6)
    assert result["scores"]["ap50"] > 0, "nothing was learnt, so nothing is compared"
    assert [row["name"] for row in result["classes"]] == NAMES


def test_damaged_samples_are_left_out(folder, tmp_path):
    """A damaged json is a damaged sample; the others are evaluated."""
    source = folder / "shards"
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        if file.name == "val-000000.tar":
            data = data.replace(b'"box": [', b'"bux": [', 1)
        (shards / file.name).write_bytes(data)
    more = ["--device", "cpu", "--out", tmp_path / "out"]
    done = run("python", "finetune/evaluate.py", folder / "box/best.pt", shards, *more)
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert result["scores"]["images"] == 6 and len(result["damaged"]) == 1 and "damaged, left out" in done.stdout


def test_predictions_of_pictures(folder, tmp_path):
    files = {"--json": tmp_path / "p.json", "--csv": tmp_path / "p.csv", "--annotate": tmp_path / "drawn"}
    more = [word for pair in files.items() for word in pair]
    pictures = folder / "scenes/val"
    done = run(
        "python",
        "finetune/predict.py",
        folder / "mask/best.pt",
        pictures,
        "--min-score",
        "0.1",
        "--device",
        "cpu",
        *more,
    )
    with redirect_stdout(io.StringIO()):
        found = COCO(tmp_path / "p.json")
    assert len(found.imgs) == 7 and found.anns and [c["name"] for c in found.dataset["categories"]] == NAMES
    for entry in found.anns.values():
        x, y, w, h = entry["bbox"]
        assert min(x, y) >= 0 and x + w <= 80.001 and y + h <= 60.001 and 0 < entry["score"] <= 1
        assert entry["segmentation"]["size"] == [60, 80]
    table = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert len(table) == sum(entry["score"] >= 0.1 for entry in found.anns.values())
    assert len(done.stdout.splitlines()) == 7 and len(names(tmp_path / "drawn")) == 7
    drawn = np.asarray(Image.open(sorted((tmp_path / "drawn").iterdir())[-1]))
    assert drawn.shape == (60, 80, 3)
    out = run("python", "data/prepare.py", pictures, tmp_path / "again", "--boxes", tmp_path / "p.json", "--dry-run")
    assert has(out.stdout, "7 of 7 images")  # predictions are annotations to correct


@pytest.mark.parametrize(
    ("name", "to"),
    [
        pytest.param("mask", "onnx", marks=pytest.mark.slow),
        ("box", "torch-export"),
        pytest.param("mask", "torchscript", marks=pytest.mark.slow),
        pytest.param("mask", "torch-export", marks=pytest.mark.slow),
        pytest.param("box", "onnx", marks=pytest.mark.slow),
        pytest.param("box", "torchscript", marks=pytest.mark.slow),
    ],
)
def test_export(name, to, folder, tmp_path):
    """NMS is inside; outputs equal those of the model on real images."""
    out = tmp_path / f"x{ {'onnx': '.onnx', 'torchscript': '.pt', 'torch-export': '.pt2'}[to] }"
    done = run(
        "python", "finetune/export.py", folder / name / "best.pt", out, "--to", to, "--images", folder / "shards"
    )
    assert has(done.stdout, "wrote 1x3x64x96 objects in common")
    if to != "onnx":
        return
    session = onnxruntime.InferenceSession(str(out))
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "labels", *(["masks"] * (name == "mask"))]
    task = make_inference(open_classifier(folder / name / "best.pt"))
    image = task.transform(decode((folder / "scenes/val/val04.png").read_bytes()))["image"][None].float() / 255
    boxes, scores, *_ = session.run(None, {"image": image.numpy()})
    trained = task.trained
    with torch.no_grad():
        expected = trained.model((image - trained.mean[:, None, None]) / trained.std[:, None, None])
    assert np.allclose(scores, expected[1], atol=1e-4) and (scores > 0).sum() > 3
    assert np.allclose(boxes[scores > 0.2], expected[0][expected[1] > 0.2], atol=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--augment.auto_augment", "v0"], "augment.auto_augment boxes null"),
        (["--task.jitter", "[2,1]"], "task.jitter"),
        (["--task.metric", "mask_ap"], "task.metric task.masks"),
        (["--data.size", "[64,90]"], "data.size 64x90"),
    ],
)
def test_bad_settings(more, message, folder, tmp_path, refused):
    assert has(refused(main, *words(folder / "shards", tmp_path, "bad", *more)), message)
    assert not (tmp_path / "bad").exists()


def test_bad_data(folder, digits, tmp_path, refused):
    line = refused(main, *words(digits, tmp_path, "bad"))
    assert has(line, "no boxes --boxes")
    line = refused(evaluate.main, folder / "box/best.pt", digits)
    assert has(line, "no boxes --boxes")
    line = refused(evaluate.main, folder / "box/best.pt", folder / "scenes")
    assert has(line, "no boxes --boxes")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_box(split, folder, tmp_path, refused):
    """Images without boxes are negatives, but without any box there is nothing to learn or to score."""
    source = tmp_path / "scenes"
    shutil.copytree(folder / "scenes", source)
    content = json.loads((source / f"{split}.json").read_text())
    (source / f"{split}.json").write_text(json.dumps(content | {"annotations": []}))
    boxes = ["--boxes", source / "train.json", "--val-boxes", source / "val.json"]
    run("python", "data/prepare.py", source, tmp_path / "shards", *boxes, "--workers", "1", "--no-plan")
    assert has(refused(main, *words(tmp_path / "shards", tmp_path, "bad")), f"split {split} no image has a box")
    assert not (tmp_path / "bad").exists()


def test_images_that_were_not_annotated(folder, tmp_path, refused):
    source = folder / "scenes"
    run(
        "python",
        "data/prepare.py",
        source,
        tmp_path / "part",
        "--boxes",
        source / "train.json",
        "--workers",
        "1",
        "--no-plan",
    )
    assert has(refused(main, *words(tmp_path / "part", tmp_path, "bad")), "val 7 not annotated")


def test_options_of_other_tasks(folder, tmp_path, refused):
    line = refused(export.main, folder / "box/best.pt", tmp_path / "x.safetensors", "--to", "safetensors",
                   "--images", folder / "shards")  # fmt: skip
    assert has(line, "timm --to")
    line = refused(predict.main, folder / "box/best.pt", folder / "scenes/val", "--classes", "names.txt")
    assert has(line, "--classes")


def test_another_start(folder, tmp_path):
    """The head of a detector is kept with the same classes and settings; --dry-run plans the run."""
    command = words(folder / "shards", tmp_path, "x", "--optim.lr", "1e-12", epochs=1)
    command[command.index("none")] = folder / "box/best.pt"
    done = run("python", "finetune/main.py", *command)
    assert "detection head is kept" in done.stdout
    best, last = open_weights(folder / "box/best.pt").weights, open_weights(tmp_path / "x/last.pt").weights
    assert all(torch.allclose(last.head[name], tensor, atol=1e-6) for name, tensor in best.head.items())
    command[command.index("x")] = "y"
    done = run("python", "finetune/main.py", *command, "--task.width", "8", "--run.max_steps", "1")
    assert "head is replaced" in done.stdout
    done = run("python", "finetune/main.py", *command, "--dry-run", "2")
    assert has(done.stdout, "activations head.roi")


def test_a_share_of_the_images(folder, tmp_path):
    done = run(
        "python", "finetune/main.py", *words(folder / "shards", tmp_path, "x", "--task.label_share", "0.5", epochs=1)
    )
    assert "6 images" in done.stdout


def test_two_ranks_train(folder, tmp_path):
    done = run_ranks(2, "finetune/main.py", *words(folder / "shards", tmp_path, "x", *MASKS, epochs=1))
    assert (
        has(done.stdout, "best AP50") and json.loads((tmp_path / "x/summary.json").read_text())["best"]["images"] == 7
    )
