"""Runs that are killed, moved to other numbers of ranks, or lose their disk, compared with undisturbed runs."""

import io
import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.opening import open_weights
from tests.conftest import QUICK, ROOT, TINY, has, losses, run
from tests.data.helpers import as_tar
from tests.launch.training.helpers import Job, logged, saved, train


def weights(folder):
    held = open_weights(folder / "fcmae.pt").weights
    return {**held.encoder, **held.decoder}


def tensorboard_steps(folder):
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "epochs"), [(3, 4), (50, 40)])
def test_soak_of_random_kills(kills, epochs, digits, tmp_path):
    """Killed at random times, mostly with SIGKILL: log and final weights equal those of an undisturbed run."""
    batch, steps = ["--optim.batch_size", "48"], 30 * epochs
    with Job(digits, tmp_path / "whole", 0, *batch, epochs=epochs) as job:
        assert job.end(600) == 0, job.text()
    rng, done = random.Random(0), 0
    for _ in range(kills):
        with Job(digits, tmp_path / "killed", 0, *batch, "--data.workers", rng.choice("012"), epochs=epochs) as job:
            early = rng.random() < 0.1
            if early:  # while it starts
                time.sleep(rng.uniform(0, 4))
            else:
                job.wait_for_step(min(done + rng.randint(1, 50), steps - 2))
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            job.process.send_signal(number)
            code = job.end()
            assert code == -number or (code == 75 and number == signal.SIGTERM), job.text()
            assert early or code == (75 if number == signal.SIGTERM else -number)
            done = max([0, *saved(job.folder)])
    with Job(digits, tmp_path / "killed", 0, *batch, "--resume", "must" if done else "auto", epochs=epochs) as job:
        assert job.end(600) == 0, job.text()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert losses(killed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())
    assert tensorboard_steps(killed) == tensorboard_steps(whole) == list(range(1, steps + 1))


