"""Weight files: fcmae.pt (pretraining) and classifier files (fine-tuning). Strict, atomic, and without code.

A file is a dict of tensors and plain values that `torch.load(weights_only=True)` reads:

    format, kind        "convnext-fcmae/1"; "fcmae" or "classifier"
    arch                name, channels, stem_stride, depths, dims: what it takes to build the encoder
    image               size [H, W], mean and std of each channel
    encoder             tensors under timm's names
    decoder             fcmae: proj, mask_token, decoder, pred;  decoder_config: its settings
    head, ema, classes  classifier: head's tensors, averaged weights (or None), class names; eval_crop
"""

import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError, reason
from configs.files import whole_file
from configs.schema import Encoder

FORMAT = "convnext-fcmae/1"
Tensors = dict[str, Tensor]


@dataclass
class Weights:
    """What a weight file holds."""

    kind: str
    arch: Encoder
    image: dict
    encoder: Tensors
    decoder: Tensors = field(default_factory=dict)
    decoder_config: dict = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    ema: Tensors | None = None
    classes: list[str] | None = None


def cpu_state(model: nn.Module) -> Tensors:
    """State of a model, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def divide(tensors: Tensors, prefix: str) -> tuple[Tensors, Tensors]:
    """(those whose names begin with `prefix`, the others)."""
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in tensors.items() if name not in inside}


def save(path: Path, weights: Weights) -> None:
    """Write a weight file: it is there whole or not at all."""
    content = vars(weights) | {"format": FORMAT, "arch": asdict(weights.arch)}
    with whole_file(path) as file:
        torch.save(content, file)


def load(path: str | Path) -> Weights:
    """Read a weight file.

    Raises:
        UserError: missing, truncated, of another format, or holding anything but tensors and plain values
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give the fcmae.pt that pretraining wrote")
    if not zipfile.is_zipfile(path):  # what torch.save writes is a zip; nothing else is opened
        raise UserError(f"{path} is truncated or not a weight file: copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds code or objects besides tensors and plain values: refused, nothing was run"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated or not a weight file ({reason(error)}): copy it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a weight file of this project (format {FORMAT})")
    del content["format"]
    try:
        content["arch"] = Encoder(**content["arch"])
        weights = Weights(**content)
        missing = {"size", "mean", "std"} - weights.image.keys()
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is a damaged weight file ({reason(error)}): write it again") from None
    if missing:
        raise UserError(f"{path} is a damaged weight file (no {', '.join(sorted(missing))}): write it again")
    return weights


def load_strict(module: nn.Module, tensors: Tensors, path: str | Path, ignore: str | None = None) -> None:
    """Load tensors into a module; names that begin with `ignore` keep their values.

    Raises:
        UserError: lists what is missing, unexpected or misshapen; the module is then unchanged
    """
    own = module.state_dict()
    if ignore is not None:
        _, own = divide(own, ignore)
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, needed {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:8]) + (f", and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{path} is of another model: {shown}")
    module.load_state_dict(tensors, strict=False)
