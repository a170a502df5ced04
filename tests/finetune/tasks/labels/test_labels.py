"""Several labels per image as a command: training, ranks, resume, evaluation, prediction, export, bad input."""

import csv
import json
import re

import numpy as np
import onnxruntime
import pytest
from sklearn.metrics import average_precision_score

from finetune.main import main
from models.opening import open_weights
from tests.conftest import has, run, run_ranks
from tests.finetune.resuming import killed_and_resumed
from tests.finetune.tasks.helpers import shards, summary, words

MORE = ["--augment.ema", "0.9", "--task.threshold", "best", "--task.class_weights", "0.5", "--layer_decay", "0.8",
        "--model.drop_path", "0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tagged, tmp_path_factory):
    """Folder of a run."""
    folder = tmp_path_factory.mktemp("labels")
    done = run("python", "finetune/main.py", *words(tagged, folder, "x", "labels", *MORE, epochs=4))
    assert has(done.stdout, "1 image without labels left out") and "F1" in done.stdout
    return folder / "x"


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_stores_names_and_thresholds(trained):
    best, weights = summary(trained)["best"], open_weights(trained / "best.pt").weights
    assert best["map"] > 0.5 and best["images"] == 72
    assert weights.classes == ["even", "large", "nine"] and weights.task == "labels"
    thresholds = weights.task_config["thresholds"]
    assert len(thresholds) == 3 and all(0 <= x <= 1 for x in thresholds) and thresholds != [0.5] * 3
    assert (trained / "examples.png").exists() and "Examples" in (trained / "report.html").read_text()


def test_evaluation_equals_sklearn_on_any_number_of_ranks(trained, tagged, tmp_path):
    out = [tmp_path / f"out{ranks}" for ranks in (1, 2, 3)]
    for ranks, folder in enumerate(out, 1):
        more = ["--out", folder, "--workers", 0, "--device", "cpu", "--batch", 16]
        run_ranks(ranks, "finetune/evaluate.py", trained / "best.pt", tagged, *more)
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in out]
    assert results[0]["scores"] == results[1]["scores"] == results[2]["scores"]
    assert results[0]["scores"]["map"] == pytest.approx(summary(trained)["best"]["map"], abs=1e-6)
    table = rows(out[0] / "predictions.csv")
    names = open_weights(trained / "best.pt").weights.classes
    truth = np.array([[name in row["labels"].split("|") for name in names] for row in table])
    probability = np.array([[float(row[name]) for name in names] for row in table])
    expected = average_precision_score(truth, probability, average=None)
    found = [row["average_precision"] for row in results[0]["labels"]]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_ranks_train_alike_and_score_alike(tagged, tmp_path):
    for ranks in (1, 2, 3):
        run_ranks(ranks, "finetune/main.py", *words(tagged, tmp_path, f"{ranks}", "labels", epochs=1))
    found = [summary(tmp_path / str(ranks))["last"]["raw"] for ranks in (1, 2, 3)]
    assert all(values["images"] == 72 for values in found)
    assert found[1]["map"] == pytest.approx(found[0]["map"], abs=0.02)  # sums of gradients differ in their last digits


def test_killed_and_resumed_equals_uninterrupted(tagged, tmp_path):
    found = killed_and_resumed(lambda name: words(tagged, tmp_path, name, "labels", *MORE, epochs=4), tmp_path)
    whole, killed, whole_summary, killed_summary = found
    assert whole.task_config == killed.task_config
    assert whole_summary["best"] == killed_summary["best"]


