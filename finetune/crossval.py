"""Cross-validate fine-tuning: train once for each fold, and print mean and standard deviation of the scores.

python finetune/crossval.py --folds 5 --config configs/finetune/photos.yaml --init runs/photos/fcmae.pt
python finetune/crossval.py --folds 5 --launcher deepspeed --data.path photos/ --run.name photos-cv

All other options are those of finetune/main.py. The folds are parts of data.split, alike in their labels and chosen by
a hash of the images' names; no shards are copied. Fold I is trained in RUN/fold-I; RUN/summary.json has the scores. The
same command resumes after an interruption and skips folds that are complete.
"""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

from configs.command import Parser, parse
from configs.errors import MISTAKE, UserError, run_main
from configs.files import write_atomic
from configs.log import say
from configs.schema import Finetune
from finetune.tasks import TASKS
from launch.inputs import check_inputs

LAUNCHERS = ("python", "deepspeed")


def main() -> None:
    """Entry point: train the folds one after another, then summarise them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--folds", type=int, default=5, help="number of folds (default 5)")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="python", help="deepspeed = on all GPUs")
    own, words = parser.parse_known_args()
    if own.folds < 2:
        raise UserError(f"--folds is {own.folds}: it must be at least 2")
    for key in ("--data.fold", "--data.folds", "--dry-run", "--print_config"):
        if any(word.partition("=")[0] == key for word in words):
            raise UserError(f"{key} is an option of finetune/main.py for a single fold: leave it out here")
    config = parse(Finetune, "finetune/digits.yaml", __doc__, {"task": TASKS}, words)
    check_inputs(config)
    run = Path(config.run.folder) / config.run.name
    folders = [run / f"fold-{fold}" for fold in range(own.folds)]
    if (run / f"fold-{own.folds}").exists() or (run / "best.pt").exists():
        raise UserError(f"{run} has a run of another kind or of more folds: choose another --run.name")
    for fold, folder in enumerate(folders):
        place = ["--run.folder", str(run), "--run.name", folder.name]
        more = [*words, "--data.folds", str(own.folds), "--data.fold", str(fold), *place]
        if finished(folder, more):
            say(f"fold {fold} is complete: {folder}")
            continue
        say(f"fold {fold} of {own.folds}: {folder}")
        train(own.launcher, more)
        write_atomic(folder / "complete.json", json.dumps(more).encode())
    summarise(run, folders)


def finished(folder: Path, words: list[str]) -> bool:
    """Whether a fold was trained to its end with the same command."""
    record = folder / "complete.json"
    return record.exists() and json.loads(record.read_bytes()) == words


def train(launcher: str, words: list[str]) -> None:
    """Run finetune/main.py; ends with its exit code unless it succeeds. It is asked to stop when this process is."""
    program = [sys.executable] if launcher == "python" else [str(Path(sys.executable).with_name("deepspeed"))]
    child: list[subprocess.Popen] = []
    # Ctrl-C reaches the whole process group; the child saves a checkpoint, so only wait for it
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in child])
    child.append(subprocess.Popen([*program, str(ROOT / "finetune/main.py"), *words]))
    if code := child[0].wait():
        if code != MISTAKE:
            print(f"the fold ended with exit code {code}; the same command resumes it", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def summarise(run: Path, folders: list[Path]) -> None:
    """Print and write the scores of each fold's best weights, their mean and sample standard deviation."""
    from statistics import mean, stdev

    runs = [json.loads((folder / "summary.json").read_bytes()) for folder in folders]
    scores = {}
    for key in runs[0]["best"]:
        values = [found["best"].get(key) for found in runs]
        if key != "epoch" and all(isinstance(value, (int, float)) for value in values):
            scores[key] = {"mean": mean(values), "std": stdev(values), "values": values}
    result = {"stage": "cross-validation", "folds": len(folders), "scores": scores, "init": runs[0]["init"]}
    result |= {"command": shlex.join(sys.argv), "runs": list(map(str, folders))}
    write_atomic(run / "summary.json", json.dumps(result, indent=1).encode())
    for folder, found in zip(folders, runs, strict=True):
        say(f"{folder.name}: {found['shown']}")
    for key, row in scores.items():
        if key != "images":
            say(f"{key:<20} mean {row['mean']:.4f}, standard deviation {row['std']:.4f}")
    say(f"wrote {run / 'summary.json'}")


if __name__ == "__main__":
    run_main(main)
