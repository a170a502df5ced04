"""Pretraining as a command: files, ranks, resuming, bad input."""

import json
import re
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.formats.write import write_weights
from models.opening import open_weights
from pretrain.main import main
from tests.conftest import QUICK, ROOT, TINY, has, losses, names, run, run_ranks, started
from tests.data.helpers import as_folder, collection


def words(digits, runs, name, *more, epochs=2):
    return [
        "--data.path",
        digits,
        "--run.folder",
        runs,
        "--run.name",
        name,
        "--optim.epochs",
        epochs,
        *TINY,
        *QUICK,
        *more,
    ]


def test_files_of_a_run(pretrained):
    assert names(pretrained) == {
        "config.yaml",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "fcmae.pt",
        "reconstruction.png",
        "summary.json",
        "report.html",
    }
    assert [step for step, _ in losses(pretrained)] == list(range(1, 13))
    assert all(np.isfinite(loss) and 0.1 < loss < 3 for _, loss in losses(pretrained))
    assert yaml.safe_load((pretrained / "config.yaml").read_text())["model"]["dims"] == [8, 16, 16, 16]
    assert np.asarray(Image.open(pretrained / "reconstruction.png")).std() > 20
    weights = open_weights(pretrained / "fcmae.pt").weights
    assert weights.arch.dims == (8, 16, 16, 16) and weights.arch.name == "convnextv2_atto"
    assert weights.decoder_config["mask_ratio"] == 0.6 and {"mask_token", "pred.weight"} < weights.decoder.keys()


def test_summary(pretrained):
    found = json.loads((pretrained / "summary.json").read_text())
    assert (found["stage"], found["epochs"], found["steps"], found["knn"]) == ("pretraining", 2, 12, {})
    logged = [loss for _, loss in losses(pretrained)]
    assert found["loss"] == {"1": pytest.approx(np.mean(logged[:6])), "2": pytest.approx(np.mean(logged[6:]))}
    assert found["feature_distance"]["2"].keys() == {f"stage_{i}" for i in (1, 2, 3, 4)}
    assert all(0.2 < value < 0.6 for value in found["feature_distance"]["2"].values())
    assert found["images_per_s"]["2"] > 0
    assert found["seconds"] > 0 and found["hardware"].endswith((" core", " cores"))
    assert found["config"] == yaml.safe_load((pretrained / "config.yaml").read_text())


