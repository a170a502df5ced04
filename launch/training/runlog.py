"""Log of a run: progress lines, log.jsonl, trackers. Only the first rank writes."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from torch import Tensor

from configs import machine
from configs.errors import printable
from configs.files import write_atomic
from launch.training.trackers import Trackers
from launch.training.world import sum_over_ranks


class RunLog:
    """The log of one run.

    Args:
        config: resolved configuration, written to config.yaml
        steps: optimizer steps of the whole run
        first_step: steps already done; later entries of an interrupted process are removed
        per_step: images, or crops, of a step
        active: whether this rank writes
        trackers: names in `TRACKERS`
        unit: image or crop

    Raises:
        UserError: a tracker cannot begin
    """

    def __init__(
        self, folder: Path, config: dict, steps: int, first_step: int, per_step: int, active: bool,
        trackers: Sequence[str] = ("tensorboard",), unit: str = "image",
    ):  # fmt: skip
        self.active, self.steps, self.per_step, self.unit = active, steps, per_step, f"{unit}s"
        self.restart_clock(first_step)
        self.began = self.last_time
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        self.trackers = Trackers(trackers, folder, config, first_step, self.say)  # before files are written: may fail
        write_atomic(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self.path = folder / "log.jsonl"
        entries = [entry for entry in read_log(self.path) if entry["step"] <= first_step] if first_step else []
        self.began -= max((entry.get("seconds", 0) for entry in entries), default=0)
        write_atomic(self.path, "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
        self.file = self.path.open("a", buffering=1)
        columns = "{task.description}", BarColumn(), "{task.fields[text]}", TimeRemainingColumn()
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=steps, completed=first_step, text="")
        self.bar.start()

    def train(self, step: int, epoch: str, losses: "Mean", lr: float, grad_norm: float) -> None:
        """Log the training since the last call, without values that are not finite; all ranks call this."""
        total, count = sum_over_ranks(losses.take()).tolist()
        if not self.active:
            return
        rate = (step - self.last_step) * self.per_step / max(time.perf_counter() - self.last_time, 1e-9)
        self.restart_clock(step)
        mean = total / count if count else math.nan
        values = {"loss": mean, "lr": lr, "grad_norm": grad_norm, f"{self.unit}_per_s": rate}
        values = {name: value for name, value in values.items() if math.isfinite(value)} | {"peak_gib": peak_memory()}
        self.file.write(json.dumps({"step": step, **values, "seconds": round(self.seconds(), 1)}) + "\n")
        self.trackers.scalars(step, values)
        text = f"loss {mean:.4f}  lr {lr:.2e}  {rate:,.0f} {self.unit}/s"
        self.bar.update(self.task, completed=step, description=epoch, text=text)
        if not self.console.is_terminal:
            minutes, seconds = divmod(int((self.steps - step) * self.per_step / rate), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
            print(f"{epoch}  step {step}/{self.steps}  {text}  {left}", flush=True)

    def seconds(self) -> float:
        """Duration of the run, including evaluations and earlier processes up to their last log entry."""
        return time.perf_counter() - self.began

    def restart_clock(self, step: int) -> None:
        """Measure the speed from now on, so without the evaluation, pictures and checkpoints since the last `train`."""
        self.last_step, self.last_time = step, time.perf_counter()

    def scores(self, step: int, name: str, values: dict[str, float]) -> None:
        """Record the scores of an evaluation in log.jsonl and the trackers, under `name`."""
        self.record(step, name, values)
        if self.active:
            self.trackers.scalars(step, {f"{name}/{key}": value for key, value in values.items()})

    def record(self, step: int, name: str, values: dict) -> None:
        """Write an entry to log.jsonl."""
        if self.active:
            self.file.write(json.dumps({"step": step, name: values}) + "\n")

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Send a picture [3, H, W], uint8, to the trackers."""
        if self.active:
            self.trackers.picture(step, name, image)

    def where(self) -> list[str]:
        """Lines that say where the trackers show the run."""
        return self.trackers.where if self.active else []

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            message = "\n".join(map(printable, message.split("\n")))
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self, finished: bool = True) -> None:
        """Close the log; `finished` = the run reached its end."""
        if self.active:
            self.bar.stop()
            self.trackers.close(finished)
            self.file.close()


class Mean:
    """Mean of the finite values among scalars on the device; only `state` synchronises with it."""

    def __init__(self, device: torch.device):
        self.sum_count = torch.zeros(2, device=device)

    def add(self, value: Tensor) -> None:
        value = value.detach().float()
        finite = torch.isfinite(value)
        self.sum_count += torch.stack([torch.where(finite, value, 0.0), finite.float()])

    def take(self) -> Tensor:
        """Return (sum, count) on the device, and reset both."""
        taken, self.sum_count = self.sum_count, torch.zeros_like(self.sum_count)
        return taken

    def state(self) -> list[float]:
        """(sum, count), for a checkpoint."""
        return self.sum_count.tolist()

    def load_state(self, states: list[list[float]], rank: int) -> None:
        """Restore all ranks' states of a checkpoint; if the number of ranks changed, the first rank takes the sum."""
        if len(states) == torch.distributed.get_world_size():
            own = states[rank]
        else:
            own = [sum(column) for column in zip(*states, strict=True)] if rank == 0 else [0.0, 0.0]
        self.sum_count = torch.tensor(own, device=self.sum_count.device)


def peak_memory() -> float:
    """Peak memory of this rank so far, GiB: of its GPU, or of the process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return machine.peak_memory() / 2**30


def read_log(path: Path) -> Iterator[dict]:
    """Entries of log.jsonl. Ends at a truncated line, which a killed process may leave."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return
