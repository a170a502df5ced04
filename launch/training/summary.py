"""summary.json: results of a run, with its time, hardware and configuration."""

import json
import os
import platform
from pathlib import Path

import torch

from configs.compare import to_dict
from configs.files import write_atomic
from configs.machine import cpu_info
from configs.schema import Finetune, Pretrain
from launch.training.world import World

REPORT = "report.html"  # of a run; training writes it last


def write_summary(folder: Path, config: Pretrain | Finetune, world: World, seconds: float, results: dict) -> None:
    """Write FOLDER/summary.json: `results` (plain values), seconds, hardware, configuration."""
    about = {
        "seconds": round(seconds),
        "hardware": hardware(world.device, world.ranks, local_cores()),
        "config": to_dict(config),
    }
    write_atomic(folder / "summary.json", json.dumps(results | about, indent=1).encode())


def local_cores() -> int:
    """Cores of this machine that the run's ranks use."""
    return torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def hardware(device: torch.device, ranks: int, cores: int) -> str:
    """GPUs, or CPU and cores, that a run uses."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} x {ranks}"
    return f"{cpu_name()}, {cores} core{'s' * (cores > 1)}"


def cpu_name() -> str:
    """Model name of the CPU."""
    return cpu_info("model name") or platform.processor() or platform.machine()
