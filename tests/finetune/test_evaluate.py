"""`finetune/evaluate.py`: against scikit-learn, on several ranks, class names, damage, bad input."""

import csv
import json
import os
import shutil
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Data, Encoder
from data.loader import eval_loader
from data.shard_index import Index, read_index, write_index
from data.shards import open_split
from data.sources import digits as digit_images
from data.transforms import EvalTransform, normalize
from finetune.evaluate import main
from finetune.tasks.classification.inference import ClassifierInference
from finetune.tasks.classification.scores import Predictions
from launch.training.world import destroy_world
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.opening import open_weights
from models.sparse.layouts import Dense
from models.weights import Weights, cpu_state, save, split_by_prefix
from tests.conftest import has, names, run, run_ranks
from tests.data.helpers import as_folder, as_zip
from tests.data.test_loader import damage
from tests.models.helpers import tiny

FILES = {"evaluation.json", "predictions.csv", "confusion.png", "calibration.png", "examples.png"}


def call(main, *words) -> None:
    """Call an entry point in this process, as one rank on one core."""
    with mock.patch.dict(os.environ), mock.patch("os.sched_getaffinity", return_value={0}):
        try:
            main([*map(str, words), "--device", "cpu"])
        finally:
            if torch.distributed.is_initialized():
                destroy_world()


def evaluated(weights: Path, data: Path, out: Path, *more) -> tuple[dict, list[dict]]:
    """(evaluation.json, rows of predictions.csv) of the command."""
    call(main, weights, data, "--out", out, "--workers", "0", *more)
    return content(out)


def content(out: Path) -> tuple[dict, list[dict]]:
    with (out / "predictions.csv").open(newline="") as file:
        return json.loads((out / "evaluation.json").read_bytes()), list(csv.DictReader(file))


@torch.no_grad()
def classifier(shards: Path, path: Path) -> Path:
    """Write a tiny classifier of the digits: random features, last layer by ridge regression."""
    split = open_split(Data(str(shards)))
    batch = next(iter(eval_loader(split, EvalTransform((8, 8), 1), 1, Data(workers=0), len(split))))
    model = ConvNeXt(Encoder("convnextv2_atto", 1, 1, (1, 1, 1, 1), (8, 16, 16, 32)), 10)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    image = normalize(batch["image"], torch.tensor([0.5]), torch.tensor([0.5]))
    features = model.head.norm(model.forward_features(image, Dense()).mean((1, 2)))
    targets = torch.nn.functional.one_hot(batch["label"], 10) - 0.1
    ridge = features.T @ features + 100 * torch.eye(features.shape[1])  # else rounding errors would be multiplied
    model.head.fc.weight.copy_(8 * torch.linalg.solve(ridge, features.T @ targets).T)
    head, encoder = split_by_prefix(cpu_state(model), "head.")
    image = Preprocessing((8, 8), 1, (0.5,), (0.5,), crop=1.0)
    save(path, Weights(model.arch, image, encoder, head=head, classes=split.classes))
    return path


def autoencoder(path: Path) -> Path:
    """Write an fcmae.pt."""
    model = FCMAE(*tiny())
    encoder, decoder = split_by_prefix(cpu_state(model), "encoder.")
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in encoder.items()}
    image = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    save(path, Weights(model.encoder.arch, image, encoder, decoder, asdict(model.config)))
    return path


