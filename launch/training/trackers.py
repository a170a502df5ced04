"""Trackers that a run reports to besides log.jsonl (`run.trackers`): TensorBoard, Weights & Biases, MLflow.

All get the names of log.jsonl. Each is a class with `scalars`, `picture` and `close`, made from (folder, config,
first_step, known): `known` is what RUN/trackers.json has of it, so that a resumed run continues the same one there.
`known` is empty for a new run. Only the first rank makes them.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError, printable, reason
from configs.files import write_atomic
from configs.secrets import without_secrets

PROJECT = "convnext-fcmae"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
MAX_PARAMETER = 500  # characters of a parameter that MLflow stores


class Tracker(Protocol):
    """Where values and pictures of a run go."""

    known: dict  # for trackers.json: what names the run there
    where: str  # for the console; empty = nothing to say

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values by name."""

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Record a picture [3, H, W], uint8."""

    def close(self, finished: bool) -> None:
        """Write what is left; `finished` = the run reached its end."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    where = ""

    def __init__(self, folder: Path, config: dict, first_step: int, known: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.known: dict = {}
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.writer.add_image(name, image, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, in RUN/wandb. Its x-axis is the value `step`, which may go back on resume."""

    def __init__(self, folder: Path, config: dict, first_step: int, known: dict):
        import wandb

        self.image = wandb.Image
        project, settings = os.environ.get("WANDB_PROJECT", PROJECT), wandb.Settings(silent=True, console="off")
        same = {"id": known["id"], "resume": "allow"} if known else {}  # offline: a second folder of this id
        self.run = wandb.init(project=project, name=folder.name, dir=folder, config=config, settings=settings, **same)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        self.known = {"id": self.run.id}
        sync = f"offline; send it with: wandb sync {Path(self.run.dir).parent}"
        self.where = f"wandb: {sync if self.run.offline else self.run.url}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.run.log({"step": step, name: self.image(F.to_pil_image(image))})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in mlflow.db beside the run's folder."""

    def __init__(self, folder: Path, config: dict, first_step: int, known: dict):
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "20")):  # a lost server must not stop the training
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # says a line for each table of a new database
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        own = f"sqlite:///{folder.parent.resolve() / 'mlflow.db'}"
        uri, self.metric = os.environ.get("MLFLOW_TRACKING_URI") or own, Metric
        self.client, self.run_id = MlflowClient(uri), known.get("run_id")
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._create(folder, uri == own)
            params = [Param(key, str(value)[:MAX_PARAMETER]) for key, value in flat(config).items()]
            self.client.log_batch(self.run_id, params=params)
        self.known, self.where = {"run_id": self.run_id}, f"mlflow: run {self.run_id} at {without_secrets(uri)}"

    def _create(self, folder: Path, own: bool) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        place = (folder.parent.resolve() / "mlflow").as_uri() if own else None  # of the pictures
        id = found.experiment_id if found else self.client.create_experiment(name, place)
        return self.client.create_run(id, run_name=folder.name).info.run_id

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self.metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.client.log_image(self.run_id, F.to_pil_image(image), artifact_file=f"{_file_name(name)}/{step:08}.png")

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


class Trackers:
    """All trackers of a run. One that fails during the training is left out, with a line; the training continues.

    Raises:
        UserError: a tracker cannot begin
    """

    def __init__(self, names: Sequence[str], folder: Path, config: dict, first_step: int, say: Callable[[str], None]):
        path = folder / "trackers.json"
        known, self.say, self.open = _known(path) if first_step else {}, say, {}
        for name in dict.fromkeys(names):
            try:
                self.open[name] = TRACKERS[name](folder, config, first_step, known.get(name, {}))
            except Exception as error:
                way_out = {"wandb": "log in with `wandb login`, or set WANDB_MODE=offline"}
                remedy = f"{way_out.get(name, 'see its settings')}, or leave it out of run.trackers"
                raise UserError(f"run.trackers: {name} cannot begin ({printable(reason(error))}): {remedy}") from error
        self.where = [tracker.where for tracker in self.open.values() if tracker.where]
        found = known | {name: tracker.known for name, tracker in self.open.items() if tracker.known}
        if found:
            write_atomic(path, json.dumps(found, indent=1).encode())
        elif path.exists():
            path.unlink()  # of an earlier run of this name

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._each("scalars", step, values)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self._each("picture", step, name, image)

    def close(self, finished: bool) -> None:
        self._each("close", finished)

    def _each(self, method: str, *args: object) -> None:
        for name, tracker in list(self.open.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                if name == "tensorboard":  # its disk is the run's own
                    raise
                del self.open[name]
                with suppress(Exception):
                    tracker.close(False)
                self.say(f"warning: {name} failed and gets nothing more of this run: {reason(error)}")


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """Values of a configuration by dotted key."""
    found: dict[str, object] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _known(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # of an earlier version, or lost: new runs in the trackers
        return {}


def _mlflow_name(name: str) -> str:
    """A name of a score; letters that MLflow refuses, which class names may have, become _."""
    return re.sub(r"[^\w .:/-]", "_", name, flags=re.ASCII)[:250]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-") or "picture"
