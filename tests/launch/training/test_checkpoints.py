"""Selection and refusal of checkpoints on resume, and interrupted saves."""

import json
import os
import signal
import sys

import pytest
import torch

from configs.errors import UserError
from launch.training import checkpoints
from launch.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
IDENTITY = {"seed": 1, "optim": {"zero_stage": 1}}


class Engine:
    """Stub that writes two files."""

    def save(self, folder, tag, state):
        path = folder / tag
        path.mkdir()
        (path / "weights").write_text(json.dumps(state))
        (path / "optimizer").write_bytes(bytes(1000))

    def load(self, folder, tag, universal=False):
        return json.loads((folder / tag / "weights").read_text())


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(checkpoints, "barrier", lambda: None)
    monkeypatch.setattr(checkpoints, "broadcast", lambda value: value)
    monkeypatch.setattr(checkpoints, "gather", lambda value: [value])


def checkpoints_of(run, config=IDENTITY, world=ALONE, keep=3):
    return checkpoints.Checkpoints(run, Engine(), config, world, keep, frozenset({"run.log_every"}))


def save(run, *steps, keep=3, config=IDENTITY, scores=None):
    made = checkpoints_of(run, config, keep=keep)
    for i, step in enumerate(steps):
        made.save(step, {"at": step}, scores[i] if scores else None)
    made.wait()


def resume(run, mode="auto", config=IDENTITY, world=ALONE):
    return checkpoints_of(run, config, world).resume(mode)


def steps_saved(run):
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]


def test_the_newest_is_taken_and_the_last_are_kept(tmp_path):
    assert resume(tmp_path) == (0, {})
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert steps_saved(tmp_path) == [3, 10]
    assert resume(tmp_path) == (10, {"at": 10})


def test_the_best_is_kept_too(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, scores=[0.1, 0.9, 0.9, None, 0.2])
    assert steps_saved(tmp_path) == [3, 4, 5]  # of equal scores the newer


DAMAGES = ["manifest gone", "manifest cut", "manifest empty", "weights gone", "weights cut", "weights flipped"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named(damage, tmp_path, capsys):
    save(tmp_path, 1, 2)
    part, how = damage.split()
    file = tmp_path / "checkpoints/step-00000002" / ("manifest.json" if part == "manifest" else "engine/weights")
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "flipped": content[:-3] + b"9}}"}[how])
    assert resume(tmp_path) == (1, {"at": 1})
    printed = capsys.readouterr().out
    assert "step-00000002" in printed and (how != "flipped" or "engine/weights" in printed)
    (tmp_path / "checkpoints/step-00000001/manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000002: .*step-00000001: .*manifest"):
        resume(tmp_path)  # never a silent fresh start


@pytest.mark.parametrize("pointer", [None, "", "step-00000099/engine\n", "step-00000001/engine\n"])
def test_the_pointer_decides_nothing(pointer, tmp_path):
    save(tmp_path, 1, 2)
    latest = tmp_path / "checkpoints/latest"
    assert latest.read_text() == "step-00000002/engine\n"
    latest.unlink() if pointer is None else latest.write_text(pointer)
    assert resume(tmp_path, "must") == (2, {"at": 2})


def test_the_file_latest_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-00000002/engine\n")
    with pytest.raises(UserError, match="complete checkpoint"):
        resume(tmp_path, "must")


def test_wrong_resume_modes_and_configurations(tmp_path):
    with pytest.raises(UserError, match=r"complete checkpoint: correct --run\.name, or leave out --resume"):
        resume(tmp_path, "must")
    other = IDENTITY | {"run": {"log_every": 5}}  # a key that may change
    save(tmp_path, 5, config=IDENTITY | {"run": {"log_every": 1}})
    with pytest.raises(UserError, match=r"configuration .*seed 1 -> 2"):
        resume(tmp_path, config=IDENTITY | {"seed": 2, "run": {"log_every": 1}})
    with pytest.raises(UserError, match=r"--run\.name"):
        resume(tmp_path, "never")
    assert resume(tmp_path, config=other) == (5, {"at": 5})


def test_a_finished_run_without_checkpoints_is_not_trained_anew(tmp_path):
    """Its weights would be overwritten."""
    (tmp_path / "report.html").touch()
    for mode in ("auto", "never"):
        with pytest.raises(UserError, match=r"finished run without checkpoints.*another --run\.name, or delete"):
            resume(tmp_path, mode)