@pytest.fixture(scope="module")
def best(digits, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return classifier(digits, tmp_path_factory.mktemp("weights") / "best.pt")


@pytest.fixture(scope="module")
def one_rank(best, digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one-rank")
    evaluated(best, digits, out)
    return out


def f1(label: list[str], first: list[str], name: str) -> float:
    found = [(a == name) + (b == name) for a, b in zip(label, first, strict=True)]
    return 2 * found.count(2) / (2 * found.count(2) + found.count(1))


def test_against_scikit_learn(one_rank, digits):
    found, rows = content(one_rank)
    scores, images = found["scores"], open_split(Data(str(digits)), "val")
    assert [int(row["sample"]) for row in rows] == list(range(355))
    label, first = ([row[key] for row in rows] for key in ("label", "top1"))
    assert label == [images.classes[i] for i in images.labels()]
    assert all(row["name"].startswith(f"val/{row['label']}/") for row in rows)
    assert scores["images"] == 355 and scores["top1"] == pytest.approx(accuracy_score(label, first))
    assert 0.8 < scores["top1"] < 1
    five = [row["label"] in [row[f"top{i}"] for i in range(1, 6)] for row in rows]
    assert scores["top5"] == pytest.approx(np.mean(five))
    assert scores["loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows]))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, first))
    assert scores["macro_f1"] == pytest.approx(np.mean([f1(label, first, name) for name in set(label)]))
    matrix = np.zeros((10, 10), int)
    for row in found["confusions"]:
        matrix[int(row["label"]), int(row["predicted"])] = row["images"]
    matrix += np.diag([round(row["accuracy"] * row["images"]) for row in found["classes"]])
    assert np.array_equal(matrix, confusion_matrix(label, first, labels=images.classes))
    error = 0.0
    confidence = np.array([float(row["confidence"]) for row in rows])
    for low in np.arange(15) / 15:  # the definition
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(
                np.mean(np.array(label)[inside] == np.array(first)[inside]) - confidence[inside].mean()
            )
    assert scores["calibration_error"] == pytest.approx(error, rel=1e-5)


def test_files_and_console(best, digits, tmp_path, capsys):
    weights = shutil.copy(best, tmp_path / "best.pt")
    call(main, weights, digits, "--workers", "0")
    assert names(tmp_path / "evaluation-digits-val-best") == FILES
    for picture in ("confusion.png", "calibration.png"):
        Image.open(tmp_path / "evaluation-digits-val-best" / picture).verify()
    shown = capsys.readouterr().out
    found, _ = content(tmp_path / "evaluation-digits-val-best")
    assert f"{100 * found['scores']['top1']:.2f} %" in shown and "confusions" in shown
    assert len(found["classes"]) == 10


def test_results_of_other_data_or_settings_are_not_overwritten(best, tmp_path, monkeypatch):
    """The folder is named after the data; the same command again, also with other paths, writes to the same one."""
    weights = shutil.copy(best, tmp_path / "best.pt")
    some = {name: data for name, (data, split, label) in digit_images().items() if split == "val" and label in "38"}
    for place in ("a/digits", "b/digits"):
        as_folder(some, tmp_path / place)
    as_zip(some, tmp_path / "more.zip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.tasks.classification.pictures.write_pictures", lambda *_: None)  # slow
    for data, more in (
        ("a/digits", []), ("b/digits", []), ("more.zip", []), ("a/digits", ["--tta", "hflip"]),
        (tmp_path / "a/digits", []), ("b/digits/", []),
    ):  # fmt: skip
        call(main, weights, data, "--workers", "0", *more)
    folders = {path.name: content(path)[0] for path in tmp_path.glob("evaluation-*")}
    assert {name: (Path(found["data"]).name, found["tta"]) for name, found in folders.items()} == {
        "evaluation-digits-val-best": ("digits", []), "evaluation-digits-val-best-2": ("digits", []),
        "evaluation-more-val-best": ("more.zip", []), "evaluation-digits-val-best-3": ("digits", ["hflip"]),
    }  # fmt: skip


def test_classes_of_the_model_without_images_are_named(best, tmp_path, capsys):
    some = {name: data for name, (data, split, label) in digit_images().items() if split == "val" and label != "7"}
    found, _ = evaluated(best, as_folder(some, tmp_path / "in"), tmp_path / "out")
    assert found["without_images"] == ["7"] and has(capsys.readouterr().out, "1 class has no image val 7")


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 3))])
def test_any_number_of_ranks_writes_the_same_bytes(ranks, best, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "shards")
    damage(tmp_path / "shards/val-000000.tar", 7, 30)
    evaluated(best, tmp_path / "shards", tmp_path / "alone")
    words = ["finetune/evaluate.py", best, tmp_path / "shards", "--out", tmp_path / "out", "--device", "cpu"]
    run_ranks(ranks, *words, "--workers", "0")
    assert names(tmp_path / "out") == FILES
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_folder_scores_like_its_shards(best, one_rank, tmp_path):
    folder = as_folder({name: data for name, (data, *_) in digit_images().items()}, tmp_path / "in")
    found, rows = evaluated(best, folder, tmp_path / "out")
    expected, other = content(one_rank)
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    assert {row["name"]: row["top1"] for row in rows} == {row["name"]: row["top1"] for row in other}


def with_classes(best, path, classes):
    weights = open_weights(best).weights
    weights.classes = classes
    save(path, weights)
    return path


def test_classes_in_another_order_are_matched_by_name(best, digits, one_rank, tmp_path, capsys):
    weights = open_weights(best).weights
    order = torch.randperm(10)
    weights.head |= {f"head.fc.{kind}": weights.head[f"head.fc.{kind}"][order] for kind in ("weight", "bias")}
    weights.classes = [weights.classes[i] for i in order]
    save(tmp_path / "x.pt", weights)
    found, rows = evaluated(tmp_path / "x.pt", digits, tmp_path / "out")
    expected, other = content(one_rank)
    assert has(capsys.readouterr().out, "name 10")
    assert found["scores"] == pytest.approx(expected["scores"])
    assert [row["top1"] for row in rows] == [row["top1"] for row in other]


def test_data_with_some_of_the_models_classes(best, one_rank, tmp_path):
    some = {name: data for name, (data, split, label) in digit_images().items() if split == "val" and label in "38"}
    found, rows = evaluated(best, as_folder(some, tmp_path / "in"), tmp_path / "out")
    assert [row["name"] for row in found["classes"]] == ["3", "8"]
    expected = {row["name"]: row["top1"] for row in content(one_rank)[1]}
    assert {row["name"]: row["top1"] for row in rows} == {name: expected[name] for name in some}


def test_weights_without_class_names(best, digits, one_rank, tmp_path, capsys):
    found, _ = evaluated(with_classes(best, tmp_path / "x.pt", None), digits, tmp_path / "out")
    assert has(capsys.readouterr().out, "x.pt class names number")
    assert found["scores"] == content(one_rank)[0]["scores"] and found["classes"][3]["name"] == "3"


