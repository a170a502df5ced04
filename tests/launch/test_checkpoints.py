"""Which checkpoint a run goes on from, and what it refuses."""

import json

import pytest
import torch

from configs.errors import UserError
from launch import checkpoints
from launch.engine import World

ALONE = World(0, 1, torch.device("cpu"))


class Engine:
    """Stands in for DeepSpeed's: writes a file, remembers what it loaded."""

    loaded = None

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        path = checkpoints.Path(folder) / tag
        path.mkdir()
        (path / "weights").write_text(json.dumps(client_state))

    def load_checkpoint(self, folder, tag):
        self.loaded = folder
        return folder, json.loads((checkpoints.Path(folder) / tag / "weights").read_text())


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(checkpoints, "barrier", lambda: None)
    monkeypatch.setattr(checkpoints, "agree", lambda value: value)


def save(run, *steps, keep=3, config=None):
    for step in steps:
        checkpoints.save(Engine(), run, step, {"at": step}, config or {"seed": 1}, ALONE, keep)


def test_a_run_of_the_other_stage(tmp_path):
    save(tmp_path, 1, config={"stage": "pretraining"})
    with pytest.raises(UserError, match=r"is a pretraining run: choose another --run\.name for fine-tuning$"):
        resume(tmp_path, config={"stage": "fine-tuning"})


def resume(run, mode="auto", config=None, world=ALONE):
    return checkpoints.resume(Engine(), run, config or {"seed": 1}, mode, world)


def test_the_newest_is_taken_and_the_last_are_kept(tmp_path):
    assert resume(tmp_path) == (0, {})
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert [folder.name for folder in checkpoints.complete(tmp_path)] == ["step-00000003", "step-00000010"]
    assert resume(tmp_path) == (10, {"at": 10})


@pytest.mark.parametrize("harm", ["manifest gone", "manifest cut", "file gone", "file cut"])
def test_an_incomplete_one_is_passed_over_and_named(harm, tmp_path, capsys):
    save(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints/step-00000002"
    file = newest / ("manifest.json" if "manifest" in harm else "engine/weights")
    file.unlink() if "gone" in harm else file.write_bytes(file.read_bytes()[:-1])
    assert resume(tmp_path) == (1, {"at": 1})
    assert "passed over: step-00000002" in capsys.readouterr().out
    (tmp_path / "checkpoints/step-00000001/manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint; incomplete: step-00000001, step-00000002"):
        resume(tmp_path)  # never a silent fresh start


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no complete checkpoint"):
        resume(tmp_path, "must")
    other = {"seed": 1, "run": {"log_every": 5}}  # a key that may change
    save(tmp_path, 5, config={"seed": 1, "run": {"log_every": 1}})
    with pytest.raises(UserError, match=r"another configuration \(seed 1 -> 2\)"):
        resume(tmp_path, config={"seed": 2, "run": {"log_every": 1}})
    with pytest.raises(UserError, match="made on 1 ranks, this is 2"):
        resume(tmp_path, config=other, world=World(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match=r"choose another --run\.name"):
        resume(tmp_path, "never")
    assert resume(tmp_path, config=other) == (5, {"at": 5})
