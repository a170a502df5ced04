"""Segmentation from masks to predictions: training, resuming, ranks, evaluate, predict; bad input."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from finetune.evaluate import main as evaluate
from finetune.main import main
from finetune.predict import main as predict
from models.opening import open_weights
from tests.conftest import has, make_once, names, run, run_ranks
from tests.finetune.resuming import killed_and_resumed
from tests.finetune.tasks.segmentation.helpers import NAMES, config, png, scene, shards, source, weights_file
from tests.finetune.test_evaluate import call

SMALL = [
    "--task.name", "segmentation", "--task.width", 16, "--model.name", "convnextv2_atto", "--model.channels", 3,
    "--model.stem_stride", 1, "--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--data.size", "[32,40]",
    "--data.workers", 0, "--optim.precision", "fp32", "--run.device", "cpu", "--run.log_every", 1, "--init", "none",
    "--optim.batch_size", 6, "--optim.warmup_epochs", 0, "--augment.color_jitter", 0.2,
]  # fmt: skip


@pytest.fixture(scope="session")
def scenes(shared):
    """Shards of images of two sizes."""
    folder = make_once(shared / "scenes", lambda folder: shards(folder, sizes=((40, 56), (48, 40))))
    return folder / "shards"


def words(data, runs, name, *more, epochs=2):
    return [*SMALL, "--data.path", data, "--run.folder", runs, "--run.name", name, "--optim.epochs", epochs, *more]


def test_trained_evaluated_and_used(scenes, tmp_path, capsys):
    """It learns to tell red from blue; evaluate and predict agree with the run and with the truth."""
    more = ["--optim.lr", 0.2, "--optim.batch_size", 4, "--augment.ema", 0.5, "--task.loss", "ce+dice"]
    more += [
        "--task.auxiliary",
        0.4,
        "--task.class_weights",
        "balanced",
        "--model.drop_path",
        0.1,
        "--layer_decay",
        0.9,
    ]
    done = run("python", "finetune/main.py", *words(scenes, tmp_path, "x", *more, "--run.eval_every", 8, epochs=16))
    assert has(done.stdout, "3 classes val mIoU examples.png") or "examples.png" in names(tmp_path / "x")
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert {"confusion.png", "examples.png", "report.html", "best.pt"} <= names(tmp_path / "x")
    assert summary["best"]["miou"] > 0.6 and summary["best"]["images"] == 5
    best = tmp_path / "x/best.pt"
    weights = open_weights(best).weights
    assert weights.classes == NAMES and weights.task == "segmentation"

    call(evaluate, best, scenes, "--out", tmp_path / "e", "--workers", 0, "--batch", 2)
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert result["scores"]["miou"] == pytest.approx(summary["best"]["miou"], abs=1e-6)
    assert [row["name"] for row in result["classes"]] == NAMES and has(capsys.readouterr().out, "IoU square stripe")
    rows = list(csv.DictReader((tmp_path / "e/images.csv").read_text().splitlines()))
    assert len(rows) == 5 and float(rows[0]["miou"]) <= float(rows[-1]["miou"])

    image, mask = scene(7, 50, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:30]).save(tmp_path / "b.png")
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    outputs = ["--annotate", tmp_path / "p", "--csv", tmp_path / "p.csv", "--json", tmp_path / "p.json"]
    call(predict, best, *pictures, *outputs)
    found = np.asarray(Image.open(tmp_path / "p/00001-a.png"))
    assert found.shape == mask.shape and found.dtype == np.uint8
    assert (found == mask)[2:].mean() > 0.8
    assert names(tmp_path / "p") == {f"0000{n}{end}.png" for n in ("1-a", "2-b") for end in ("", "-overlay")}
    row = next(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert float(row["square"]) == pytest.approx((found == 1).mean())
    assert sum(c["share"] for c in json.loads((tmp_path / "p.json").read_text())[0]["classes"]) == pytest.approx(1)

    again = ["--init", best, "--optim.lr", 1e-12, "--task.auxiliary", 0.4, "--run.max_steps", 1]
    done = run("python", "finetune/main.py", *words(scenes, tmp_path, "y", *again))
    assert has(done.stdout, "head is kept")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(scenes, tmp_path):
    more = ["--augment.ema", 0.9, "--model.drop_path", 0.2, "--optim.micro_batch", 3, "--task.auxiliary", 0.4]
    *_, whole, killed = killed_and_resumed(lambda name: words(scenes, tmp_path, name, *more, epochs=5), tmp_path)
    assert all(killed[key] == whole[key] for key in ("epoch", "best", "last"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_scores_are_the_same_on_several_ranks(ranks, scenes, tmp_path):
    """Images of different sizes, in whichever batch."""
    weights_file(tmp_path / "x.pt", config("upernet", eval="slide", flips=True), (24, 32))
    call(evaluate, tmp_path / "x.pt", scenes, "--out", tmp_path / "1", "--workers", 0)
    options = ["--out", tmp_path / "n", "--workers", 0, "--device", "cpu", "--batch", 2]
    run_ranks(ranks, "finetune/evaluate.py", tmp_path / "x.pt", scenes, *options)
    one, several = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("1", "n"))
    assert one == several
    assert (tmp_path / "1/images.csv").read_bytes() == (tmp_path / "n/images.csv").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.path", "{digits}"], "has no masks --masks"),
        (["--augment.auto_augment", "3a"], "augment.auto_augment masks null"),
        (["--task.class_weights", "[1,2]"], "task.class_weights 2 3 classes"),
        (["--task.scale", "[2,1]"], "task.scale min <= max"),
        (["--task.head", "unet"], "task.head fpn upernet"),
    ],
)
def test_bad_input(more, message, scenes, digits, tmp_path, refused):
    more = [word.format(digits=digits) for word in more]
    assert has(refused(main, *words(scenes, tmp_path, "bad", *more)), message)
    assert not (tmp_path / "bad").exists()


def test_masks_without_a_pixel_of_a_class(tmp_path, refused):
    made = source(tmp_path / "source")
    for mask in (made / "labels/val").iterdir():
        mask.write_bytes(png(np.full((40, 56), 9, np.uint8)))
    more = ["--masks", "labels", "--mask-classes", made / "classes.txt", "--ignore", "9", "--workers", "1", "--no-plan"]
    run("python", "data/prepare.py", made, tmp_path / "shards", *more)
    assert has(refused(main, *words(tmp_path / "shards", tmp_path, "bad")), "split val no mask pixel class --ignore")


def test_a_plan_counts_the_loss(scenes, tmp_path):
    """Logits at full size are most of the memory: more classes or a larger head need more."""
    done = run("python", "finetune/main.py", *words(scenes, tmp_path, "x", "--parameters", "--dry-run"))
    assert has(done.stdout, "head.decoder activations") and not (tmp_path / "x").exists()


def test_classification_weights_are_refused_for_masks(scenes, tmp_path, refused):
    weights_file(tmp_path / "x.pt", config())
    assert has(refused(predict, tmp_path / "x.pt", tmp_path, "--classes", "names.txt"), "has class names")
