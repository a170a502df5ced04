"""Trackers: the names of log.jsonl, the same run after a resume, failures."""

import json
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import UserError
from configs.schema import Pretrain, Run
from launch import inputs
from launch.training import runlog, trackers
from launch.training.runlog import Mean, RunLog
from tests.conftest import has

CONFIG = {"run": {"name": "x", "seed": 3}, "objective": {"name": "fcmae"}}
TRAINED = {"loss", "lr", "grad_norm", "images_per_s", "peak_gib"}
SCORES = {"val_raw/top1", "val_raw/r2_$ä"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One process, without an account or settings of this machine's user."""
    monkeypatch.setattr(runlog, "sum_over_ranks", lambda x: x)
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def report(folder, names, steps, first_step=0, finished=True) -> list[str]:
    """Log some steps, a score and a picture; returns what the trackers say of the run."""
    log = RunLog(folder, CONFIG, 10, first_step, 32, active=True, trackers=names)
    for step in steps:
        mean = Mean(torch.device("cpu"))
        mean.add(torch.tensor(float(step)))
        log.train(step, "epoch 1/1", mean, 0.1, 2.0)
    log.scores(steps[-1], "val_raw", {"top1": 0.5, "r2_$ä": math.nan})
    log.picture(steps[-1], "input, prediction", torch.zeros(3, 4, 5, dtype=torch.uint8))
    log.close(finished)
    return log.where()


def logged(folder) -> set[str]:
    """Names of values in log.jsonl."""
    found = set()
    for line in (folder / "log.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found |= {f"{name}/{key}" for key in value} if isinstance(value, dict) else {name}
    return found - {"step", "seconds"}


def test_tensorboard_is_the_default(tmp_path):
    assert Run().trackers == ("tensorboard",)
    assert report(tmp_path, Run().trackers, [1, 2]) == []
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == logged(tmp_path) == TRAINED | SCORES
    assert events.Tags()["images"] == ["input, prediction"] and not (tmp_path / "trackers.json").exists()


def test_no_tracker(tmp_path):
    report(tmp_path, (), [1])
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml", "log.jsonl", "home"}


def test_mlflow(tmp_path):
    """A database beside the run. After a resume it is the same run there; letters that MLflow refuses become _."""
    pytest.importorskip("mlflow", reason="tests of MLflow need it: bash launch/install_trackers.sh")
    pytest.importorskip("sqlalchemy", reason="tests of MLflow need it: bash launch/install_trackers.sh")
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "runs/x"
    report(folder, ("mlflow",), [1, 2, 3], finished=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("convnext-fcmae").experiment_id
    (first,) = client.search_runs([experiment])
    assert first.info.status == "KILLED" and first.data.params["run.seed"] == "3" and first.info.run_name == "x"
    (where,) = report(folder, ("mlflow",), [3, 4], first_step=2)
    (again,) = client.search_runs([experiment])
    assert again.info.run_id == first.info.run_id and again.info.run_id in where and again.info.status == "FINISHED"
    assert set(again.data.metrics) == {name.replace("$ä", "__") for name in logged(folder)}
    assert [metric.step for metric in client.get_metric_history(first.info.run_id, "loss")] == [1, 2, 3, 3, 4]
    (pictures,) = client.list_artifacts(first.info.run_id)
    assert {file.path for file in client.list_artifacts(first.info.run_id, pictures.path)} == {
        f"input-prediction/0000000{step}.png" for step in (3, 4)
    }
    report(folder, ("mlflow",), [1])  # a new run of the same name
    assert len(client.search_runs([experiment])) == 2


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="tests of MLflow need it: bash launch/install_trackers.sh")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    report(tmp_path / "runs/x", ("mlflow",), [1])
    assert list((tmp_path / "store").rglob("metrics/loss")) and not (tmp_path / "runs/mlflow.db").exists()


def test_wandb_offline(tmp_path):
    """Files to be sent later; both parts of a resumed run have one id."""
    pytest.importorskip("wandb", reason="tests of wandb need it: bash launch/install_trackers.sh")
    folder = tmp_path / "runs/x"
    (where,) = report(folder, ("wandb",), [1, 2], finished=False)
    known = json.loads((folder / "trackers.json").read_text())["wandb"]["id"]
    assert has(where, "offline sync") and known in where
    report(folder, ("wandb",), [3], first_step=2)
    files = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{known}.wandb"}
    expected = [name.rpartition("/")[2].encode() for name in logged(folder) | {"step", "val_raw"}]
    for file in files:
        deadline = time.monotonic() + 20  # wandb's own process writes the file
        while (missing := [name for name in expected if name not in file.read_bytes()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not missing and list(file.parent.glob("files/media/images/*.png"))
    report(folder, ("wandb",), [1])
    assert json.loads((folder / "trackers.json").read_text())["wandb"]["id"] != known


class Broken(trackers.TensorBoard):
    """A tracker whose server is lost."""

    where = "somewhere"

    def scalars(self, step, values):
        raise ConnectionError("the server is gone\nmore")


def test_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Broken)
    assert report(tmp_path, ("mlflow", "tensorboard"), [1, 2, 3]) == ["somewhere"]
    said = capsys.readouterr().out
    assert said.count("mlflow failed") == 1 and has(said, "warning: the server is gone") and "more\n" not in said
    assert logged(tmp_path) == TRAINED | SCORES


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    log = RunLog(tmp_path, CONFIG, 10, 0, 32, active=True)
    with pytest.raises(ConnectionError):
        log.scores(1, "val_raw", {"top1": 0.5})
    log.close()


def test_a_tracker_that_cannot_begin(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no key for https://me:secret@host/x?token=secret\nlong explanation")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with pytest.raises(UserError, match=r"run\.trackers: wandb cannot begin \(no key.*WANDB_MODE=offline") as error:
        report(tmp_path / "x", ("wandb",), [1])
    assert not list((tmp_path / "x").iterdir()) and "secret" not in str(error.value)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb.*pip install wandb"):
        inputs.check_inputs(Pretrain(run=Run(trackers=("wandb",))))
