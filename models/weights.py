"""Weight files: fcmae.pt (pretraining) and classifier files (fine-tuning). Strict, atomic, and without code.

A file is a dict of tensors and plain values that `torch.load(weights_only=True)` reads:

    format              "convnext-fcmae/1"
    arch                name, channels, stem_stride, depths, dims: what it takes to build the encoder
    image               size [H, W], mean and std of each channel (None = not known); eval_crop and interpolation of a
                        classifier
    encoder             tensors under timm's names
    decoder             after pretraining: proj, mask_token, decoder, pred;  decoder_config: the model's settings
    head, ema           of a classifier: head.norm and head.fc; averaged weights, or None
    classes             class names, or None

Other projects' files are read and written by models/formats.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from configs.errors import UserError, reason
from configs.files import whole_file
from configs.schema import Encoder, FCMAESettings, PretrainModel
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.sizes import resolve

FORMAT = "convnext-fcmae/1"
LISTED = 20  # names in an error message
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
DECODER = ("proj.", "mask_token", "decoder.", "pred.")  # how its tensors' names begin
Tensors = dict[str, Tensor]


@dataclass
class Weights:
    """What a weight file holds."""

    arch: Encoder
    image: dict
    encoder: Tensors
    decoder: Tensors = field(default_factory=dict)
    decoder_config: dict = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    ema: Tensors | None = None
    classes: list[str] | None = None

    @property
    def outputs(self) -> int:
        """Classes that the head tells apart; 0 without one."""
        return len(self.head["head.fc.bias"]) if "head.fc.bias" in self.head else 0


def cpu_state(model: nn.Module) -> Tensors:
    """State of a model, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def split_by_prefix(tensors: dict, prefix: str | tuple[str, ...]) -> tuple[dict, dict]:
    """(those whose names begin with `prefix`, or with one of several; the others)."""
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return inside, {name: tensor for name, tensor in tensors.items() if name not in inside}


def save(path: Path, weights: Weights) -> None:
    """Write a weight file: it is there whole or not at all."""
    content = vars(weights) | {"format": FORMAT, "arch": asdict(weights.arch)}
    with whole_file(path) as file:
        torch.save(content, file)


def averaged(weights: Weights, path: str) -> Weights:
    """The weights with their moving average in place of the raw ones. Raises `UserError` where there is none."""
    if weights.ema is None:
        raise UserError(f"{path} holds no averaged weights: leave --ema out")
    head, encoder = split_by_prefix(weights.ema, "head.")
    return replace(weights, encoder=encoder, head=head, ema=None)


