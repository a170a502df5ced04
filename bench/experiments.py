"""The experiments of docs/results.md: scales, ablations, backends. `evidence.py` runs them."""

from dataclasses import dataclass

FEW = 0.1  # share of the labels for comparing ablations
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
# options for comparing backends: a tenth of the images, fp32, no probe
COMPARED = ("--data.split", "val", "--optim.precision", "fp32", "--probe.every", "0", "--run.log_every", "1")


@dataclass(frozen=True)
class Scale:
    """The experiments for one kind of machine.

    Args:
        recipe: name of the recipes in configs/pretrain and configs/finetune
        budgets: fine-tuning options by share of the labels
        rates: base learning rates to select from by validation accuracy; extended while the best is the first or last
        seeds: of fine-tuning; a seed also samples the share of the labels
        base: the one of `ABLATIONS` that equals the recipe
        ablation: pretraining options of all ablations
        ablation_rate: base learning rate of their fine-tuning
        ablation_seeds: number of seeds of their fine-tuning
        backends: pretraining options for comparing backends
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
