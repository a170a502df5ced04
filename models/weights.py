"""This project's weight files: fcmae.pt (pretraining), best.pt and last.pt (fine-tuning).

A file is a dict of tensors and plain values, readable with `torch.load(weights_only=True)`. Its keys are `format`
(`FORMAT`) and the fields of `Weights`, with `image` (see `Preprocessing.to_dict`) in place of `preprocessing`.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError, reason
from configs.files import atomic_file
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, FCMAESettings, PretrainModel
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.sizes import resolve

FORMAT = "convnext-fcmae/1"
MAX_LISTED = 20  # names in an error message
ENCODER = ("stem.", "stages.")  # prefixes of its tensors
DECODER = ("proj.", "mask_token", "decoder.", "pred.")
WITH_FCMAE = ("lejepa",)  # objectives that have FCMAE's decoder beside other parts
Tensors = dict[str, Tensor]


@dataclass
class Weights:
    """Content of a weight file."""

    arch: Encoder
    preprocessing: Preprocessing
    encoder: Tensors  # under timm's names
    decoder: Tensors = field(default_factory=dict)  # proj, mask_token, decoder, pred; or another objective's parts
    decoder_config: dict = field(default_factory=dict)  # settings of the masked autoencoder, or of another objective
    head: Tensors = field(default_factory=dict)  # head.norm and head.fc of a classifier, or another task's head
    ema: Tensors | None = None  # moving average of encoder and head
    classes: list[str] | None = None
    task: str | None = None  # name in finetune/tasks; None in older files, all of classification
    task_config: dict = field(default_factory=dict)  # what else the task's head is built from
    objective: str | None = None  # name in pretrain/objectives; likewise, FCMAE

    @property
    def outputs(self) -> int:
        """Number of classes of the classifier; 0 without one."""
        head = self.known().head
        return len(head["head.fc.bias"]) if "head.fc.bias" in head else 0

    def known(self) -> "Weights":
        """Only FCMAE's decoder and a classifier's head: other objectives and tasks check and load theirs."""
        decoder, settings = self.decoder, self.decoder_config
        if self.objective in WITH_FCMAE:
            decoder, _ = split_by_prefix(decoder, DECODER)
        elif self.objective not in (None, "fcmae"):
            decoder, settings = {}, {}
        head = self.head if self.task in (None, "classification") else {}
        return replace(self, decoder=decoder, decoder_config=settings, head=head)

    def describe(self) -> str:
        """One line: model, number of parameters, and parts present."""
        arch = self.arch
        parts = {"encoder": self.encoder, "decoder": self.decoder, "head": self.head, "EMA": self.ema}
        present = ", ".join(name for name, tensors in parts.items() if tensors)
        millions = sum(tensor.numel() for tensor in self.encoder.values()) / 1e6
        shape = f"{millions:.1f}M, input channels {arch.channels}, stem stride {arch.stem_stride}"
        return f"{arch.name} ({shape}): {present}"


def cpu_state(model: nn.Module) -> Tensors:
    """State dict of a model, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def split_by_prefix(tensors: dict, prefix: str | tuple[str, ...]) -> tuple[dict, dict]:
    """(tensors whose names start with a prefix, the others)."""
    matching = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return matching, {name: tensor for name, tensor in tensors.items() if name not in matching}


def save(path: Path, weights: Weights) -> None:
    """Write a weight file atomically."""
    fields = {key: value for key, value in vars(weights).items() if key != "preprocessing"}
    content = fields | {"format": FORMAT, "arch": asdict(weights.arch), "image": weights.preprocessing.to_dict()}
    with atomic_file(path) as file:
        torch.save(content, file)


def use_ema(weights: Weights, path: str) -> Weights:
    """Replace the raw weights by their moving average. Raises `UserError` if the file `path` has none."""
    if weights.ema is None:
        raise UserError(f"{path} has no averaged weights: leave --ema out")
    head, encoder = split_by_prefix(weights.ema, "head.")
    return replace(weights, encoder=encoder, head=head, ema=None)


