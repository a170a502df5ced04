"""This project's weight files: fcmae.pt (pretraining), best.pt and last.pt (fine-tuning).

A file is a dict of tensors and plain values, readable with `torch.load(weights_only=True)`:

    format              "convnext-fcmae/1"
    arch                the encoder: name, channels, stem_stride, depths, dims
    image               preprocessing: size [H, W], mean and std per channel (None = unknown), eval_crop, interpolation,
                        bit_depth; the last three are optional (see configs/preprocessing.py)
    encoder             tensors under timm's names
    decoder             pretraining: proj, mask_token, decoder, pred; or the other parts of another objective's model
    decoder_config      pretraining: settings of the masked autoencoder, or of another objective
    head                classifier: head.norm and head.fc; or the head of another task
    ema                 fine-tuning: moving average of encoder and head, or None
    classes             class names, or None
    task                fine-tuning: name of the task in finetune/tasks; missing or None in older files
    objective           pretraining: name of the objective in pretrain/objectives; likewise

For other projects' files see models/formats.
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
from configs.files import atomic_file
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, FCMAESettings, PretrainModel
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.sizes import resolve

FORMAT = "convnext-fcmae/1"
MAX_LISTED = 20  # names in an error message
DECODER = ("proj.", "mask_token", "decoder.", "pred.")  # prefixes of its tensors
Tensors = dict[str, Tensor]


@dataclass
class Weights:
    """Content of a weight file; see the module's docstring."""

    arch: Encoder
    preprocessing: Preprocessing
    encoder: Tensors
    decoder: Tensors = field(default_factory=dict)
    decoder_config: dict = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    ema: Tensors | None = None
    classes: list[str] | None = None
    task: str | None = None
    objective: str | None = None

    @property
    def outputs(self) -> int:
        """Number of classes of the classifier; 0 without one."""
        head = self.known().head
        return len(head["head.fc.bias"]) if "head.fc.bias" in head else 0

    def known(self) -> "Weights":
        """Without the decoder of an objective other than FCMAE, and without the head of a task other than
        classification: those check and load theirs themselves.
        """
        decoder = (self.decoder, self.decoder_config) if self.objective in (None, "fcmae") else ({}, {})
        head = self.head if self.task in (None, "classification") else {}
        return replace(self, decoder=decoder[0], decoder_config=decoder[1], head=head)

    def describe(self) -> str:
        """One line: model, number of parameters, and parts present."""
        arch = self.arch
        parts = {"encoder": self.encoder, "decoder": self.decoder, "head": self.head, "EMA": self.ema}
        present = ", ".join(name for name, tensors in parts.items() if tensors)
        millions = sum(tensor.numel() for tensor in self.encoder.values()) / 1e6
        return (
            f"{arch.name} ({millions:.1f}M, input channels {arch.channels}, stem stride {arch.stem_stride}): {present}"
        )


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