def load(path: str | Path) -> Weights:
    """Read a weight file of this project.

    Raises:
        UserError: missing, truncated, of another format, or holding anything but tensors and plain values
    """
    content = load_file(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a weight file of this project (format {FORMAT})")
    return from_content(content, path)


def load_file(path: str | Path) -> dict:
    """What `torch.save` wrote, without running code: tensors, plain values and `argparse.Namespace`, nothing else.

    The published checkpoints keep their command line as a Namespace, a class without behaviour.

    Raises:
        UserError: missing, truncated, not a dict, or holding another class
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give a weight file")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # nothing else is opened
            raise UserError(
                f"{path} is truncated or not a weight file (a zip, as torch.save writes it since 1.6): copy it again"
            )
        if _is_program(file):
            raise UserError(f"{path} is an exported program, not weights: give the file that it was made from")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds code or objects besides tensors and plain values{_foreign(path)}: "
            "refused, nothing was run; save its state_dict alone"
        ) from None
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise UserError(f"{path} is truncated or not a weight file ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _foreign(path: Path) -> str:
    """The first class or function that a file would import, in brackets; nothing if that cannot be read either."""
    with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):
        return f" ({torch.serialization.get_unsafe_globals_in_checkpoint(path)[0]})"
    return ""


def _is_program(file: BinaryIO) -> bool:
    """Whether a zip is what torch.jit.save or torch.export.save wrote."""
    try:
        members = zipfile.ZipFile(file).namelist()
    except (zipfile.BadZipFile, ValueError, OSError):  # damaged: torch tells
        return False
    return any("/code/" in member or member.endswith("/archive_format") for member in members)


def from_content(content: dict, path: str | Path) -> Weights:
    """Weights of a file's content in this project's format.

    Raises:
        UserError: something is missing, or the tensors are not those of the model that the file names
    """
    fields = {key: value for key, value in content.items() if key != "format"}
    try:
        weights = Weights(**fields | {"arch": resolve(Encoder(**fields["arch"]))})
        missing = {"size", "mean", "std"} - weights.image.keys()
        parts = weights.encoder | weights.decoder | weights.head
        if weights.image.get("interpolation", "bicubic") not in INTERPOLATIONS:
            raise ValueError(f"interpolation {weights.image['interpolation']!r}")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is a damaged weight file ({reason(error)}): write it again") from None
    except UserError as error:
        raise UserError(f"{path} is a damaged weight file ({error}): write it again") from None
    if missing:
        raise UserError(f"{path} is a damaged weight file (no {', '.join(sorted(missing))}): write it again")
    check_tensors(path, parts)
    decoder, others = split_by_prefix(_shapes(expected_tensors(weights.arch, parts)), DECODER)
    head, encoder = split_by_prefix(others, "head.")
    check_shapes(path, encoder, _shapes(weights.encoder))
    check_shapes(path, decoder, _shapes(weights.decoder))
    check_shapes(path, head, _shapes(weights.head))
    if weights.ema is not None:
        check_tensors(path, weights.ema)
        check_shapes(path, encoder | head, _shapes(weights.ema))
    return weights


def expected_tensors(arch: Encoder, found: Tensors) -> Tensors:
    """All tensors, without memory, of those parts of a model (encoder, decoder, head) that `found` has some of.

    Widths of head and decoder are read off `found`; names are ours.
    """
    with torch.device("meta"):
        tensors = ConvNeXt(arch, found["head.fc.bias"].numel() if "head.fc.bias" in found else 1).state_dict()
        if any(name.startswith(DECODER) for name in found):
            width, depth = decoder_shape(found)
            settings = FCMAESettings(decoder_dim=width, decoder_depth=depth)
            tensors |= split_by_prefix(FCMAE(PretrainModel(**asdict(arch)), settings).state_dict(), "encoder.")[1]
    for part in ("head.fc.", "head."):
        if not any(name.startswith(part) for name in found):
            _, tensors = split_by_prefix(tensors, part)
    return tensors


def decoder_shape(tensors: Tensors) -> tuple[int, int]:
    """(width, depth) of a decoder by its tensors."""
    width = next((tensors[name].numel() for name in ("mask_token", "proj.bias") if name in tensors), 1)
    return max(1, width), max(1, count(tensors, r"decoder\.(\d+)\."))


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the greatest number that the pattern finds."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def check_tensors(path: str | Path, tensors: Tensors) -> None:
    """Raise a `UserError` unless all are ordinary tensors of floating-point numbers."""
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{path}: {name} holds no floating-point numbers, but {kind}")


def _shapes(tensors: Tensors) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_strict(module: nn.Module, tensors: Tensors, path: str | Path, ignore: str | None = None) -> None:
    """Load tensors into a module; names that begin with `ignore` keep their values.

    Raises:
        UserError: lists what is missing, unexpected or misshapen; the module is then unchanged
    """
    own = module.state_dict()
    if ignore is not None:
        _, own = split_by_prefix(own, ignore)
    check_shapes(path, _shapes(own), _shapes(tensors))
    module.load_state_dict(tensors, strict=False)


def check_shapes(path: str | Path, needed: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise a `UserError` that lists the names missing from `found`, those unexpected, and those of another shape."""
    problems = [f"missing {name}" for name in sorted(needed.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - needed.keys())]
    problems += [
        f"{name} is {list(found[name])}, needed {list(needed[name])}"
        for name in sorted(needed.keys() & found.keys())
        if found[name] != needed[name]
    ]
    if problems:
        shown = ", ".join(problems[:LISTED]) + (f", and {len(problems) - LISTED} more" if problems[LISTED:] else "")
        raise UserError(f"{path} is of another model: {shown}")


def other_channels(tensors: Tensors, channels: int) -> Tensors:
    """The tensors with stem (and prediction layer, if there) for another number of input channels.

    The old channels' kernels are repeated in turn and scaled, so that the same picture in every channel gives about
    the same tokens; for one channel they are added up. A new channel is predicted as the old one that it repeats.
    """
    stem = tensors["stem.0.weight"]
    old = stem.shape[1]
    turn = torch.arange(channels) % old
    new = stem.sum(1, keepdim=True) if channels == 1 else stem[:, turn] * (old / channels)
    adapted = tensors | {"stem.0.weight": new}
    for name in ("pred.weight", "pred.bias"):
        if name in tensors:  # [P * P * C, ...], ordered (row, column, channel)
            adapted[name] = tensors[name].unflatten(0, (-1, old))[:, turn].flatten(0, 1)
    return adapted
