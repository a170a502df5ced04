"""Both stages reproduce the losses in golden.json, and on the machine that made the file the final weights bit for bit.

If a change is meant to alter training, write the file again and say so in the commit:
    python -m tests.test_golden
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from launch.training.summary import cpu_name
from models import kernels
from tests.conftest import ROOT, run, run_ranks

GOLDEN = ROOT / "tests/golden.json"
TOLERANCE = 1e-5  # relative: another CPU rounds differently
MODEL = ["--model.depths", "[1,1,2,1]", "--model.dims", "[8,16,16,24]", "--objective.decoder_dim", "16"]
RUN = ["--optim.epochs", "2", "--run.max_steps", "4", "--run.log_every", "1", "--run.device", "cpu"]
RUN += [
    "--optim.precision",
    "fp32",
    "--data.workers",
    "0",
    "--optim.batch_size",
    "240",
    "--optim.lr",
    "3e-3",
    "--optim.warmup_epochs",
    "0.5",
]
ACCUMULATED = ["--optim.micro_batch", "60"]
MIXED = ["--task.mixup", "0.8", "--task.cutmix", "1", "--augment.erase", "0.25", "--augment.ema", "0.9"]
SAMPLED = ["--task.balance", "0.5", "--task.label_share", "0.9", "--task.smoothing", "0.2"]
DECAYED = ["--layer_decay", "0.8", "--model.drop_path", "0.1"]
CLIPPED = ["--optim.clip_grad", "0.5"]
CASES = {  # number of ranks, and the words of the command
    "pretrain": [1, "pretrain/main.py", *MODEL, *RUN, *ACCUMULATED, *CLIPPED],
    "pretrain-2-ranks": [2, "pretrain/main.py", *MODEL, *RUN, "--model.backend", "masked"],
    "finetune": [1, "finetune/main.py", *RUN, *ACCUMULATED, *MIXED, *DECAYED],
    "finetune-2-ranks": [2, "finetune/main.py", *RUN, *SAMPLED, *CLIPPED, "--optim.zero_stage", "0"],
}


def machine() -> str:
    """What rounding depends on: the processor, its instruction sets, the C++ kernels, and torch."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line for line in info if line.startswith("flags")), platform.processor())
    kernel = "C++ kernels, " if kernels.compiled() else ""
    return f"{cpu_name()}, {kernel}{hashlib.sha256(flags.encode()).hexdigest()[:8]}, torch {torch.__version__}"


def measure(case: str, shards: Path, runs: Path) -> dict:
    """Losses and scores of a few steps, by step, and a digest of the final weights."""
    init = ["--init", runs / "pretrain/fcmae.pt"] if case.startswith("finetune") else []
    where = ["--data.path", shards, "--run.folder", runs, "--run.name", case]
    run_ranks(*CASES[case], *where, *init)
    found = {}
    for line in map(json.loads, (runs / case / "log.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name in ("loss", "grad_norm", "lr"):
                found[f"{name} {line['step']}"] = value
            elif isinstance(value, dict) and "loss" in value:
                found[f"{name} {line['step']}"] = value["loss"]
    content = torch.load(runs / case / ("last.pt" if init else "fcmae.pt"), weights_only=True)
    digest = hashlib.sha256()
    for part in ("encoder", "decoder", "head", "ema"):
        for name, tensor in sorted((content[part] or {}).items()):
            digest.update(f"{part} {name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return {"values": found, "weights": digest.hexdigest()}


def measure_all(shards: Path, runs: Path) -> dict:
    """The content of golden.json, measured now."""
    return {"machine": machine(), "cases": {case: measure(case, shards, runs) for case in CASES}}


@pytest.fixture(scope="module")
def measured(digits, tmp_path_factory) -> dict:
    return measure_all(digits, tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_the_golden_file(case, measured):
    golden = json.loads(GOLDEN.read_text())
    assert measured["cases"][case]["values"] == pytest.approx(golden["cases"][case]["values"], rel=TOLERANCE)
    if measured["machine"] == golden["machine"]:
        assert measured["cases"][case]["weights"] == golden["cases"][case]["weights"]


def main() -> None:
    """Write golden.json anew."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "digits"
        run("python", "data/prepare.py", "--no-plan", "digits", shards, "--shard-size", "500")
        GOLDEN.write_text(json.dumps(measure_all(shards, Path(folder)), indent=1) + "\n")
    print(f"wrote {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
