"""Fine-tuning as a command: from pretrained weights and from scratch, resuming, bad input."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from configs.schema import Encoder, Optim
from data.index import index_folder
from data.pool import Pool
from data.sources import digits as digit_images
from finetune.main import main
from models.convnext import ConvNeXt
from models.formats.write import write_weights
from models.opening import open_weights
from models.weights import load_strict
from tests.conftest import QUICK, has, names, run, run_ranks
from tests.data.helpers import as_folder, as_tar
from tests.finetune.resuming import killed_and_resumed

SHAPE = ["--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]"]
RECIPE = [
    "--task.mixup",
    "0.5",
    "--task.cutmix",
    "0.5",
    "--augment.erase",
    "0.5",
    "--augment.ema",
    "0.9",
    "--layer_decay",
    "0.8",
]


def words(digits, runs, name, *more, epochs=2):
    return ["--data.path", digits, "--run.folder", runs, "--run.name", name, "--optim.epochs", epochs, *QUICK, *more]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_from_pretrained_weights(digits, pretrained, tmp_path):
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "x", "--init", pretrained / "fcmae.pt", *RECIPE))
    assert has(done.stdout, "val top-1 average best.pt")
    assert names(tmp_path / "x") == {
        "config.yaml", "log.jsonl", "tensorboard", "checkpoints", "best.pt", "last.pt", "summary.json", "report.html",
        "confusion.png", "calibration.png", "examples.png",
    }  # fmt: skip
    found = summary(tmp_path / "x")
    assert found["last"]["raw"]["images"] == found["last"]["ema"]["images"] == 355
    assert found["best"]["top1"] >= max(found["last"]["raw"]["top1"], found["last"]["ema"]["top1"])
    last = open_weights(tmp_path / "x/last.pt").weights
    model = ConvNeXt(last.arch, classes=10)
    load_strict(model, last.encoder | last.head, "last.pt")
    load_strict(model, last.ema, "last.pt")
    assert last.classes == [str(i) for i in range(10)]
    assert open_weights(tmp_path / "x/best.pt").weights.ema is None


def test_starts_from_the_pretrained_encoder(digits, pretrained, tmp_path):
    """With a learning rate near zero, the weights are those of the file."""
    run(
        "python",
        "finetune/main.py",
        *words(digits, tmp_path, "x", "--init", pretrained / "fcmae.pt", "--optim.lr", "1e-12", epochs=1),
    )
    init, last = open_weights(pretrained / "fcmae.pt").weights, open_weights(tmp_path / "x/last.pt").weights
    assert all(torch.allclose(last.encoder[name], tensor, atol=1e-9) for name, tensor in init.encoder.items())
    assert last.head["head.fc.weight"].std() == pytest.approx(0.02 * 0.001, rel=0.2)


def test_from_an_official_sparse_file(digits, pretrained, tmp_path):
    """From sparse weights to a dense classifier; the second time with other channels and a new head."""
    sparse = tmp_path / "checkpoint-799.pth"
    write_weights(sparse, open_weights(pretrained / "fcmae.pt").weights, "official-sparse")
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "x", "--init", sparse, epochs=1))
    assert has(done.stdout, f"{sparse} official-sparse")
    assert open_weights(tmp_path / "x/last.pt").weights.arch.dims == (8, 16, 16, 16)

    hub = tmp_path / "hub"
    write_weights(hub, open_weights(tmp_path / "x/best.pt").weights, "transformers")
    more = ["--init", hub, "--optim.lr", "1e-12", "--model.channels", "3"]
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "y", *more, epochs=1))
    assert has(done.stdout, "classifier 10 kept stem adapted")
    first, second = summary(tmp_path / "x")["best"], summary(tmp_path / "y")["best"]
    assert second["top1"] == pytest.approx(first["top1"], abs=0.05)  # statistics of three channels are ImageNet's


def test_from_scratch_takes_the_recipes_model(digits, tmp_path):
    done = run_ranks(2, "finetune/main.py", *words(digits, tmp_path, "x", "--init", "none", epochs=1))
    assert "scratch" in done.stdout
    arch = open_weights(tmp_path / "x/last.pt").weights.arch
    assert arch == Encoder("convnextv2_atto", 1, 1, (1, 1, 2, 1), (24, 48, 96, 192))
    assert summary(tmp_path / "x")["last"]["raw"]["images"] == 355  # exact on two ranks


def test_killed_and_resumed_equals_uninterrupted(digits, pretrained, tmp_path):
    more = ["--init", pretrained / "fcmae.pt", *RECIPE, "--model.drop_path", "0.2", "--optim.micro_batch", "120"]
    *_, whole, killed = killed_and_resumed(lambda name: words(digits, tmp_path, name, *more, epochs=4), tmp_path)
    assert all(killed[key] == whole[key] for key in ("epoch", "init", "best", "last"))


def test_a_finished_run_is_extended(digits, pretrained, tmp_path):
    """The added epochs follow the learning rate of the longer schedule; the first ones stay in the log."""
    more = ["--init", pretrained / "fcmae.pt", "--optim.warmup_epochs", "0", "--augment.ema", "0"]
    first = run("python", "finetune/main.py", *words(digits, tmp_path, "x", *more, epochs=1)).stdout
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "x", *more, epochs=2)).stdout
    assert "optim.epochs" not in first and has(done, "optim.epochs 1 -> 2 step 6 learning 2 epochs")
    entries = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    lrs = [entry["lr"] for entry in entries if "lr" in entry]
    keys = yaml.safe_load((tmp_path / "x/config.yaml").read_text())["optim"]
    short, long = (Optim(**keys | {"epochs": epochs}) for epochs in (1, 2))
    assert lrs == pytest.approx([short.lr_at(i, 6) for i in range(6)] + [long.lr_at(i, 6) for i in range(6, 12)])
    assert summary(tmp_path / "x")["epoch"] == 2


def test_a_class_without_validation_images_is_named(pretrained, tmp_path):
    """Before training, at its end and in the summary."""
    images = {f"{split}/{label}/{i}.png": data for i, (data, split, label) in enumerate(digit_images().values())}
    few = {name: data for name, data in images.items() if not name.startswith("val/7/")}
    folder = as_folder(few, tmp_path / "in")
    more = ["--init", pretrained / "fcmae.pt", "--run.max_steps", "1", "--augment.ema", "0"]
    lines = run("python", "finetune/main.py", *words(folder, tmp_path, "x", *more)).stdout.splitlines()
    named = [i for i, line in enumerate(lines) if has(line, "warning: 1 class no image val 7")]
    steps = [i for i, line in enumerate(lines) if "step 1/1" in line]
    assert len(named) == 2 and named[0] < steps[0] < named[1]
    assert summary(tmp_path / "x")["unseen_classes"] == ["7"] and has(summary(tmp_path / "x")["shown"], "no image 7")


def test_another_init_is_not_resumed(digits, pretrained, tmp_path):
    """The same run name with other initial weights is an error."""
    more = [
        "--model.depths",
        "[1,1,1,1]",
        "--model.dims",
        "[8,16,16,16]",
        "--data.mean",
        "[0.5]",
        "--data.std",
        "[0.5]",
    ]
    command = words(digits, tmp_path, "x", *more, epochs=1)
    run("python", "finetune/main.py", *command, "--init", pretrained / "fcmae.pt")
    before = (tmp_path / "x/summary.json").read_bytes()
    done = run("python", "finetune/main.py", *command, "--init", "none", code=2)
    assert has(done.stderr, "init_digest --run.name")
    assert (tmp_path / "x/summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init", "nowhere.pt"], "nowhere.pt exist"),
        (
            ["--init", "{pretrained}/fcmae.pt", "--model.name", "convnext_tiny"],
            "model.name convnextv2_atto convnext_tiny",
        ),
        (["--model.like", "none.yaml"], "none.yaml"),
        (["--eval_split", "test"], "test train val"),
        (["--augment.auto_augment", "v0"], "augment.auto_augment 3 channels 1"),
        (["--init", "{pretrained}/fcmae.pt", "--data.mean", "[0.1]"], "data.mean [0.5]"),
        (["--data.size", "30"], "data.size 30x30 patch"),
        (["--layer_decay", "2"], "layer_decay 2"),
        (["--task.mixp", "1"], "task.mixp task.mixup"),
    ],
)
def test_bad_input(more, message, digits, pretrained, tmp_path, refused):
    more = [word.format(pretrained=pretrained) for word in more]
    assert has(refused(main, *words(digits, tmp_path, "bad", *more)), message)
    assert not (tmp_path / "bad").exists()


def test_an_odd_micro_batch_is_not_mixed(digits, tmp_path):
    more = ["--task.mixup", "1", "--optim.batch_size", "3", "--optim.micro_batch", "3"]
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "bad", *more), code=2)
    assert "even" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


def test_shards_without_labels(pretrained, tmp_path, refused):
    run("python", "data/prepare.py", "--no-plan", "digits", tmp_path / "shards", "--no-labels")
    line = refused(main, *words(tmp_path / "shards", tmp_path, "x", *SHAPE))
    assert has(line, "train labels")


def test_weights_that_never_moved_are_no_result(tmp_path):
    """All images are NaN, so every step is skipped: exit code 2, and no best.pt."""
    members = {}
    for i in range(8):
        out = io.BytesIO()
        np.save(out, np.full((32, 32, 3), np.nan, np.float32))
        members |= {f"{i}.npy": out.getvalue(), f"{i}.cls": b"%d" % (i % 2)}
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        as_tar(members, tmp_path / f"shards/{split}-0.tar")
    index_folder(tmp_path / "shards", Pool(1))
    more = ["--init", "none", "--model.name", "convnextv2_atto", *SHAPE, "--data.size", 32, "--optim.batch_size", 4]
    done = run("python", "finetune/main.py", *words(tmp_path / "shards", tmp_path, "x", *more, epochs=1), code=2)
    assert has(done.stderr, "no step was applied all 2") and done.stderr.count("error: ") == 1
    assert not (tmp_path / "x/best.pt").exists() and not (tmp_path / "x/summary.json").exists()


def test_other_validation_images_are_refused_on_resume(digits, tmp_path):
    """Scores of the epochs before, which choose the best weights, are of the others."""
    run("python", "finetune/main.py", *words(digits, tmp_path, "x", "--init", "none", epochs=1))
    other = shutil.copytree(digits, tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    index["splits"]["val"][0]["sha256"] = "0" * 64
    (other / "index.json").write_text(json.dumps(index))
    command = words(other, tmp_path, "x", "--init", "none", epochs=2)
    assert has(run("python", "finetune/main.py", *command, code=2).stderr, "another configuration eval_digest")
