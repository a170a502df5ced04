"""Model cards: what the files of a run say, and nothing that should stay on the machine."""

import json
from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from models.convert import main
from models.formats.card import model_card
from models.formats.write import write_weights
from models.weights import Weights, save
from tests.conftest import has
from tests.models.formats.helpers import SMALL, autoencoder, classifier

SECRETS = ("sekret", "AKIA", "/home", "s3:", "signature")
SUMMARY = {
    "stage": "fine-tuning", "epoch": 5, "epochs": 5, "init": "/home/sekret/fcmae.pt",
    "best": {"epoch": 4, "weights": "ema", "top1": 91.25, "top5": 99.5, "per_class": [1, 2]},
    "last": {"raw": {"top1": 88.5, "per_class": [1]}, "ema": {"top1": 90.5}},
    "seconds": 1234, "hardware": "NVIDIA H100 x 8",
    "config": {
        "init": "/home/sekret/fcmae.pt", "resume": "auto",
        "data": {"path": "s3://AKIA:sekret@bucket/photos?signature=1", "split": "train", "cache": "/home/sekret/c"},
        "model": {"name": "convnextv2_atto", "like": "/home/sekret/r.yaml"},
        "optim": {"lr": 0.001, "betas": [0.9, 0.95]},
        "task": {"name": "classification"}, "run": {"folder": "/home/sekret/runs", "name": "x"},
    },
}  # fmt: skip


def written(folder, weights: Weights, summary: dict | None = SUMMARY, license_id: str | None = "mit", name="x") -> str:
    save(folder / "best.pt", weights)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return model_card(weights, str(folder / "best.pt"), "transformers", name, "load()", license_id)


def test_a_fine_tuned_classifier(tmp_path):
    card = written(tmp_path, classifier(**SMALL))
    about = huggingface_hub.ModelCard(card).data
    assert (about.license, about.library_name, about.pipeline_tag) == ("mit", "transformers", "image-classification")
    for part in ('"data": "photos"', '"class 4"', "91.25", "99.5", "lr: 0.001", "1,234 seconds", "H100", "load()"):
        assert part in card, part
    assert not any(secret in card for secret in SECRETS) and "per_class" not in card
    assert "fcmae.pt" in card.split("## Licence")[1]  # whose licence may apply too


def test_the_last_epoch(tmp_path):
    save(tmp_path / "last.pt", classifier(**SMALL))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    card = model_card(classifier(**SMALL), str(tmp_path / "last.pt"), "timm", "x", "load()", None)
    assert "88.5" in card and "90.5" in card and "91.25" not in card


def test_a_pretraining(tmp_path):
    summary = {"stage": "pretraining", "loss": {"1": 0.9, "2": 0.5}, "knn": {"0": 10.0, "2": 40.5}, "linear": {},
               "config": {"init": "none", "model": {"name": "convnextv2_atto"}}}  # fmt: skip
    card = written(tmp_path, autoencoder(**SMALL), summary)
    result = json.loads(card.split("## Result")[1].split("```json")[1].split("```")[0])
    assert result == {"loss": 0.5, "knn": 40.5} and "image-feature-extraction" in card
    assert "may apply too" not in card


def test_a_teacher_is_named_where_licences_are(tmp_path):
    objective = {"name": "teacher", "teacher": "/home/sekret/dino.pt"}
    config = {"init": "none", "model": {"name": "convnextv2_atto"}, "objective": objective}
    card = written(tmp_path, autoencoder(**SMALL), {"stage": "pretraining", "config": config})
    assert has(card.split("## Licence")[1], "may apply too dino.pt") and "sekret" not in card


@pytest.mark.parametrize(
    "summary", [None, {}, {"config": 1}, {"config": {"model": {"name": "convnext_tiny"}}}, {"config": {"model": 3}}]
)
def test_nothing_recorded(summary, tmp_path):
    card = written(tmp_path, classifier(**SMALL), summary, None)
    assert card.count("Not recorded in the weights") == 2 and "license: unknown" in card
    assert has(card.split("## Licence")[1], "Not given")


def test_a_damaged_summary(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    assert "Not recorded" in written(tmp_path, classifier(**SMALL), None)


HOSTILE = ["```\n# x", "<script>", "---\nlicense: mit", "| a |", "\x1b[31m", "[x](javascript:1)"]


def test_names_have_no_effect(tmp_path):
    """Of classes, data and settings, which files supply."""
    weights = replace(classifier(classes=len(HOSTILE), **SMALL), classes=HOSTILE)
    config = SUMMARY["config"] | {"task": {"name": HOSTILE[0]}, "data": {"path": "x/" + HOSTILE[2]}}
    card = written(tmp_path, weights, SUMMARY | {"config": config, "hardware": HOSTILE[1]}, None, "title")
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown" and "\x1b" not in card
    outside, fence = [], None
    for line in card.splitlines():
        mark = line[: len(line) - len(line.lstrip("`"))]
        if fence is None and len(mark) >= 3:
            fence = mark
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None and not any("script" in line or line in ("# x", "| a |") for line in outside)


def test_many_classes(tmp_path):
    weights = classifier(classes=150, **SMALL)
    card = written(tmp_path, weights)
    assert "150 classes, of which these are the first 100" in card and "class 149" not in card


@pytest.mark.parametrize(
    ("words", "remark"),
    [(["--to", "transformers"], "warning license: unknown"), (["--to", "timm", "--license", "cc-by-nc-4.0"], None)],
)
def test_convert_writes_it(words, remark, tmp_path, monkeypatch, capsys):
    write_weights(tmp_path / "best.pt", classifier(**SMALL), "ours")
    monkeypatch.setattr("sys.argv", ["convert.py", str(tmp_path / "best.pt"), str(tmp_path / "out"), *words])
    main()
    card, printed = (tmp_path / "out/README.md").read_text(), capsys.readouterr().out
    assert has(printed, remark) if remark else "warning" not in printed
    assert ("license: unknown" if remark else "license: cc-by-nc-4.0") in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["y.pt", "--to", "ours", "--push", "a/b"], "--push folders transformers"),
        (["y.safetensors", "--to", "timm", "--license", "mit"], "--license folders timm suffix"),
        (["y", "--to", "timm", "--license", "My Own"], "--license My Own mit"),
        (["y", "--to", "timm", "--push", "b"], "--push b USER/REPO"),
        (["y", "--to", "timm", "--push", "a/b/c"], "--push a/b/c USER/REPO"),
        (["y", "--to", "timm", "--push", "hf_secretsecret/b"], "--push USER/REPO"),
    ],
)
def test_bad_options(words, message, tmp_path, refused):
    write_weights(tmp_path / "x.pt", classifier(**SMALL), "ours")
    text = refused(main, str(tmp_path / "x.pt"), str(tmp_path / words[0]), *words[1:])
    assert has(text, message) and "secretsecret" not in text and not (tmp_path / words[0]).exists()
