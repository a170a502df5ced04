"""Run the experiments of docs/results.md on CIFAR-10, one after the other, with the project's own commands.

bash launch/evidence.sh cpu cifar10.tar.xz                     all that is meant for a machine without GPU
bash launch/evidence.sh gpu cifar10.tar.xz labels              one part
bash launch/evidence.sh gpu cifar10.tar.xz mask-0.6 mask-0.9   some of the ablations
bash launch/evidence.sh cpu cifar10.tar.xz --dry-run           the commands alone

Parts: labels = fine-tuning with few labels, from FCMAE weights and from scratch, with probes along pretraining;
backends = the same pretraining on every backend; ablations = mask ratio, decoder depth, sparse convolution, GRN.
Without a GPU two of these commands beside each other, each with OMP_NUM_THREADS=1 before it, get more done than one on
two cores.

CIFAR10 is a tar or folder with train/CLASS/*.jpg (50,000) and test/CLASS/*.jpg (10,000). Started again, it goes on
where it stopped. Learning rates are chosen on 5,000 validation images; test images are looked at once, at the end.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

from bench.common import RESULTS
from configs.errors import Parser, UserError, run_main
from configs.files import write_whole

SHARDS = Path("shards/cifar10")
FEW = 0.1  # share of the labels with which variants of pretraining are compared
ABLATIONS = {
    "mask-0.4": ("--objective.mask_ratio", "0.4"),
    "mask-0.6": ("--objective.mask_ratio", "0.6"),
    "mask-0.75": ("--objective.mask_ratio", "0.75"),
    "mask-0.9": ("--objective.mask_ratio", "0.9"),
    "zeroed": ("--model.backend", "zeroed"),
    "decoder-2": ("--objective.decoder_depth", "2"),
    "decoder-4": ("--objective.decoder_depth", "4"),
    "without-grn": ("--model.name", "convnext_atto"),  # V1's block: layer scale instead of GRN
}
BACKENDS = ("packed", "masked", "minkowski")
# a tenth of the images, exact arithmetic, no probe
COMPARED = ("--data.split", "val", "--optim.precision", "fp32", "--probe.every", "0", "--run.log_every", "1")


@dataclass(frozen=True)
class Scale:
    """What a machine is asked for.

    Args:
        recipe: name of the recipes in configs/pretrain and configs/finetune
        budgets: options of fine-tuning for each share of the labels
        rates: base learning rates among which validation accuracy chooses; where an outer one is best, more are tried
        seeds: of fine-tuning; each also draws the share of the labels
        base: the one of `ABLATIONS` that is the recipe itself
        ablation: options of the pretrainings that are compared with each other
        ablation_rate: base learning rate that each of them is fine-tuned with
        ablation_seeds: how many of the seeds
        backends: options of the same pretraining on each backend
    """

    recipe: str
    budgets: dict[float, tuple[str, ...]]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    base: str
    ablation: tuple[str, ...]
    ablation_rate: float
    ablation_seeds: int
    backends: tuple[str, ...]


SCALES = {
    "cpu": Scale(
        "cifar10-small",
        {
            0.01: ("--optim.epochs", "80", "--optim.batch_size", "50", "--run.eval_every", "10"),
            0.1: ("--optim.epochs", "24", "--optim.batch_size", "100", "--run.eval_every", "4"),
        },
        (2e-3, 4e-3, 8e-3),
        (0, 1, 2),
        "mask-0.75",
        ("--optim.epochs", "10", "--run.picture_every", "2"),
        16e-3,
        1,
        ("--optim.epochs", "4"),
    ),
    "gpu": Scale(
        "cifar10",
        {
            0.01: ("--optim.epochs", "400", "--optim.batch_size", "64", "--run.eval_every", "20"),
            0.1: ("--optim.epochs", "200", "--optim.batch_size", "256", "--run.eval_every", "10"),
            1.0: ("--optim.epochs", "100", "--run.eval_every", "5"),
        },
        (5e-4, 1e-3, 2e-3, 4e-3),
        (0, 1, 2),
        "mask-0.6",
        ("--optim.epochs", "100"),
        2e-3,
        3,
        ("--optim.epochs", "10"),
    ),
}


class Evidence:
    """The runs of one machine, each done once.

    Args:
        scale: its name in `SCALES`
        dry: print commands, run none
        save: also write what came out into bench/results, of which the page is made
    """

    def __init__(self, scale: str, dry: bool, save: bool):
        self.scale, self.dry = SCALES[scale], dry
        self.runs = Path(f"runs/evidence-{scale}")
        self.saved = RESULTS / f"cifar10-{scale}" if save else None

    def run(self, name: str, result: str, *words: object, keep: tuple[str, ...] = ()) -> dict:
        """Run a command of the project unless that is done, and return the JSON that it wrote into RUNS/`result`.

        Args:
            keep: keys of it that are kept; () = all
        """
        found = self.runs / "done" / f"{name}.json"
        if not found.exists():
            command = self.call(*words)
            if self.dry:
                return {"best": {"top1": 0.0}}
            told = json.loads((self.runs / result).read_text())
            told = {"command": command} | {key: told[key] for key in keep or told}
            found.parent.mkdir(parents=True, exist_ok=True)
            write_whole(found, (json.dumps(told, indent=1) + "\n").encode())
        if self.saved:
            self.saved.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, self.saved / found.name)
        return json.loads(found.read_text())

    def call(self, *words: object) -> str:
        """Print a command, and run it unless this is a dry run; returns it."""
        command = shlex.join(["python", *map(str, words)])
        print(f"\033[1m$ {command}\033[0m", flush=True)
        if not self.dry and (code := subprocess.run([sys.executable, *map(str, words)], check=False).returncode):
            sys.exit(code)  # the command has said why
        return command

    def pretrain(self, name: str, *more: str) -> None:
        """Pretrain under a name."""
        words = ("--config", f"configs/pretrain/{self.scale.recipe}.yaml", *self._place(name), *more)
        self.run(name, f"{name}/summary.json", "pretrain/main.py", *words)

    def finetune(self, start: str, share: float, rate: float, seed: int) -> dict:
        """Fine-tune from a pretraining, or from `scratch`, with a share of the labels."""
        name = self.name(start, share, rate, seed)
        init = "none" if start == "scratch" else self.runs / start / "fcmae.pt"
        words = ("--config", f"configs/finetune/{self.scale.recipe}.yaml", "--init", init, *self._place(name))
        words += ("--task.label_share", share, "--optim.lr", rate, "--run.seed", seed, *self.scale.budgets[share])
        return self.run(name, f"{name}/summary.json", "finetune/main.py", *words)

    def best_rate(self, start: str, share: float) -> float:
        """The learning rate with the best validation accuracy, at the first seed; both its neighbours were tried."""
        rates, seed = list(self.scale.rates), self.scale.seeds[0]
        while True:
            top1 = {rate: self.finetune(start, share, rate, seed)["best"]["top1"] for rate in rates}
            best = max(rates, key=top1.get)
            if self.dry or best not in (min(rates), max(rates)):
                return best
            rates.append(best / 2 if best == min(rates) else best * 2)

    def test(self, start: str, share: float, rate: float, seed: int) -> None:
        """Score a fine-tuned model on the test images."""
        name = self.name(start, share, rate, seed)
        folder = self.runs / name / "test"
        words = ("finetune/evaluate.py", self.runs / name / "best.pt", SHARDS, "--split", "test", "--out", folder)
        self.run(f"{name}-test", f"{name}/test/evaluation.json", *words, keep=("split", "scores"))

    @staticmethod
    def name(start: str, share: float, rate: float, seed: int) -> str:
        """Name of a fine-tuning."""
        return f"{start}-labels-{share:g}-lr-{rate:g}-seed-{seed}"

    def _place(self, name: str) -> tuple[str, ...]:
        return ("--data.path", SHARDS, "--run.folder", self.runs, "--run.name", name)

    def labels(self) -> None:
        """Few labels: the best learning rate of each start, all seeds; then, once, the test images."""
        self.pretrain("fcmae")
        chosen = []
        for share in sorted(self.scale.budgets):
            for start in ("scratch", "fcmae"):
                rate = self.best_rate(start, share)
                chosen += [(start, share, rate, seed) for seed in self.scale.seeds]
        for one in chosen:
            self.finetune(*one)
        for one in chosen:
            self.test(*one)

    def backends(self) -> None:
        """The same pretraining on every backend."""
        for backend in BACKENDS:
            self.pretrain(f"backend-{backend}", "--model.backend", backend, *COMPARED, *self.scale.backends)

    def ablations(self) -> None:
        """What matters in pretraining: every ablation."""
        for name in ABLATIONS:
            self.ablation(name)

    def ablation(self, name: str) -> None:
        """A short pretraining that differs from the recipe in one thing, fine-tuned as the others are."""
        self.pretrain(name, *ABLATIONS[name], *self.scale.ablation)
        for seed in self.scale.seeds[: self.scale.ablation_seeds]:
            self.finetune(name, FEW, self.scale.ablation_rate, seed)


PARTS = {"labels": Evidence.labels, "backends": Evidence.backends, "ablations": Evidence.ablations}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="bash launch/evidence.sh", description=__doc__)
    parser.add_argument("scale", choices=SCALES, help="what the machine can do")
    parser.add_argument("cifar10", type=Path, metavar="CIFAR10", help="tar or folder of the images")
    known = [*PARTS, *ABLATIONS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; default: the first three")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--save", action="store_true", help="write the summaries to bench/results, and docs/results.md")
    args = parser.parse_args()
    if unknown := set(args.parts).difference(known):
        raise UserError(f"{', '.join(sorted(unknown))}: no such part; there are {', '.join(known)}")
    if not args.cifar10.exists():
        raise UserError(
            f"{args.cifar10}: no such file or folder; it should hold CIFAR-10 as train/CLASS/*.jpg and test/"
        )
    return args


def main() -> None:
    """Entry point."""
    args = parse()
    evidence = Evidence(args.scale, args.dry_run, args.save)
    if not (SHARDS / "index.json").exists():
        evidence.call("data/prepare.py", args.cifar10, SHARDS, "--val-fraction", "0.1")
    for part in args.parts or PARTS:
        if part in PARTS:
            PARTS[part](evidence)
        else:
            evidence.ablation(part)


if __name__ == "__main__":
    run_main(main)
