"""Regression as a command: training, ranks, resume, evaluation, prediction, export, bad input."""

import csv
import json
import re

import numpy as np
import onnxruntime
import pytest
from sklearn.metrics import r2_score

from finetune.main import main
from models.opening import open_weights
from tests.conftest import has, run, run_ranks
from tests.finetune.resuming import killed_and_resumed
from tests.finetune.tasks.helpers import summary, words

MORE = ["--augment.ema", "0.9", "--layer_decay", "0.8"]


@pytest.fixture(scope="module")
def trained(measured, tmp_path_factory):
    """Folder of a run of two numbers."""
    folder = tmp_path_factory.mktemp("numbers")
    run("python", "finetune/main.py", *words(measured, folder, "x", "numbers", *MORE, epochs=5))
    return folder / "x"


@pytest.fixture(scope="module")
def grades(graded, tmp_path_factory):
    """Folder of a run of grades, from classes that are numbers."""
    folder = tmp_path_factory.mktemp("grades")
    run("python", "finetune/main.py", *words(graded, folder, "x", "numbers", "--task.metric", "mae", epochs=4))
    return folder / "x"


def test_the_target_is_normalised_by_the_training_split(trained, source):
    with (source / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    weights = open_weights(trained / "best.pt").weights
    assert weights.task_config == {"names": ["value", "ink"], "limits": None}
    for i, name in enumerate(("value", "ink")):
        values = np.array([float(row[name]) for row in rows if row[name]])
        assert float(weights.head["head.mean"][i]) == pytest.approx(values.mean(), rel=1e-5)
        assert float(weights.head["head.std"][i]) == pytest.approx(values.std(), rel=1e-4)
    best = summary(trained)["best"]
    assert {"r2", "mae", "rmse", "r2_value", "mae_ink"} <= best.keys() and "kappa" not in best
    assert best["r2_ink"] > 0
    assert (trained / "scatter.png").exists() and (trained / "examples.png").exists()


def test_evaluation_equals_sklearn_on_any_number_of_ranks(trained, measured, tmp_path):
    out = [tmp_path / f"out{ranks}" for ranks in (1, 2, 3)]
    for ranks, folder in enumerate(out, 1):
        more = ["--out", folder, "--workers", 0, "--device", "cpu", "--batch", 16]
        run_ranks(ranks, "finetune/evaluate.py", trained / "best.pt", measured, *more)
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in out]
    assert results[0]["scores"] == results[1]["scores"] == results[2]["scores"]
    with (out[0] / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["value"]]
    truth, found = ([float(row[key]) for row in rows] for key in ("value", "predicted value"))
    assert results[0]["numbers"][0]["r2"] == pytest.approx(r2_score(truth, found), abs=1e-6)
    assert results[0]["numbers"][0]["images"] == len(rows) < 72 == results[0]["scores"]["images"]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(measured, tmp_path):
    found = killed_and_resumed(lambda name: words(measured, tmp_path, name, "numbers", *MORE, epochs=4), tmp_path)
    *_, whole, killed = found
    assert whole["best"] == killed["best"]


def test_grades_from_classes(grades, graded, tmp_path):
    """The best weights are those of the lowest MAE; predictions are rounded within 0 to 4."""
    log = [json.loads(line) for line in (grades / "log.jsonl").read_text().splitlines()]
    errors = [line["val_raw"]["mae"] for line in log if "val_raw" in line]
    assert summary(grades)["best"]["mae"] == min(errors) and "kappa" in summary(grades)["best"]
    assert open_weights(grades / "best.pt").weights.task_config == {"names": ["number"], "limits": [[0.0, 4.0]]}
    done = run("python", "finetune/evaluate.py", grades / "best.pt", graded, "--device", "cpu", "--out", tmp_path / "x")
    assert "kappa" in done.stdout
    found = json.loads((tmp_path / "x/evaluation.json").read_text())["scores"]
    assert found["kappa"] == pytest.approx(summary(grades)["best"]["kappa"], abs=1e-6)


def test_predictions_and_export_are_in_units_of_the_data(trained, grades, measured, source, tmp_path):
    images = [source / f"images/{i}.png" for i in range(3)]
    words = ["--csv", tmp_path / "x.csv", "--json", tmp_path / "x.json", "--annotate", tmp_path / "copies"]
    words += ["--cam", tmp_path / "cams", "--cam-of", "ink"]
    run("python", "finetune/predict.py", trained / "best.pt", *images, *words, "--device", "cpu")
    listed = json.loads((tmp_path / "x.json").read_text())
    assert all(95 < entry["numbers"]["value"] < 110 for entry in listed)
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == "path,value,ink"
    assert len(list((tmp_path / "cams").iterdir())) == 3
    words = ["--to", "onnx", "--images", measured, "--quantize", "int8", "--max-drop", "100"]
    done = run("python", "finetune/export.py", trained / "best.pt", tmp_path / "x.onnx", *words)
    assert re.search(r"r2 [\d.-]+ % in fp32, [\d.-]+ % in int8", done.stdout)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    (numbers,) = session.run(None, {"image": np.random.rand(2, 1, 8, 8).astype("float32")})
    assert (numbers[:, 0] > 95).all() and [x.name for x in session.get_outputs()] == ["numbers"]
    stored = json.loads(session.get_modelmeta().custom_metadata_map["convnext-fcmae.json"])
    assert stored["names"] == ["value", "ink"]
    done = run(
        "python", "finetune/predict.py", grades / "best.pt", *images, "--device", "cpu", "--tta", "hflip", "crops"
    )
    assert all(line.rstrip().endswith(")") for line in done.stdout.splitlines())


def test_bad_input(tagged, measured, digits, source, tmp_path, refused):
    assert has(refused(main, *words(tagged, tmp_path, "bad", "numbers")), "numbers labels --label-column")
    kappa = refused(main, *words(measured, tmp_path, "bad", "numbers", "--task.metric", "kappa"))
    assert has(kappa, "task.metric kappa one of mae")
    line = refused(main, *words(source / "images", tmp_path, "bad", "numbers", "--eval_split", "train"))
    assert has(line, "numbers none")


def test_classes_that_are_no_numbers(tmp_path, source, refused):
    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/1.png").symlink_to(source / "images/1.png")
    line = refused(main, *words(tmp_path / "in", tmp_path, "bad", "numbers", "--eval_split", "train"))
    assert has(line, "numbers cat --task.name classification")
