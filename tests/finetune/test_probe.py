"""The probe as a command: scores, ranks, other formats, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from configs.command import parse_options
from configs.errors import UserError
from configs.feature_eval import LRS
from configs.schema import Data
from data.decode import decode
from data.shards import open_split
from data.sources import digits as digit_images
from data.transforms import center_crop
from finetune import probe
from models.convnext import ConvNeXt
from models.formats.write import write_weights
from models.opening import open_weights
from models.sparse.layouts import Dense
from models.weights import save
from tests.conftest import has, run
from tests.data.helpers import as_folder, as_tar, as_zip
from tests.data.test_catalog import as_table
from tests.data.test_prepare import prepared
from tests.finetune.test_evaluate import call

FAST = ["--workers", "0", "--device", "cpu", "--batch", "240"]
SETTINGS = ["--epochs", "20", "--crop", "1"]


def scores(weights, digits, out, *more, program=("python",)) -> tuple[dict, str]:
    """(written scores, printed output) of the command."""
    done = run(*program, "finetune/probe.py", weights, digits, *FAST, "--out", out, *more)
    assert str(out) in done.stdout
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def probed(pretrained, digits, tmp_path_factory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("probe") / "probe.json"
    return scores(
        pretrained / "fcmae.pt", digits, out, "--random", "--epochs", "20", "--crop", "1", "--k", "20", "5000"
    )


def test_scores(probed, pretrained, digits):
    """kNN equals scikit-learn's on features computed image by image."""
    weights = open_weights(pretrained / "fcmae.pt").weights
    encoder = ConvNeXt(weights.arch)
    encoder.load_state_dict(weights.encoder)
    parts = []
    for name in ("train", "val"):
        split = open_split(Data(path=str(digits)), name)
        read = [split.read(i) for i in range(len(split))]
        image = torch.stack([center_crop(decode(data, 1), (24, 24), 1) for data, _ in read])
        with torch.no_grad():
            tokens = encoder.forward_features((image / 255 - 0.5) / 0.5, Dense())
        parts.append((tokens.mean((1, 2)).numpy(), [label for _, label in read]))
    judge = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = judge.fit(*parts[0]).score(*parts[1])
    found, _ = probed
    assert found["knn"].keys() == {"20"} and found["knn"]["20"]["top1"] == pytest.approx(expected, abs=0.003)
    assert (found["train_images"], found["eval_images"], found["classes"]) == (1442, 355, 10)
    assert found["settings"]["crop"] == 1 and found["settings"]["size"] == [24, 24]


def test_the_best_learning_rate_is_that_of_the_held_out_images(probed):
    linear = probed[0]["linear"]
    assert [row["lr"] for row in linear["grid"]] == list(LRS)
    assert linear["held_out"] == max(row["held_out"] for row in linear["grid"])
    assert {key: linear[key] for key in linear["grid"][0]} in linear["grid"]


def test_random_weights(probed):
    found, text = probed
    assert found["random"]["knn"]["20"] != found["knn"]["20"] and found["random"]["eval_images"] == 355
    assert found["random"]["linear"]["top1"] < found["linear"]["top1"]
    assert "random" in text and f"{found['linear']['top1']:.2%}" in text
    assert has(text, "5000 train 1,442")


def test_deepspeeds_launcher_adds_a_rank():
    assert parse_options(probe.Options, "", ["--local_rank=1", "x.pt", "shards"]).weights == "x.pt"


@pytest.mark.slow
def test_two_ranks(pretrained, digits, probed, tmp_path):
    more, launcher = [*SETTINGS, "--no-linear", "--k", "20"], ("deepspeed", "--num_gpus", "2")
    found, text = scores(pretrained / "fcmae.pt", digits, tmp_path / "two.json", *more, program=launcher)
    assert found["settings"]["ranks"] == 2 and found["knn"] == probed[0]["knn"]
    assert "linear" not in found and text.count("kNN, k 20") == 1


def test_another_format(pretrained, digits, probed, tmp_path):
    write_weights(tmp_path / "timm.safetensors", open_weights(pretrained / "fcmae.pt").weights, "timm")
    found, text = scores(tmp_path / "timm.safetensors", digits, tmp_path / "timm.json", *SETTINGS, "--k", "10", "20")
    assert found["linear"] == probed[0]["linear"]
    assert found["knn"]["20"] == probed[0]["knn"]["20"] and found["knn"].keys() == {"10", "20"}
    assert "random" not in text


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar, as_table])
def test_without_a_split_val_a_tenth_is_held_out(make, pretrained, tmp_path, capsys):
    found = enumerate(digit_images().values())
    images = {f"{label}/{i}.png": data for i, (data, split, label) in found if split == "val" and label in "01"}
    prefix = "train/" if make is as_table else ""  # its column of splits
    source = make({f"{prefix}{name}": data for name, data in images.items()}, tmp_path / "in")
    words = [pretrained / "fcmae.pt", source, "--k", "5", "--no-linear", "--workers", "0", "--out", tmp_path / "x.json"]
    call(probe.main, *words)
    found = json.loads((tmp_path / "x.json").read_text())
    assert has(capsys.readouterr().out, f"{source} val held a tenth of train")
    total = found["train_images"] + found["eval_images"]
    assert total == len(images) and found["eval_images"] == -(-total // 10)
    assert found["eval_split"] == "a tenth of train" and found["knn"]["5"]["top1"] > 0.5
    with pytest.raises(UserError, match="no split val"):
        call(probe.main, *words, "--eval-split", "val")


def test_shards_without_a_split_val(pretrained, tmp_path, capsys):
    found = enumerate(digit_images().values())
    images = {f"{label}/{i}.png": data for i, (data, split, label) in found if split == "val" and label in "01"}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "shards")
    call(probe.main, pretrained / "fcmae.pt", tmp_path / "shards", "--k", "5", "--no-linear", "--workers", "0")
    assert has(capsys.readouterr().out, "a tenth of train")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "0"], "--k 0"),
        (["--lrs", "0.1", "-1"], "--lrs -1 above 0"),
        (["--temperature", "0"], "--temperature 0"),
        (["--crop", "2"], "--crop 2 most"),
        (["--size", "30"], "data.size 30x30 patch 8"),
        (["--eval-split", "test"], "test train val"),
        (["--eval-split", "train"], "--eval-split train --train-split"),
        (["--images", "9"], "9 images 10 --no-linear"),
        (["--out", "nowhere/x.json"], "nowhere folder"),
        (["--ema"], "averaged"),
        (["--workers", "-1"], "--workers -1"),
        (["--kk", "1"], "--kk"),
    ],
)
def test_bad_input(more, message, pretrained, digits):
    with pytest.raises(UserError) as error:
        probe.main([str(pretrained / "fcmae.pt"), str(digits), *more])
    assert has(error.value, message)


def test_weights_without_statistics(pretrained, digits, tmp_path):
    weights = open_weights(pretrained / "fcmae.pt").weights
    weights.preprocessing = replace(weights.preprocessing, mean=None, std=None)
    save(tmp_path / "bare.pt", weights)
    with pytest.raises(UserError, match=r"bare\.pt.* 1 channels"):
        probe.main([str(tmp_path / "bare.pt"), str(digits)])