def optimizer_groups(folder):
    """[(weight decay, learning rate, lr scale, steps)] of the newest checkpoint's parameter groups."""
    file = sorted(folder.glob("checkpoints/step-*/engine/zero_pp_rank_0_*optim_states.pt"))[-1]
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    steps = [int(entry["step"]) for entry in state["state"].values()]
    groups = [(group["weight_decay"], group["lr"], group["lr_scale"]) for group in state["param_groups"]]
    return [(*group, count) for group, count in zip(groups, steps, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_then_one_then_four(stage, digits, tmp_path):
    """The same global batches, so the losses of one rank; decay, learning rates and counters are kept."""
    more = ["--optim.zero_stage", stage]
    train(digits, tmp_path / "one", 1, *more, epochs=4)
    done = 0
    for ranks, until in ((2, 8), (0, 14), (4, None)):
        with Job(digits, tmp_path / "moved", ranks, *more, epochs=4) as job:
            if until:
                job.wait_for_step(until)
                (job.rank(1) if ranks else job.process).send_signal(signal.SIGTERM)
                assert job.end() == 75, job.text()
            else:
                assert job.end(300) == 0, job.text()
            assert has(job.text(), f"converting {job.folder}/checkpoints/step-{done:08}") == (stage > 0 and done > 0)
            done = saved(job.folder)[-1]
    one, moved = tmp_path / "one", tmp_path / "moved"
    assert [step for step, _ in losses(moved)] == list(range(1, 25))
    assert [loss for _, loss in losses(moved)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-4)
    expected = weights(one)
    for name, tensor in weights(moved).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    if stage:
        assert optimizer_groups(moved) == optimizer_groups(one)
        assert {group[0] for group in optimizer_groups(moved)} == {0.0, 0.05} and optimizer_groups(moved)[0][3] == 24


def test_two_ranks_pass_over_a_damaged_checkpoint(digits, tmp_path):
    """A flipped bit in a file of the second rank: both ranks name it and use the previous checkpoint."""
    train(digits, tmp_path / "run", 2, epochs=2)
    before = losses(tmp_path / "run")
    file = next((tmp_path / "run/checkpoints/step-00000012/engine").glob("zero_pp_rank_1_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert has(train(digits, tmp_path / "run", 2, epochs=2), f"resuming step-00000006 step-00000012: {file.name}")
    assert losses(tmp_path / "run") == before


@pytest.mark.slow
def test_zero_3_does_not_change_its_ranks(digits, tmp_path):
    more = ["--optim.zero_stage", "3"]
    train(digits, tmp_path / "run", 2, *more, epochs=1)
    assert [loss for _, loss in logged(tmp_path / "run")] and (tmp_path / "run/reconstruction.png").exists()
    printed = train(digits, tmp_path / "run", 1, *more, epochs=1, code=2)
    assert "optim.zero_stage 3" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--run.seed", "1"], "run.seed 0 -> 1"),
        (["--optim.batch_size", "120"], "optim.batch_size 240 -> 120"),
        (["--objective.mask_ratio", ".5"], "objective.mask_ratio 0.6 -> 0.5"),
        (["--model.dims", "[8,16,16,24]"], "model.dims [8, 16, 16, 16] -> [8, 16, 16, 24]"),
        (["--data.path", "OTHER"], "data_digest"),
    ],
)
def test_drift_is_refused_with_the_difference(more, says, digits, pretrained, tmp_path_factory):
    other = tmp_path_factory.getbasetemp() / "other-shards"
    if more[1] == "OTHER":
        if not other.exists():
            run("python", "data/prepare.py", "--no-plan", "digits", other, "--shard-size", "400")
        more = ["--data.path", other]
    words = ["--data.path", digits, "--run.folder", pretrained.parent, "--run.name", pretrained.name]
    failed = run("python", "pretrain/main.py", *words, "--optim.epochs", "2", *TINY, *QUICK, *more, code=2)
    assert says in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


SMALL_DISK = """
mount -t tmpfs -o size=800k tmpfs "$0" || exit 99
"$@"; echo "first: exit $?"
ls "$0"/run/checkpoints
mount -o remount,size=100m "$0"
"$@" --resume must; echo "second: exit $?"
"""
READ_ONLY = """
mkdir -p "$0/run/checkpoints"
mount -t tmpfs tmpfs "$0/run/checkpoints" || exit 99
"$@" & job=$!
while ! ls "$0"/run/checkpoints/step-*/manifest.json >/dev/null 2>&1; do sleep .1; done
mount -o remount,ro "$0/run/checkpoints" || sleep 1 && mount -o remount,ro "$0/run/checkpoints"
wait $job; echo "first: exit $?"
ls "$0"/run/checkpoints
mount -o remount,rw "$0/run/checkpoints"
"$@" --resume must; echo "second: exit $?"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "says"),
    [(SMALL_DISK, "no space left on device"), (READ_ONLY, "read-only file system")],
)
def test_a_full_or_read_only_disk(script, says, digits, tmp_path):
    """On a real small tmpfs, in its own mount namespace: the previous checkpoint remains, and the run resumes."""
    job = Job(digits, tmp_path / "run", 0, epochs=8)
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path), *job.command]
    done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "first: exit 2" in done.stdout and "second: exit 0" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(errors) == 1 and says in errors[0]
    newest = re.findall(r"step-\d{8}", errors[0])[-1]
    assert has(done.stdout, f"resuming {tmp_path}/run/checkpoints/{newest}")
    assert "Traceback" not in done.stderr


def test_a_learning_rate_that_blows_up(digits, tmp_path):
    """Steps without finite loss are skipped; too many in a row end the run; checkpoints are finite."""
    more = ["--optim.lr", "1e30", "--optim.max_skipped", "8"]
    printed = train(digits, tmp_path / "run", 2, *more, epochs=1000, code=2)
    assert has(printed, "9 steps finite optim.max_skipped 8") and "Traceback" not in printed
    skipped = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines() if "skipped" in line]
    assert len(skipped) == 9 and all(len(entry["skipped"]["samples"]) == 240 for entry in skipped)
    for step in saved(tmp_path / "run"):
        file = tmp_path / f"run/checkpoints/step-{step:08}/engine/mp_rank_00_model_states.pt"
        assert all(tensor.isfinite().all() for tensor in torch.load(file, weights_only=False)["module"].values())


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_one_image_that_is_not_finite(stage, tmp_path):
    """NaN pixels in one image, in shards of another tool: all ranks skip its step and the log names it."""
    members = {}
    for i in range(32):
        image, out = np.random.default_rng(i).random((32, 32, 3), np.float32), io.BytesIO()
        image[0] = np.nan if i == 7 else image[0]
        np.save(out, image)
        members[f"{i:02}.npy"] = out.getvalue()
    (tmp_path / "shards").mkdir()
    as_tar(members, tmp_path / "shards/train-0.tar")
    run("python", "data/prepare.py", "--no-plan", tmp_path / "shards", "--index")
    more = [
        "--data.size",
        "32",
        "--data.crop_scale",
        "[1,1]",
        "--model.channels",
        "3",
        "--optim.batch_size",
        "8",
        "--optim.zero_stage",
        stage,
    ]
    train(tmp_path / "shards", tmp_path / "run", 2, *more, epochs=5)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skipped = [entry["skipped"] for entry in lines if "skipped" in entry]
    assert len(skipped) == 5 and {entry["not_finite"] for entry in skipped} == {"loss"}  # once an epoch
    common = set.intersection(*(set(entry["samples"]) for entry in skipped))
    assert len(common) == 1 and all(len(entry["samples"]) == 4 for entry in skipped)  # of one rank alone
    assert len([entry for entry in lines if "loss" in entry]) == 20
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
