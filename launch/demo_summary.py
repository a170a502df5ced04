"""Write FOLDER/summary.json and FOLDER/reconstruction.png from the demo's runs.

python launch/demo_summary.py FOLDER SECONDS
"""

import json
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.files import write_atomic


def main(folder: Path, seconds: int) -> None:
    """Write and print the summary."""
    entries = [json.loads(line) for line in (folder / "pretrain/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    summary = {"pretrain_loss_first": losses[0], "pretrain_loss_last": losses[-1]}
    for run in ("finetune", "scratch"):
        results = json.loads((folder / run / "summary.json").read_text())
        summary[f"{run}_top1"] = results["last"]["raw"]["top1"]
    segmented = json.loads((folder / "segmentation/summary.json").read_text())
    summary["segmentation_miou"] = segmented["last"]["raw"]["miou"]
    summary["seconds"] = seconds
    shutil.copyfile(folder / "pretrain/reconstruction.png", folder / "reconstruction.png")
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
    print(json.dumps(summary, indent=1))
    print("open in a browser:", *(f"{folder}/{run}/report.html" for run in ("pretrain", "finetune", "segmentation")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
