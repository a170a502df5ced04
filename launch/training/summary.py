"""summary.json: what came of a run, with all that it takes to compare it with another."""

import json
import os
import platform
from pathlib import Path

import torch

from configs.compare import to_dict
from configs.files import write_whole
from configs.schema import Finetune, Pretrain
from launch.training.world import World


def write_summary(folder: Path, config: Pretrain | Finetune, world: World, seconds: float, found: dict) -> None:
    """Write FOLDER/summary.json: what was found, and the run's time, hardware and configuration. For the first rank.

    Args:
        seconds: that the run took so far
        found: plain values
    """
    about = {"seconds": round(seconds), "hardware": hardware(world), "config": to_dict(config)}
    write_whole(folder / "summary.json", json.dumps(found | about, indent=1).encode())


def hardware(world: World) -> str:
    """The processors that a run used, like "NVIDIA H200 x 8" or "AMD EPYC, 2 cores"; of a CPU, on this machine."""
    if world.device.type == "cuda":
        return f"{torch.cuda.get_device_name(world.device)} x {world.ranks}"
    cores = torch.get_num_threads() * int(os.environ["LOCAL_WORLD_SIZE"])
    return f"{cpu_name()}, {cores} core{'s' * (cores > 1)}"


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
