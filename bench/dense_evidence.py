"""The experiments of docs/results.md on segmentation and detection: does pretraining on the same images pay?"""

from dataclasses import dataclass
from pathlib import Path

from bench.experiments import MUON, SEEDS
from bench.runner import Runner, run_name


@dataclass(frozen=True)
class Domain:
    """A collection, its task and the budget of its runs. Recipes are in configs/pretrain and configs/finetune."""

    recipe: str
    images: str  # folder in the collection
    targets: tuple[str, ...]  # options of prepare; names end with / or a suffix if they are files of the collection
    metric: str
    title: str
    budgets: dict[float, tuple[int, int]]  # share of the labels: epochs, epochs between evaluations
    rates: tuple[float, ...]  # base learning rates to select from; extended while the best is the first or last
    rivals: dict[str, tuple]  # other pretrainings on the same images in the same time, by name: options


LEJEPA = ("--objective.name", "lejepa", "--objective.mask_ratio", 0.6, "--data.repeats", 4, *MUON)
DOMAINS = {
    "camvid": Domain(
        recipe="camvid",
        images="images",
        targets=("--masks", "labels/", "--mask-classes", "classes.txt", "--ignore", "11"),
        metric="miou",
        title="mIoU of segmentation",
        budgets={0.1: (80, 20), 1.0: (15, 5)},
        rates=(1.6e-2, 3.2e-2, 6.4e-2),
        rivals={
            "muon": (*MUON, 3.2e-2, "--optim.epochs", 260),
            "lejepa": (*LEJEPA, 1e-2, "--objective.decoder_dim", 256, "--optim.batch_size", 120, "--optim.epochs", 300),
        },
    ),
    "bccd": Domain(
        recipe="bccd",
        images="",
        targets=("--boxes", "train.json", "--val-boxes", "val.json"),
        metric="ap50",
        title="AP50 of detection",
        budgets={0.1: (100, 25), 1.0: (12, 4)},
        rates=(1e-2, 2e-2, 4e-2),
        rivals={},
    ),
}


class Dense:
    """Fine-tuning on a domain from pretraining on its images, from scratch and, if given, from FCMAE on `others`."""

    def __init__(self, name: str, source: Path, others: Path | None, dry: bool, save: bool):
        self.domain, self.source, self.others = DOMAINS[name], source, others
        self.runner = Runner(name, dry, save)
        self.shards = Path(f"shards/{name}")

    def run(self) -> None:
        """Prepare and pretrain; select the learning rate of each start and run all seeds; then start from `others`."""
        self.prepare(self.shards, self.source / self.domain.images, *map(self.place, self.domain.targets))
        self.pretrain("fcmae", self.shards)
        for name, options in self.domain.rivals.items():
            self.pretrain(name, self.shards, *options)
        rates = {}
        for share in self.domain.budgets:
            for start in ("fcmae", "scratch", *self.domain.rivals):
                rates[start, share] = self.best_rate(start, share)
                for seed in SEEDS[1:]:
                    self.finetune(start, share, rates[start, share], seed)
        if self.others:
            shards = Path(f"shards/{self.domain.recipe}-others")
            self.prepare(shards, self.others)
            self.pretrain("fcmae-others", shards)
            for share in self.domain.budgets:
                for seed in SEEDS:
                    self.finetune("fcmae-others", share, rates["fcmae", share], seed)

    def prepare(self, shards: Path, images: Path, *targets: object) -> None:
        """Write shards, unless they are there."""
        if not (shards / "index.json").exists():
            self.runner.call("data/prepare.py", images, shards, *targets, "--no-plan")

    def place(self, word: str) -> str | Path:
        """An option of prepare, or the path of a file or folder of the collection."""
        return self.source / word if word.endswith("/") or "." in word else word

    def pretrain(self, name: str, shards: Path, *options: object) -> None:
        """Pretrain by the recipe of the domain."""
        self.runner.train("pretrain", self.domain.recipe, shards, name, *options)

    def best_rate(self, start: str, share: float) -> float:
        """The learning rate with the best score at the first seed."""
        return self.runner.best_rate(self.domain.rates, lambda rate: self.finetune(start, share, rate, SEEDS[0]))

    def finetune(self, start: str, share: float, rate: float, seed: int) -> float:
        """The best score of a fine-tuning."""
        init = "none" if start == "scratch" else self.runner.runs / start / "fcmae.pt"
        epochs, every = self.domain.budgets[share]
        words = ("--init", init, "--task.label_share", share, "--optim.lr", rate, "--run.seed", seed)
        words += ("--optim.epochs", epochs, "--optim.warmup_epochs", max(1, epochs // 15), "--run.eval_every", every)
        name = run_name(start, share, rate, seed)
        return self.runner.train("finetune", self.domain.recipe, self.shards, name, *words)["best"][self.domain.metric]
