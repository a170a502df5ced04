"""Run the experiments of docs/results.md, in sequence, with the project's own commands.

bash launch/evidence.sh cpu cifar10.tar.xz                     CIFAR-10: all parts, sized for a machine without a GPU
bash launch/evidence.sh gpu cifar10.tar.xz labels              one part
bash launch/evidence.sh gpu cifar10.tar.xz mask-0.6 mask-0.9   some of the ablations
bash launch/evidence.sh camvid camvid/ --others photos/        segmentation of street scenes
bash launch/evidence.sh bccd bccd/ --others photos/            detection of blood cells
bash launch/evidence.sh cpu cifar10.tar.xz --dry-run           only print the commands

Parts: labels = fine-tuning with few labels, from FCMAE weights and from scratch, with probes during pretraining;
objectives = other objectives and optimizers in the time of FCMAE; masks = mask ratios with several seeds;
backends = the same pretraining on every backend; ablations = mask ratio, decoder depth, sparse convolution, GRN.
On two CPU cores, two of these commands in parallel, each with OMP_NUM_THREADS=1, finish sooner than in sequence.

The same command resumes if interrupted. Learning rates are selected at the first seed, on CIFAR-10 by 5,000 validation
images; its test images are scored once, at the end.

CIFAR-10 is a tar or folder with train/CLASS/*.jpg (50,000) and test/CLASS/*.jpg (10,000); camvid/ has images/SPLIT/,
labels/SPLIT/ and classes.txt (11 classes, 11 = none); bccd/ has train/, val/, train.json and val.json (COCO).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from bench.dense_evidence import DOMAINS, Dense
from bench.experiments import ABLATIONS, BACKENDS, COMPARED, FEW, SCALES, SEEDS
from bench.runner import Runner, run_name
from configs.checks import check_exists
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import argument, option

SHARDS = Path("shards/cifar10")


class Evidence:
    """The experiments of one scale; arguments as `Runner`'s."""

    def __init__(self, scale: str, dry: bool, save: bool):
        self.scale, self.runner = SCALES[scale], Runner(f"cifar10-{scale}", dry, save)

    def train(self, stage: str, name: str, *more: object) -> dict:
        """Train as a run of this name, and return its summary."""
        return self.runner.train(stage, self.scale.recipe, SHARDS, name, *more)

    def finetune(self, start: str, share: float, rate: float, seed: int) -> dict:
        """Fine-tune from a pretraining, or from `scratch`, with a share of the labels."""
        init = "none" if start == "scratch" else self.runner.runs / start / "fcmae.pt"
        epochs, batch_size, eval_every = self.scale.budgets[share]
        words = ("--init", init, "--task.label_share", share, "--optim.lr", rate, "--run.seed", seed)
        words += ("--optim.epochs", epochs, "--optim.batch_size", batch_size, "--run.eval_every", eval_every)
        return self.train("finetune", run_name(start, share, rate, seed), *words)

    def best_rate(self, start: str, share: float, rates: tuple[float, ...] = ()) -> float:
        """The learning rate, of `rates` or the scale's, with the best validation accuracy at the first seed."""
        return self.runner.best_rate(
            rates or self.scale.rates, lambda rate: self.finetune(start, share, rate, SEEDS[0])["best"]["top1"]
        )

    def test(self, name: str) -> None:
        """Score a fine-tuned model on the test images."""
        folder = self.runner.runs / name
        words = (folder / "best.pt", SHARDS, "--split", "test", "--out", folder / "test")
        keep = ("split", "scores")
        self.runner.run(f"{name}-test", f"{name}/test/evaluation.json", "finetune/evaluate.py", *words, keep=keep)

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

    def objectives(self) -> None:
        """Objectives and optimizers at equal time: two seeds of each, fine-tuned with few labels as in `labels`."""
        for name, (_, recipe, *options) in self.scale.objectives.items():
            starts = {seed: f"objective-{name}-seed-{seed}" for seed in SEEDS[:2]}
            for seed, start in starts.items():
                self.runner.train("pretrain", recipe, SHARDS, start, *options, "--run.seed", seed)
            for share in sorted(self.scale.budgets)[:2]:
                rate = self.best_rate(starts[SEEDS[0]], share)
                for seed, start in starts.items():
                    self.finetune(start, share, rate, seed)
                    self.test(run_name(start, share, rate, seed))

    def masks(self) -> None:
        """Mask ratios at equal time, with all seeds of pretraining, fine-tuned with few labels."""
        for ratio, epochs in self.scale.masks.items():
            starts = {seed: f"masks-{ratio}-seed-{seed}" for seed in SEEDS}
            for seed, start in starts.items():
                words = ("--objective.mask_ratio", ratio, "--optim.epochs", epochs, "--run.seed", seed)
                self.train("pretrain", start, *words)
            rate = self.best_rate(starts[SEEDS[0]], FEW, self.scale.mask_rates)
            for seed, start in starts.items():
                self.finetune(start, FEW, rate, seed)

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


PARTS = {
    "labels": Evidence.labels,
    "objectives": Evidence.objectives,
    "masks": Evidence.masks,
    "backends": Evidence.backends,
    "ablations": Evidence.ablations,
}
CHOICES = (*PARTS, *ABLATIONS)


@dataclass(frozen=True)
class Options:
    """The command line."""

    experiment: Literal[(*SCALES, *DOMAINS)] = argument(f"{' or '.join(SCALES)}: CIFAR-10; or {', '.join(DOMAINS)}")
    source: Path = argument("CIFAR-10 as a tar or folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or the folder")
    parts: tuple[Literal[CHOICES], ...] = argument(
        f"of CIFAR-10: any of {', '.join(CHOICES)}; default: {', '.join(PARTS)}", default=()
    )
    others: Path | None = option(None, f"of {' and '.join(DOMAINS)}: other images to pretrain on, for comparison")
    dry_run: bool = option(False, "only print the commands")
    save: bool = option(False, "also copy the summaries to bench/results")


def main() -> None:
    """Entry point."""
    args = parse_options(Options, __doc__, prog="bash launch/evidence.sh")
    if args.experiment in DOMAINS:
        check_exists(args.source, "the folder of the collection")
        Dense(args.experiment, args.source, args.others, args.dry_run, args.save).run()
        return
    check_exists(args.source, "CIFAR-10 as a tar or folder with train/CLASS/*.jpg and test/")
    evidence = Evidence(args.experiment, args.dry_run, args.save)
    if not (SHARDS / "index.json").exists():
        evidence.runner.call("data/prepare.py", args.source, SHARDS, "--val-fraction", "0.1", "--no-plan")
    for part in args.parts or PARTS:
        if part in PARTS:
            PARTS[part](evidence)
        else:
            evidence.ablations([part])


if __name__ == "__main__":
    run_main(main)