def test_tensorboard(pretrained):
    events = EventAccumulator(str(pretrained / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "grad_norm", "images_per_s", "feature_distance/stage_4"} <= set(tags["scalars"])
    assert len(events.Scalars("loss")) == 12 and all(event.value > 0 for event in events.Scalars("grad_norm"))
    assert len(tags["images"]) == 1


@pytest.mark.slow
def test_clipping_is_the_same_with_and_without_zero(digits, pretrained, tmp_path):
    found = []
    for stage in (0, 1):
        more = ["--optim.clip_grad", "0.01", "--optim.zero_stage", stage]
        run("python", "pretrain/main.py", *words(digits, tmp_path, stage, *more, epochs=1))
        found.append([loss for _, loss in losses(tmp_path / str(stage))])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[1] != [loss for _, loss in losses(pretrained)[:6]]  # AdamW hardly minds, but it is not the same


slow = pytest.mark.slow


@pytest.mark.parametrize("zero_stage", [0, 1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
def test_two_ranks_and_accumulation_give_the_losses_of_one(zero_stage, digits, pretrained, tmp_path):
    more = ["--optim.micro_batch", "60", "--optim.zero_stage", zero_stage]
    run_ranks(2, "pretrain/main.py", *words(digits, tmp_path, "two", *more))
    one, two = losses(pretrained), losses(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)


def test_the_masked_backend_gives_the_same_losses(digits, pretrained, tmp_path):
    run("python", "pretrain/main.py", *words(digits, tmp_path, "masked", "--model.backend", "masked"))
    assert [x for _, x in losses(tmp_path / "masked")] == pytest.approx([x for _, x in losses(pretrained)], rel=1e-4)


def test_killed_and_resumed_equals_uninterrupted(digits, tmp_path):
    run("python", "pretrain/main.py", *words(digits, tmp_path, "whole", epochs=4))
    command = ["pretrain/main.py", *words(digits, tmp_path, "killed", epochs=4)]
    first = started(tmp_path / "output", *command)
    checkpoints, deadline = tmp_path / "killed/checkpoints", time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/fcmae.pt").exists()
    done = run("python", *command, "--resume", "must")
    assert "resuming" in done.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (open_weights(tmp_path / name / "fcmae.pt").weights for name in ("whole", "killed"))
    assert all(torch.equal(tensor, killed.encoder[name]) for name, tensor in whole.encoder.items())
    assert len(list(checkpoints.glob("step-*"))) == 2  # run.keep

    again = run("python", *command)  # finished: nothing more to do
    assert "wrote" in again.stdout and losses(tmp_path / "killed") == losses(tmp_path / "whole")
    (checkpoints / "step-00000024/manifest.json").unlink()  # a checkpoint that is not complete does not count
    done = run("python", *command)
    assert "step-00000018" in done.stdout and losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_folder_of_images_resumes_exactly(tmp_path):
    """Without shards: the losses after a stop are those of an uninterrupted run, whatever is added to the folder.

    Files that are gone are named and replaced. Two ranks read the list of the first one.
    """
    folder = as_folder(collection({"train/cat": 9, "train/dog": 8}), tmp_path / "photos")
    more = ["--data.size", "32", "--optim.batch_size", "4", "--model.channels", "3"]

    def command(name, *extra):
        return "pretrain/main.py", *words(folder, tmp_path, name, *more, *extra)

    run("python", *command("whole"))
    run("python", *command("stopped", "--run.max_steps", "3"))
    run_ranks(2, *command("damaged", "--run.max_steps", "3"))
    as_folder(collection({"train/new": 3}), folder)
    assert len(losses(tmp_path / "stopped")) == 3
    resumed = run("python", *command("stopped", "--resume", "must")).stdout
    assert has(resumed, "17 images, listed in") and (tmp_path / "stopped/collection.npz").exists()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    for number in range(5):  # at least one of them is in the rest of the run
        (folder / f"train/cat/{number}.jpg").unlink()
    found = run("python", *command("damaged", "--resume", "must", "--data.max_damaged", "1"))
    assert re.search(r"replaced by another image: .*train/cat/\d\.jpg\): cannot be read", found.stdout)
    for (step, loss), (same, whole) in zip(losses(tmp_path / "damaged")[:3], losses(tmp_path / "whole"), strict=False):
        assert step == same and loss == pytest.approx(whole, rel=1e-4)


def test_continues_from_official_weights(digits, pretrained, tmp_path):
    """From the official sparse file of a finished run, the first loss is close to that run's last one."""
    sparse = tmp_path / "sparse.pth"
    write_weights(sparse, open_weights(pretrained / "fcmae.pt").weights, "official-sparse")
    done = run("python", "pretrain/main.py", *words(digits, tmp_path, "on", "--init", sparse, epochs=1))
    assert has(done.stdout, f"{sparse} official-sparse")
    before, after = losses(pretrained), losses(tmp_path / "on")
    assert abs(after[0][1] - before[-1][1]) < 0.5 * abs(after[0][1] - before[0][1])
    again = words(digits, tmp_path, "on", "--init", pretrained / "fcmae.pt", epochs=1)
    assert "init_digest" in run("python", "pretrain/main.py", *again, code=2).stderr


def test_bf16_autocast_trains(digits, tmp_path):
    run("python", "pretrain/main.py", *words(digits, tmp_path, "bf16", "--optim.precision", "bf16", epochs=1))
    assert open_weights(tmp_path / "bf16/fcmae.pt").weights.encoder["stem.0.weight"].dtype == torch.float32


def test_rectangular_images_of_four_channels(tmp_path):
    """A user's own .npy images of any shape, through every stage of the pipeline."""
    (tmp_path / "in").mkdir()
    for i in range(24):
        np.save(tmp_path / f"in/{i}.npy", np.random.default_rng(i).integers(0, 256, (40, 60, 4), np.uint8))
    run("python", "data/prepare.py", "--no-plan", tmp_path / "in", tmp_path / "out")
    command = words(
        tmp_path / "out", tmp_path, "npy", "--data.size", "[32,48]", "--model.channels", "4", "--model.stem_stride", "2"
    )
    run("python", "pretrain/main.py", *command, "--optim.batch_size", "8", "--objective.mask_ratio", "0.5")
    assert open_weights(tmp_path / "npy/fcmae.pt").weights.arch.channels == 4


def test_one_step_of_warm_up_alone_is_refused(digits, tmp_path, refused):
    """Its learning rate is 0, so the result would be the initial weights."""
    command = words(digits, tmp_path, "one", "--optim.batch_size", "10000", "--optim.warmup_epochs", "1", epochs=1)
    assert has(refused(main, *command), "one step learning rate 0 optim.warmup_epochs more epochs")
    assert not (tmp_path / "one/fcmae.pt").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.path", "nowhere"], "nowhere data/prepare.py"),
        (["--data.size", "30"], "data.size 30x30 patch 8"),
        (["--modl.name", "x"], "--modl.name model.name"),
        (["--data.split", "tran"], "tran train"),
        (["--data.size", "8"], "data.size 8"),
        (["--init", "nowhere.pt"], "nowhere.pt exist"),
    ],
)
def test_bad_input(more, message, digits, tmp_path, refused):
    assert has(refused(main, *words(digits, tmp_path, "bad"), *more), message)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.name", "convnextv2_atom"], "model.name convnextv2_atom convnextv2_atto"),
        (["--optim.batch_size", "7", "--optim.micro_batch", "2"], "optim.batch_size 7"),
        (["--run.device", "cuda"], "run.device cuda GPU"),
        (["--resume"], "complete checkpoint"),
    ],
)
def test_bad_input_in_a_rank(more, message, digits, tmp_path):
    if "cuda" in more and torch.cuda.is_available():
        return
    done = run("python", "pretrain/main.py", *words(digits, tmp_path, "bad"), *more, code=2)
    assert done.stderr.splitlines()[-1].startswith("error: ") and has(done.stderr.splitlines()[-1], message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


def test_resuming_with_another_configuration_shows_the_difference(digits, pretrained):
    before = (pretrained / "log.jsonl").read_bytes()
    command = words(digits, pretrained.parent, "one", "--optim.lr", "1", "--objective.mask_ratio", "0.5")
    done = run("python", "pretrain/main.py", *command, code=2)
    assert "objective.mask_ratio 0.6 -> 0.5; optim.lr 0.004 -> 1.0" in done.stderr
    done = run("python", "pretrain/main.py", *words(digits, pretrained.parent, "one", "--resume", "never"), code=2)
    assert "--run.name" in done.stderr
    assert (pretrained / "log.jsonl").read_bytes() == before


def test_an_error_under_the_launcher_is_one_line_and_exit_code_2(digits, tmp_path):
    patient = tmp_path / "patient.py"  # the second rank waits long enough for a busy machine
    patient.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport configs.errors\n"
        "configs.errors.LAUNCHER_SECONDS = 120\n"
        f"runpy.run_path({str(ROOT / 'pretrain/main.py')!r}, run_name='__main__')\n"
    )
    done = run("deepspeed", "--num_gpus", "2", patient, *words(digits, tmp_path, "bad", "--data.split", "x"), code=2)
    assert (done.stdout + done.stderr).count("error: ") == 1


def test_log_is_json(pretrained):
    entries = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    start = entries[0]["start"]
    assert (start["steps_per_epoch"], start["images"], start["precision"], start["ranks"]) == (
        6,
        {"train": 1442},
        "fp32",
        1,
    )
    assert {"model", "parameters", "objective", "date", "versions", "commit", "hardware"} <= start.keys()
    assert entries[1].keys() == {"step", "loss", "lr", "grad_norm", "images_per_s", "peak_gib", "seconds"}