def from_content(content: dict, path: str | Path) -> Weights:
    """Parse a file in this project's format. Raises `UserError` if a part is missing or not of its architecture."""
    fields = {key: value for key, value in content.items() if key not in ("format", "arch", "image")}
    try:
        arch = resolve(Encoder(**content["arch"]))
        weights = Weights(arch, Preprocessing.from_dict(content["image"], arch.channels), **fields)
        parts = weights.encoder | weights.decoder | weights.head
    except (TypeError, KeyError, AttributeError, ValueError, UserError) as error:
        raise UserError(f"{path} is a damaged weight file ({reason(error)}): write it again") from None
    check_tensors(path, parts)
    known = weights.known()
    expected = expected_tensors(arch, known.encoder | known.decoder | known.head)
    for part, prefixes in ((known.encoder, ENCODER), (known.decoder, DECODER), (known.head, "head.")):
        check_shapes(path, split_by_prefix(expected, prefixes)[0], part)
    check_finite(path, parts)
    if weights.ema is not None:
        check_tensors(path, weights.ema)
        check_shapes(path, weights.encoder | weights.head, weights.ema)
        check_finite(path, weights.ema)
    return weights


def expected_tensors(arch: Encoder, present: Tensors) -> Tensors:
    """All tensors, on the meta device, of the encoder and of the parts that `present` has tensors of.

    The widths of head and decoder are inferred from `present`.
    """
    with torch.device("meta"):
        tensors = ConvNeXt(arch, present["head.fc.bias"].numel() if "head.fc.bias" in present else 1).state_dict()
        if any(name.startswith(DECODER) for name in present):
            width, depth = decoder_shape(present)
            settings = FCMAESettings(decoder_dim=width, decoder_depth=depth)
            tensors |= split_by_prefix(FCMAE(PretrainModel(**asdict(arch)), settings).state_dict(), "encoder.")[1]
    for part in ("head.fc.", "head."):
        if not any(name.startswith(part) for name in present):
            _, tensors = split_by_prefix(tensors, part)
    return tensors


def decoder_shape(tensors: Tensors) -> tuple[int, int]:
    """(width, depth) of a decoder, inferred from its tensors."""
    width = next((tensors[name].numel() for name in ("mask_token", "proj.bias") if name in tensors), 1)
    return max(1, width), max(1, count_modules(tensors, r"decoder\.(\d+)\."))


def count_modules(names: Iterable[str], pattern: str) -> int:
    """One more than the highest index, the pattern's group, in parameter names."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def check_tensors(path: str | Path, tensors: Tensors) -> None:
    """Raise `UserError` unless all values are dense floating-point tensors."""
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{path}: {name} must be a floating-point tensor, not {kind}")


def check_finite(path: str | Path, tensors: Tensors) -> None:
    """Raise `UserError` for tensors with NaN or infinity, which are named."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if bad[5:] else "")
        raise UserError(f"{path} has numbers that are not finite in {shown}: use weights from before they diverged")


def load_strict(module: nn.Module, tensors: Tensors, path: str | Path, ignore: str | tuple[str, ...] = ()) -> None:
    """Load tensors into a module; parameters whose names start with `ignore` keep their values.

    Raises the `UserError` of `check_shapes`; the module is then unchanged.
    """
    check_shapes(path, split_by_prefix(module.state_dict(), ignore)[1], tensors)
    module.load_state_dict(tensors, strict=False)


def check_shapes(path: str | Path, expected: Tensors, actual: Tensors) -> None:
    """Raise a `UserError` that lists missing names, unexpected names and wrong shapes."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"unexpected {name}" for name in sorted(actual.keys() - expected.keys())]
    for name in sorted(expected.keys() & actual.keys()):
        found, wanted = list(actual[name].shape), list(expected[name].shape)
        problems += [f"{name} is {found}, expected {wanted}"] if found != wanted else []
    if problems:
        more = f", and {len(problems) - MAX_LISTED} more" if problems[MAX_LISTED:] else ""
        raise UserError(f"{path} contains another model: {', '.join(problems[:MAX_LISTED])}{more}")