def load_file(path: str | Path) -> dict:
    """Load a file of `torch.save` without executing code: tensors, plain values and `argparse.Namespace` only.

    Official checkpoints store their command line as a Namespace, which has no behaviour.

    Raises:
        UserError: the file is missing, truncated, not a dict, or contains an object of another class
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}: give a weight file")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # bare pickles of older torch versions are refused
            raise UserError(
                f"{path} is truncated or not a weight file (a zip, as torch.save writes since 1.6): copy it again"
            )
        if _is_exported_program(file):
            raise UserError(f"{path} is an exported program, not weights: give the file that it was exported from")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} contains code or objects besides tensors and plain values{_forbidden_global(path)}: refused, "
            "nothing was executed; save its state_dict alone"
        ) from None
    except Exception as error:  # damaged bytes can raise anything in the reader
        raise UserError(f"{path} is truncated or not a weight file ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    return content


def _forbidden_global(path: Path) -> str:
    """The first class or function that a file would import, in brackets; empty if the file is unreadable."""
    with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):
        return f" ({torch.serialization.get_unsafe_globals_in_checkpoint(path)[0]})"
    return ""


def _is_exported_program(file: BinaryIO) -> bool:
    """Whether a zip was written by torch.jit.save or torch.export.save."""
    try:
        members = zipfile.ZipFile(file).namelist()
    except (zipfile.BadZipFile, ValueError, OSError):  # damaged: torch.load reports it
        return False
    return any("/code/" in member or member.endswith("/archive_format") for member in members)


def from_content(content: dict, path: str | Path) -> Weights:
    """Parse and check the content of a file in this project's format.

    Raises:
        UserError: a part is missing, or the tensors do not match the file's architecture
    """
    fields = {key: value for key, value in content.items() if key not in ("format", "arch", "image")}
    try:
        arch = resolve(Encoder(**content["arch"]))
        weights = Weights(arch, Preprocessing.from_dict(content["image"], arch.channels), **fields)
        parts = weights.encoder | weights.decoder | weights.head
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is a damaged weight file ({reason(error)}): write it again") from None
    except UserError as error:
        raise UserError(f"{path} is a damaged weight file ({error}): write it again") from None
    check_tensors(path, parts)
    known = weights.known()
    needed = _shapes(expected_tensors(weights.arch, known.encoder | known.decoder | known.head))
    decoder, others = split_by_prefix(needed, DECODER)
    head, encoder = split_by_prefix(others, "head.")
    check_shapes(path, encoder, _shapes(known.encoder))
    check_shapes(path, decoder, _shapes(known.decoder))
    check_shapes(path, head, _shapes(known.head))
    if weights.ema is not None:
        check_tensors(path, weights.ema)
        check_shapes(path, encoder | _shapes(weights.head), _shapes(weights.ema))
    return weights


def expected_tensors(arch: Encoder, present: Tensors) -> Tensors:
    """All tensors, on the meta device, of the encoder and of those parts (decoder, head) that `present` has tensors of.

    The widths of head and decoder are inferred from `present`; names are this project's.
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


def _shapes(tensors: Tensors) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_strict(module: nn.Module, tensors: Tensors, path: str | Path, ignore: str | None = None) -> None:
    """Load tensors into a module; parameters whose names start with `ignore` keep their values.

    Raises:
        UserError: lists missing, unexpected and misshapen tensors; the module is unchanged
    """
    own = module.state_dict()
    if ignore is not None:
        _, own = split_by_prefix(own, ignore)
    check_shapes(path, _shapes(own), _shapes(tensors))
    module.load_state_dict(tensors, strict=False)


def check_shapes(path: str | Path, expected: dict[str, tuple], actual: dict[str, tuple]) -> None:
    """Raise a `UserError` that lists missing names, unexpected names and wrong shapes."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"unexpected {name}" for name in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{name} is {list(actual[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & actual.keys())
        if actual[name] != expected[name]
    ]
    if problems:
        more = f", and {len(problems) - MAX_LISTED} more" if problems[MAX_LISTED:] else ""
        raise UserError(f"{path} contains another model: {', '.join(problems[:MAX_LISTED])}{more}")


def other_channels(tensors: Tensors, channels: int) -> Tensors:
    """Adapt the stem, and the prediction layer if present, to another number of input channels.

    Kernels of the old channels are repeated cyclically and scaled, so that an image with equal channels gives about the
    same tokens; for one channel they are summed. The prediction layer repeats the old channels in the same order.
    """
    stem = tensors["stem.0.weight"]
    old = stem.shape[1]
    source = torch.arange(channels) % old
    new = stem.sum(1, keepdim=True) if channels == 1 else stem[:, source] * (old / channels)
    adapted = tensors | {"stem.0.weight": new}
    for name in ("pred.weight", "pred.bias"):
        if name in tensors:  # [P * P * C, ...], ordered (row, column, channel)
            adapted[name] = tensors[name].unflatten(0, (-1, old))[:, source].flatten(0, 1)
    return adapted
