"""The experiments of docs/results.md: scales, ablations, backends. `evidence.py` runs them."""

from dataclasses import dataclass

FEW = 0.1  # share of the labels for comparing ablations
SEEDS = (0, 1, 2)  # of fine-tuning; a seed also samples the share of the labels
ABLATIONS = {  # title and options
    **{f"mask-{ratio}": (f"mask ratio {ratio}", "--objective.mask_ratio", ratio) for ratio in (0.4, 0.6, 0.75, 0.9)},
    "zeroed": ("dense convolutions, hidden patches set to zero", "--model.backend", "zeroed"),
    "decoder-2": ("decoder of 2 blocks", "--objective.decoder_depth", 2),
    "decoder-4": ("decoder of 4 blocks", "--objective.decoder_depth", 4),
    "without-grn": ("ConvNeXt V1 blocks: layer scale, no GRN", "--model.name", "convnext_atto"),
}
MUON = ("--optim.name", "muon", "--optim.lr")  # and the rate
BACKENDS = ("packed", "masked", "minkowski")
# options for comparing backends: a tenth of the images, fp32, no probe
COMPARED = ("--data.split", "val", "--optim.precision", "fp32", "--probe.every", 0, "--run.log_every", 1)


@dataclass(frozen=True)
class Scale:
    """The experiments for one kind of machine."""

    recipe: str  # name of the recipes in configs/pretrain and configs/finetune
    budgets: dict[float, tuple[int, int, int]]  # share of the labels: epochs, batch size, epochs between evaluations
    rates: tuple[float, ...]  # base learning rates to select from; extended while the best is the first or last
    base: str  # the one of `ABLATIONS` that equals the recipe
    ablation: tuple  # pretraining options of all ablations
    ablation_rate: float  # base learning rate of their fine-tuning
    ablation_seeds: int  # number of seeds of their fine-tuning
    backend_epochs: int  # of the pretrainings that compare backends
    masks: dict[float, int]  # mask ratio: epochs, which take equal time, of the comparison with several seeds
    mask_rates: tuple[float, ...]  # as `rates`, after these short pretrainings
    objectives: dict[str, tuple]  # by name: title, recipe in configs/pretrain, options; in the time of `labels`


SCALES = {
    "cpu": Scale(
        recipe="cifar10-small",
        budgets={0.01: (80, 50, 10), 0.1: (24, 100, 4)},
        rates=(8e-3, 16e-3, 32e-3),
        base="mask-0.75",
        ablation=("--optim.epochs", 10, "--run.picture_every", 2),
        ablation_rate=16e-3,
        ablation_seeds=1,
        backend_epochs=4,
        masks={0.6: 8, 0.75: 10},
        mask_rates=(4e-3, 8e-3),
        objectives={
            "muon": ("FCMAE, Muon", "cifar10-small-muon"),
            "lejepa": ("FCMAE and LeJEPA, Muon", "cifar10-small-lejepa"),
        },
    ),
    "gpu": Scale(
        recipe="cifar10",
        budgets={0.01: (400, 64, 20), 0.1: (200, 256, 10), 1.0: (100, 256, 5)},
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        base="mask-0.6",
        ablation=("--optim.epochs", 100),
        ablation_rate=2e-3,
        ablation_seeds=3,
        backend_epochs=10,
        masks={0.6: 100, 0.75: 120},
        mask_rates=(1e-3, 2e-3),
        objectives={},
    ),
}
