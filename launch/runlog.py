"""What a run tells while it runs: a progress line, log.jsonl, TensorBoard. Only the first rank writes."""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from configs.errors import UserError
from configs.files import write_whole
from launch.engine import sum_over_ranks


class RunLog:
    """The log of one run.

    Args:
        folder: runs/NAME
        config: resolved configuration, written to config.yaml
        steps: optimizer steps of the whole run
        first_step: steps already done; later entries of an earlier, interrupted process are removed
        images_per_step: global batch, for images/s
        active: whether this rank writes
    """

    def __init__(self, folder: Path, config: dict, steps: int, first_step: int, images_per_step: int, active: bool):
        self.active, self.steps, self.images_per_step = active, steps, images_per_step
        self.last_step, self.last_time = first_step, time.perf_counter()
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        self.path = folder / "log.jsonl"
        kept = (
            [line for line in self.path.read_text().splitlines() if _step(line) <= first_step]
            if self.path.exists()
            else []
        )
        write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
        self.console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=steps, completed=first_step, text="")
        self.bar.start()

    def train(self, step: int, epoch: str, losses: "Mean", lr: float, grad_norm: Tensor) -> None:
        """Report the training since the last report. Every rank calls this: the loss is the mean over all ranks.

        Raises:
            UserError: the loss is not finite; on all ranks alike
        """
        total, count = sum_over_ranks(losses.take()).tolist()
        if not math.isfinite(total):
            raise UserError(
                f"the loss is {total / count} at step {step}: lower optim.lr or set optim.clip_grad, start afresh"
            )
        if not self.active:
            return
        now = time.perf_counter()
        rate = (step - self.last_step) * self.images_per_step / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        values = {"loss": total / count, "lr": lr, "grad_norm": float(grad_norm), "images_per_s": rate}
        values["peak_gib"] = peak_memory()
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        shown = f"loss {values['loss']:.4f}  lr {lr:.2e}  {rate:,.0f} images/s"
        self.bar.update(self.task, completed=step, description=epoch, text=shown)
        if not self.console.is_terminal:
            left = _duration((self.steps - step) * self.images_per_step / rate)
            print(f"{epoch}  step {step}/{self.steps}  {shown}  {left} left", flush=True)

    def restart_clock(self, step: int) -> None:
        """Leave what was done since the last report (evaluation, pictures, checkpoints) out of images/s."""
        self.last_step, self.last_time = step, time.perf_counter()

    def scores(self, step: int, name: str, values: dict[str, float]) -> None:
        """Record an evaluation after a step, its values under `name`."""
        if self.active:
            self.file.write(json.dumps({"step": step, name: values}) + "\n")
            for key, value in values.items():
                self.board.add_scalar(f"{name}/{key}", value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Show a picture [3, H, W], uint8, in TensorBoard."""
        if self.active:
            self.board.add_image(name, image, step)

    def say(self, message: str) -> None:
        """Print a line beside the progress bar."""
        if self.active:
            self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Flush everything; also after an error."""
        if self.active:
            self.bar.stop()
            self.board.close()
            self.file.close()


class Mean:
    """A mean of values on the device, read (with a sync) only when it is asked for."""

    def __init__(self, device: torch.device):
        self.sum_count = torch.zeros(2, device=device)

    def add(self, value: Tensor) -> None:
        """Add a scalar."""
        self.sum_count += torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])

    def take(self) -> Tensor:
        """(sum, count) so far, on the device; starts anew."""
        taken, self.sum_count = self.sum_count, torch.zeros_like(self.sum_count)
        return taken


def peak_memory() -> float:
    """Most memory that this rank has used so far, GiB: of its GPU's, or without one of the machine's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed process may be cut
        return 1 << 62


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}"
