"""Run the experiments of docs/results.md on CIFAR-10, in sequence, with the project's own commands.

bash launch/evidence.sh cpu cifar10.tar.xz                     all parts, sized for a machine without a GPU
bash launch/evidence.sh gpu cifar10.tar.xz labels              one part
bash launch/evidence.sh gpu cifar10.tar.xz mask-0.6 mask-0.9   some of the ablations
bash launch/evidence.sh cpu cifar10.tar.xz --dry-run           only print the commands

Parts: labels = fine-tuning with few labels, from FCMAE weights and from scratch, with probes during pretraining;
backends = the same pretraining on every backend; ablations = mask ratio, decoder depth, sparse convolution, GRN.
On two CPU cores, two of these commands in parallel, each with OMP_NUM_THREADS=1, finish sooner than in sequence.

CIFAR10 is a tar or folder with train/CLASS/*.jpg (50,000) and test/CLASS/*.jpg (10,000). The same command resumes if
interrupted. Learning rates are selected on 5,000 validation images; test images are scored once, at the end.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from bench.experiments import ABLATIONS, BACKENDS, COMPARED, FEW, SCALES, SEEDS
from bench.options import RESULTS
from configs.checks import check_exists
from configs.command import parse_options
from configs.errors import run_main
from configs.files import write_atomic
from configs.keys import argument, option

SHARDS = Path("shards/cifar10")


class Evidence:
    """The runs of one scale; finished ones are not repeated.

    Args:
        scale: key of `SCALES`
        dry: only print the commands
        save: also copy the results to bench/results, from which docs/results.md is generated
    """

    def __init__(self, scale: str, dry: bool, save: bool):
        self.scale, self.dry = SCALES[scale], dry
        self.runs = Path(f"runs/evidence-{scale}")
        self.saved = RESULTS / f"cifar10-{scale}" if save else None

    def run(self, name: str, result: str, *words: object, keep: tuple[str, ...] = ()) -> dict:
        """Run a command unless it is done; the JSON that it wrote to RUNS/`result`: the keys in `keep`, () = all."""
        done = self.runs / f"done/{name}.json"
        if not done.exists():
            command = self.call(*words)
            if self.dry:
                return {"best": {"top1": 0.0}}
            written = json.loads((self.runs / result).read_text())
            written = {"command": command} | {key: written[key] for key in keep or written}
            done.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(done, (json.dumps(written, indent=1) + "\n").encode())
        if self.saved:
            self.saved.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(done, self.saved / done.name)
        return json.loads(done.read_text())

    def call(self, *words: object) -> str:
        """Print a command, run it unless this is a dry run, and return it. Exits if the command fails."""
        command = shlex.join(["python", *map(str, words)])
        print(f"\033[1m$ {command}\033[0m", flush=True)
        if not self.dry and (code := subprocess.run([sys.executable, *map(str, words)], check=False).returncode):
            sys.exit(code)  # the command has printed why
        return command

    def train(self, stage: str, name: str, *more: object) -> dict:
        """Train as a run of this name, and return its summary."""
        recipe = f"configs/{stage}/{self.scale.recipe}.yaml"
        words = ("--config", recipe, "--data.path", SHARDS, "--run.folder", self.runs, "--run.name", name, *more)
        return self.run(name, f"{name}/summary.json", f"{stage}/main.py", *words)

    def finetune(self, start: str, share: float, rate: float, seed: int) -> dict:
        """Fine-tune from a pretraining, or from `scratch`, with a share of the labels."""
        init = "none" if start == "scratch" else self.runs / start / "fcmae.pt"
        epochs, batch_size, eval_every = self.scale.budgets[share]
        words = ("--init", init, "--task.label_share", share, "--optim.lr", rate, "--run.seed", seed)
        words += ("--optim.epochs", epochs, "--optim.batch_size", batch_size, "--run.eval_every", eval_every)
        return self.train("finetune", run_name(start, share, rate, seed), *words)

    def best_rate(self, start: str, share: float) -> float:
        """The learning rate with the best validation accuracy at the first seed; half and twice of it are tried too."""
        rates = list(self.scale.rates)
        while True:
            top1 = {rate: self.finetune(start, share, rate, SEEDS[0])["best"]["top1"] for rate in rates}
            best = max(rates, key=top1.get)
            if self.dry or best not in (min(rates), max(rates)):
                return best
            rates.append(best / 2 if best == min(rates) else best * 2)

    def test(self, name: str) -> None:
        """Score a fine-tuned model on the test images."""
        words = (self.runs / name / "best.pt", SHARDS, "--split", "test", "--out", self.runs / name / "test")
        keep = ("split", "scores")
        self.run(f"{name}-test", f"{name}/test/evaluation.json", "finetune/evaluate.py", *words, keep=keep)

    def labels(self) -> None:
        """Few labels: the best learning rate from each start, then all seeds, then the test images."""
        self.train("pretrain", "fcmae")
        starts = [(start, share) for share in sorted(self.scale.budgets) for start in ("scratch", "fcmae")]
        rates = [self.best_rate(*start) for start in starts]
        chosen = [(*start, rate, seed) for start, rate in zip(starts, rates, strict=True) for seed in SEEDS]
        for run in chosen:
            self.finetune(*run)
        for run in chosen:
            self.test(run_name(*run))

    def backends(self) -> None:
        """The same pretraining on every backend."""
        epochs = ("--optim.epochs", self.scale.backend_epochs)
        for backend in BACKENDS:
            self.train("pretrain", f"backend-{backend}", "--model.backend", backend, *COMPARED, *epochs)

    def ablations(self, names: Iterable[str] = ABLATIONS) -> None:
        """Short pretrainings that differ from the recipe in one setting, fine-tuned with few labels."""
        for name in names:
            self.train("pretrain", name, *ABLATIONS[name][1:], *self.scale.ablation)
            for seed in SEEDS[: self.scale.ablation_seeds]:
                self.finetune(name, FEW, self.scale.ablation_rate, seed)


def run_name(start: str, share: float, rate: float, seed: int) -> str:
    """Name of a fine-tuning."""
    return f"{start}-labels-{share:g}-lr-{rate:g}-seed-{seed}"


PARTS = {"labels": Evidence.labels, "backends": Evidence.backends, "ablations": Evidence.ablations}
CHOICES = (*PARTS, *ABLATIONS)


@dataclass(frozen=True)
class Options:
    """The command line."""

    scale: Literal[tuple(SCALES)] = argument("cpu or gpu: kind of machine")
    cifar10: Path = argument("tar or folder of the images, with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parts: tuple[Literal[CHOICES], ...] = argument(f"any of {', '.join(CHOICES)}; default: the first three", default=())
    dry_run: bool = option(False, "only print the commands")
    save: bool = option(False, "also copy the summaries to bench/results")


def main() -> None:
    """Entry point."""
    args = parse_options(Options, __doc__, prog="bash launch/evidence.sh")
    check_exists(args.cifar10, "CIFAR-10 as a tar or folder with train/CLASS/*.jpg and test/")
    evidence = Evidence(args.scale, args.dry_run, args.save)
    if not (SHARDS / "index.json").exists():
        evidence.call("data/prepare.py", args.cifar10, SHARDS, "--val-fraction", "0.1", "--no-plan")
    for part in args.parts or PARTS:
        if part in PARTS:
            PARTS[part](evidence)
        else:
            evidence.ablations([part])


if __name__ == "__main__":
    run_main(main)