def test_predictions_and_export(trained, tagged, source, tmp_path):
    images = [source / f"images/{i}.png" for i in (2, 9)]
    more = ["--csv", tmp_path / "x.csv", "--json", tmp_path / "x.json", "--annotate", tmp_path / "copies"]
    more += ["--cam", tmp_path / "cams"]
    done = run("python", "finetune/predict.py", trained / "best.pt", *images, *more, "--device", "cpu")
    weights = open_weights(trained / "best.pt").weights
    table, listed = rows(tmp_path / "x.csv"), json.loads((tmp_path / "x.json").read_text())
    for row, entry, line in zip(table, listed, done.stdout.splitlines(), strict=True):
        above = {
            name for name, threshold in zip(weights.classes, weights.task_config["thresholds"], strict=True)
            if float(row[name]) >= threshold
        }  # fmt: skip
        assert set(row["labels"].split("|")) - {""} == above == {label["name"] for label in entry["labels"]}
        assert all(name in line for name in above) and (above or "none" in line)
    assert len(list((tmp_path / "copies").iterdir())) == len(list((tmp_path / "cams").iterdir())) == 2
    words = ["--to", "onnx", "--images", tagged, "--quantize", "int8", "--max-drop", "100"]
    done = run("python", "finetune/export.py", trained / "best.pt", tmp_path / "x.onnx", *words)
    assert re.search(r"map [\d.]+ % in fp32, [\d.]+ % in int8, on 72 images", done.stdout)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    stored = json.loads(session.get_modelmeta().custom_metadata_map["convnext-fcmae.json"])
    assert stored["classes"] == weights.classes and stored["thresholds"] == weights.task_config["thresholds"]


def test_views_are_averaged(trained, tagged, tmp_path):
    more = ["--workers", 0, "--device", "cpu", "--out"]
    run("python", "finetune/evaluate.py", trained / "best.pt", tagged, *more, tmp_path / "a")
    run("python", "finetune/evaluate.py", trained / "best.pt", tagged, *more, tmp_path / "b", "--tta", "hflip", "crops")
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text())["scores"] for name in "ab")
    assert one["map"] != two["map"] and one["images"] == two["images"]


def test_its_weights_start_other_runs(trained, tagged, graded, tmp_path):
    """The head is kept for the same labels; another task takes the encoder."""
    more = ["--init", trained / "best.pt", "--optim.lr", "1e-12"]
    done = run("python", "finetune/main.py", *words(tagged, tmp_path, "again", "labels", *more, epochs=1))
    assert "head of 3 labels is kept" in done.stdout
    assert summary(tmp_path / "again")["best"]["map"] == pytest.approx(summary(trained)["best"]["map"], abs=1e-5)
    done = run("python", "finetune/main.py", *words(graded, tmp_path, "grades", "classification", *more, epochs=1))
    assert "5 classes" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task.metric", "top1"], "task.metric top1 one of f1_macro"),
        (["--task.threshold", "2"], "task.threshold"),
        (["--task.mixup", "1"], "task.mixup"),
        (["--data.folds", "1"], "data.folds 1"),
        (["--data.folds", "3", "--data.fold", "3"], "data.fold 3 3"),
    ],
)
def test_bad_keys(more, message, tagged, tmp_path, refused):
    assert has(refused(main, *words(tagged, tmp_path, "bad", "labels", *more)), message)


def test_data_of_another_kind(measured, graded, tagged, source, tmp_path, refused):
    assert has(refused(main, *words(measured, tmp_path, "bad", "labels")), "labels numbers --label-column")
    assert has(refused(main, *words(graded, tmp_path, "bad", "labels")), "labels none --label-column")
    assert has(
        refused(main, *words(source / "images", tmp_path, "bad", "labels", "--eval_split", "train")), "labels none"
    )
    assert has(refused(main, *words(tagged, tmp_path, "bad", "classification")), "without labels classification")


def test_labels_that_the_model_lacks(trained, source, tmp_path):
    table = (source / "table.csv").read_text().replace("nine", "ten")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/images").symlink_to(source / "images")
    (tmp_path / "in/table.csv").write_text(table)
    other = shards(tmp_path / "in", tmp_path / "other", "tags")
    done = run("python", "finetune/evaluate.py", trained / "best.pt", other, "--device", "cpu", code=2)
    assert has(done.stderr, "labels lacks ten") and done.stderr.count("\n") == 1