def test_neither_has_class_names(best, digits, one_rank, tmp_path):
    shutil.copytree(digits, tmp_path / "shards")
    write_index(tmp_path / "shards", Index(read_index(digits).splits, None))
    weights = with_classes(best, tmp_path / "x.pt", None)
    found, _ = evaluated(weights, tmp_path / "shards", tmp_path / "out")
    assert found["scores"] == content(one_rank)[0]["scores"] and found["classes"][3]["name"] == "3"


def test_averaged_weights(best, digits, one_rank, tmp_path):
    weights = open_weights(best).weights
    weights.ema = weights.encoder | weights.head
    weights.head = {name: torch.zeros_like(tensor) for name, tensor in weights.head.items()}
    save(tmp_path / "last.pt", weights)
    call(main, tmp_path / "last.pt", digits, "--ema", "--workers", "0")
    found, _ = content(tmp_path / "evaluation-digits-val-last-ema")
    assert found["scores"] == content(one_rank)[0]["scores"]


def test_damaged_images_are_left_out_and_named(best, digits, one_rank, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "shards")
    damage(tmp_path / "shards/val-000000.tar", 7, 30)
    found, rows = evaluated(best, tmp_path / "shards", tmp_path / "out", "--batch", "31")
    expected = content(one_rank)[1]
    assert found["scores"]["images"] == 353
    assert [row["sample"] for row in found["damaged"]] == [7, 30]
    assert "val-000000.tar" in found["damaged"][0]["error"]
    assert has(capsys.readouterr().out, f"damaged {expected[7]['name']}")
    left = [row for row in expected if row["sample"] not in ("7", "30")]
    assert [row["top1"] for row in rows] == [row["top1"] for row in left]


def test_many_classes_take_no_square_of_memory():
    """22K classes: a dense matrix of 8-byte numbers would be 3.8 GB."""
    rng = np.random.default_rng(0)
    label, first = rng.integers(22_000, size=(2, 5000))
    found = Predictions(np.arange(5000), label, first[:, None], *np.full((2, 5000), 0.5, np.float32))
    weights = SimpleNamespace(classes=[str(i) for i in range(22_000)])
    preprocessing = SimpleNamespace(size=(8, 8), crop=1.0, interpolation="bicubic")
    inference = ClassifierInference(SimpleNamespace(path="best.pt", weights=weights, preprocessing=preprocessing))
    tracemalloc.start()
    stored = inference.evaluation(found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert sum(row["images"] for row in stored["confusions"]) == (label != first).sum()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["{best}", "{digits}", "--size", "33"], "data.size 33x33 patch"),
        (["{best}", "{digits}", "--size", "big"], "--size big"),
        (["{best}", "{digits}", "--split", "test"], "test train val"),
        (["{best}", "{digits}", "--batch", "0"], "--batch 0"),
        (["{best}", "{digits}", "--ema"], "averaged --ema"),
        (["{best}", "nowhere"], "nowhere exist"),
        (["nowhere.pt", "{digits}"], "nowhere.pt exist"),
        (["{fcmae}", "{digits}"], "{fcmae} classifier"),
        (["{others}", "{digits}"], "classes {others} 0, 9 10 a, 1, 2, 3, 4,"),
        (["{best}", "{plain}"], "plain val labels finetune/predict.py"),
        (["{best}", "{short}"], "val label 9 2 class names"),
        (["{unnamed}", "{pair}"], "2 {unnamed} 10 names"),
    ],
)
def test_bad_input(more, message, best, digits, tmp_path):
    place = {"best": best, "digits": digits} | {
        name: tmp_path / name for name in ("fcmae", "others", "unnamed", "plain", "pair", "short")
    }
    autoencoder(place["fcmae"])
    with_classes(best, place["others"], ["a", *"12345678", "b"])
    with_classes(best, place["unnamed"], None)
    pictures = [data for data, *_ in digit_images().values()][:2]
    as_folder({"0.png": pictures[0]}, place["plain"])
    as_folder({"a/0.png": pictures[0], "b/0.png": pictures[1]}, place["pair"])
    shutil.copytree(digits, place["short"])
    write_index(place["short"], Index(read_index(digits).splits, ["a", "b"]))
    with pytest.raises(UserError) as error:
        call(main, *(word.format(**place) for word in more), "--out", tmp_path / "out")
    assert has(error.value, message.format(**place)) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow(best, digits, tmp_path):
    weights = open_weights(best).weights
    weights.head["head.fc.weight"][:] = 3e38
    save(tmp_path / "x.pt", weights)
    with pytest.raises(UserError, match=r"finite.*fp32"):
        evaluated(tmp_path / "x.pt", digits, tmp_path / "out")


def test_a_mistake_is_one_line(digits, tmp_path):
    path = autoencoder(tmp_path / "fcmae.pt")
    done = run("python", "finetune/evaluate.py", path, digits, code=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert has(done.stderr, f"{path} classifier python finetune/main.py --init {path}")