def test_keys_that_a_checkpoint_of_an_earlier_version_lacks_have_their_defaults(tmp_path):
    save(tmp_path, 5)
    now = IDENTITY | {"optim": {"zero_stage": 1, "name": "adamw"}, "objective": {"scale": [0.2, 1.0]}}
    defaults = {"optim.name": "adamw", "objective.scale": (0.2, 1.0), "seed": 7}

    def resume_as(identity):
        return checkpoints.Checkpoints(tmp_path, Engine(), identity, ALONE, 3, defaults=defaults).resume("auto")

    assert resume_as(now) == (5, {"at": 5})
    with pytest.raises(UserError, match=r"optim\.name adamw -> muon"):
        resume_as(now | {"optim": {"zero_stage": 1, "name": "muon"}})
    with pytest.raises(UserError, match=r"digest None -> abc"):  # without a default
        resume_as(now | {"digest": "abc"})


def test_a_run_of_the_other_stage(tmp_path):
    save(tmp_path, 1, config=IDENTITY | {"stage": "pretraining"})
    with pytest.raises(UserError, match=r"pretraining.* --run\.name .*fine-tuning"):
        resume(tmp_path, config=IDENTITY | {"stage": "fine-tuning"})


def test_another_number_of_ranks(tmp_path, monkeypatch):
    two = World(0, 2, torch.device("cpu"))
    converted = []
    monkeypatch.setattr(
        checkpoints, "to_universal", lambda source, target: converted.append(source) or target.mkdir(parents=True)
    )
    monkeypatch.setattr(Engine, "load", lambda engine, folder, tag, universal=False: universal)
    for stage, expected in ((0, False), (1, True), (2, True)):
        run = tmp_path / str(stage)
        save(run, 5, config={"optim": {"zero_stage": stage}})
        assert resume(run, config={"optim": {"zero_stage": stage}}, world=two) == (5, expected)
        assert not list((run / "checkpoints").glob(".*"))  # the converted one is removed
    assert len(converted) == 2
    save(tmp_path / "3", 5, config={"optim": {"zero_stage": 3}})
    with pytest.raises(UserError, match=r"1 .*2.* optim\.zero_stage 3"):
        resume(tmp_path / "3", config={"optim": {"zero_stage": 3}}, world=two)


def die_at(count: int):
    """An audit hook that kills this process, with SIGKILL, at its count-th file event."""
    left = [count]

    def hook(event: str, _) -> None:
        if event.split(".")[0] in ("open", "os", "shutil", "pathlib"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_killed_at_every_file_event_of_a_save(tmp_path):
    """Whenever the process dies, the old or the new checkpoint is complete; the next run removes leftovers."""
    outcomes, count = [], 0
    while not outcomes or outcomes[-1] != "ended":
        count += 1
        run = tmp_path / str(count)
        save(run, 1, 2, keep=2)
        child = os.fork()
        if child == 0:
            sys.addaudithook(die_at(count))
            save(run, 3, keep=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        step, state = resume(run, "must")
        assert state == {"at": step} and step in (2, 3)
        assert not list((run / "checkpoints").glob(".step-*"))
        save(run, 4, keep=2)
        assert resume(run) == (4, {"at": 4}) and len(steps_saved(run)) == 2
        outcomes.append("ended" if status == 0 else f"killed, {step}")
    assert count > 20 and {"killed, 2", "killed, 3"} < set(outcomes)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_failed_save_leaves_the_one_before(error, tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*_, **__):
        raise error

    made = checkpoints_of(tmp_path)
    monkeypatch.setattr(made.engine, "save", fail)
    with pytest.raises(UserError, match=r"step 2 .*step-00000001"):
        made.save(2, {})
    assert steps_saved(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".*"))


def test_a_failed_commit_is_an_error(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(_):
        raise OSError(30, "Read-only file system")

    made = checkpoints_of(tmp_path)
    monkeypatch.setattr(checkpoints, "sha256", fail)
    made.save(2, {})
    made.commit.join()
    with pytest.raises(UserError, match=r"read-only file system.*step-00000001"):
        made.check()
    made.check()  # raised once
    assert steps_saved(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".*"))
