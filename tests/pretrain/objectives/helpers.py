"""What tests of objectives read of a run."""

import json
from pathlib import Path

import torch


def scores(folder: Path, objective: str) -> list[dict]:
    """What an objective's monitor has logged."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[objective] for line in lines if objective in line]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The model of the newest checkpoint."""
    file = sorted(folder.glob("checkpoints/step-*/engine/mp_rank_00_model_states.pt"))[-1]
    return torch.load(file, weights_only=False)["module"]
