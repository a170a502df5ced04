"""Write FOLDER/summary.json and FOLDER/reconstruction.png from the demo's three runs.

python launch/demo_summary.py FOLDER SECONDS
"""

import json
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.files import write_atomic

RUNS = ("finetune", "scratch")


def main(folder: Path, seconds: int) -> None:
    """Write and print the summary."""
    losses = [json.loads(line) for line in (folder / "pretrain/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    top1 = {name: json.loads((folder / name / "summary.json").read_text())["last"]["raw"]["top1"] for name in RUNS}
    summary = {
        "pretrain_loss_first": losses[0],
        "pretrain_loss_last": losses[-1],
        "finetune_top1": top1["finetune"],
        "scratch_top1": top1["scratch"],
        "seconds": seconds,
    }
    shutil.copyfile(folder / "pretrain/reconstruction.png", folder / "reconstruction.png")
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
    print(json.dumps(summary, indent=1))
    print(f"open in a browser: {folder}/pretrain/report.html, {folder}/finetune/report.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
