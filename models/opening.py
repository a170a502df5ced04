"""Open a weight file of any format, as weights or as a classifier, encoder or autoencoder.

Used by `--init` of both stages and by every command that takes trained weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Data
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, from_flat
from models.formats.hub import digest
from models.formats.read import read_weights
from models.weights import Weights, load_strict, use_ema

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Opened:
    """A weight file or model folder, and its content."""

    path: str
    weights: Weights
    format: str = "ours"  # one of `models.formats.FORMATS`
    remarks: Sequence[str] = ()  # defaults assumed for values that the file does not specify

    @cached_property
    def digest(self) -> str:
        """Short hash of the content."""
        return digest(self.path)


@dataclass(frozen=True)
class Trained:
    """A model with trained weights, in evaluation mode."""

    path: str  # file or folder that it was read from
    model: nn.Module  # a `ConvNeXt`, without a head if opened as an encoder, or an `FCMAE`
    weights: Weights  # of this model only; the preprocessing has mean, std and the requested size

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing that the model expects."""
        return self.weights.preprocessing

    @property
    def mean(self) -> Tensor:
        """Mean of the input channels, [C]."""
        return torch.tensor(self.preprocessing.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the input channels, [C]."""
        return torch.tensor(self.preprocessing.std)


def open_weights(path: str | Path) -> Opened:
    """Read weights of any format. Raises `UserError` if the file is unreadable or not a ConvNeXt."""
    return Opened(str(path), *read_weights(path))


def open_classifier(path: str, ema: bool = False, size: Size | None = None) -> Trained:
    """Build the classifier of a file. The model of another task has no head yet: the task adds its own.

    Args:
        path: best.pt, or a file or folder of another format
        ema: use the averaged weights instead of the raw ones
        size: image side, or height and width, pixels; None = as in the file
    Raises:
        UserError: the file lacks a classifier, averaged weights, or mean and std; or the size does not fit the model
    """
    weights = open_weights(path).weights
    if not (weights.outputs if weights.known().head else weights.head):
        raise UserError(f"{path} has no classifier: fine-tune it first, with python finetune/main.py --init {path}")
    return _build_convnext(path, use_ema(weights, path) if ema else weights, size)


def open_encoder(path: str, ema: bool = False, size: Size | None = None) -> Trained:
    """Build the encoder of a classifier or autoencoder, without a head. Arguments and errors: see `open_classifier`."""
    weights = open_weights(path).weights
    weights = use_ema(weights, path) if ema else weights
    return _build_convnext(path, replace(weights, head={}, classes=None), size)


def open_autoencoder(path: str, mask_ratio: float | None = None, size: Size | None = None) -> Trained:
    """Build the masked autoencoder of a file; `mask_ratio` overrides the file's. Errors: see `open_classifier`."""
    weights = open_weights(path).weights.known()
    if not weights.decoder:
        raise UserError(f"{path} has no decoder of pixels: give the fcmae.pt of a pretraining run")
    weights = replace(weights, preprocessing=_preprocessing(path, weights, size), ema=None)
    config, settings = from_flat(weights.decoder_config | {"backend": "packed", "recompute": "none"})
    model = FCMAE(config, settings if mask_ratio is None else replace(settings, mask_ratio=mask_ratio))
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    load_strict(model, encoder | weights.decoder, path)
    return Trained(path, model.eval(), weights)


def _build_convnext(path: str, weights: Weights, size: Size | None) -> Trained:
    weights = replace(weights, preprocessing=_preprocessing(path, weights, size), decoder={}, ema=None)
    model = ConvNeXt(weights.arch, weights.outputs)
    load_strict(model, weights.encoder | weights.known().head, path)
    return Trained(path, model.eval(), weights)


def _preprocessing(path: str, weights: Weights, size: Size | None) -> Preprocessing:
    """The file's preprocessing at the requested size. Raises `UserError` if it lacks mean and std."""
    stored = weights.preprocessing
    if stored.mean is None:
        problem = f"does not record mean and std of its {stored.channels} channels"
        raise UserError(f"{path} {problem}: use an fcmae.pt or best.pt")
    data = Data(size=size or stored.size)
    data.grid(weights.arch.stem_stride)  # raises for a size that is not a multiple of the patch
    return replace(stored, size=data.height_width)
