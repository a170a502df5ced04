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


def write_summary(folder: Path, config: Pretrain | Finetune, world: World, seconds: float, results: dict) -> None:
    """Write FOLDER/summary.json: `results` (plain values), seconds, hardware, configuration."""
    if world.device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(world.device)} x {world.ranks}"
    else:
        cores = torch.get_num_threads() * int(os.environ["LOCAL_WORLD_SIZE"])  # of this machine
        hardware = f"{cpu_name()}, {cores} core{'s' * (cores > 1)}"
    about = {"seconds": round(seconds), "hardware": hardware, "config": to_dict(config)}
    write_atomic(folder / "summary.json", json.dumps(results | about, indent=1).encode())


def cpu_name() -> str:
    """Model name of the CPU."""
    return cpu_info("model name") or platform.processor() or platform.machine()
