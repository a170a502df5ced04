"""Opening a model file of any format: its weights, and the classifier, encoder or autoencoder that they build.

Used by `--init` of both stages and by every command that takes trained weights.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Data
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, from_flat
from models.formats.containers import digest
from models.formats.read import read_weights
from models.weights import Weights, load_strict, use_ema

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Opened:
    """A weight file.

    Args:
        path: file or folder
        weights: its content
        format: one of `models.formats.FORMATS`
        remarks: what the file does not specify, and what is assumed instead
    """

    path: str
    weights: Weights
    format: str = "ours"
    remarks: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Short hash of the file."""
        return digest(self.path)


@dataclass(frozen=True)
class Trained:
    """A model with trained weights, ready for use.

    Args:
        path: file or folder that it was read from
        model: in evaluation mode; a `ConvNeXt`, without a head if opened as an encoder, or an `FCMAE`
        weights: the weights of this model alone; its preprocessing has known statistics and the requested size
    """

    path: str
    model: nn.Module
    weights: Weights

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing in use."""
        return self.weights.preprocessing

    @property
    def mean(self) -> Tensor:
        """Mean of the input channels, [C]."""
        return torch.tensor(self.preprocessing.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the input channels, [C]."""
        return torch.tensor(self.preprocessing.std)


def open_weights(path: str) -> Opened:
    """Read weights of any format. Raises `UserError` if the file cannot be read or does not describe one model."""
    weights, form, remarks = read_weights(path)
    return Opened(path, weights, form, tuple(remarks))


def open_classifier(path: str, ema: bool = False, size: Size | None = None) -> Trained:
    """Build the classifier of a file. The model of another task has no head yet: the task adds its own.

    Args:
        path: best.pt, or a file or folder of another format
        ema: use the averaged weights instead of the raw ones
        size: image height and width, pixels; None = those of the file
    Raises:
        UserError: the file cannot be read, has no classifier, no averaged weights or no channel statistics, or the size
            does not fit the model
    """
    weights = open_weights(path).weights
    if not (weights.outputs if weights.known().head else weights.head):
        raise UserError(f"{path} has no classifier: fine-tune it first, with python finetune/main.py --init {path}")
    return _build_convnext(path, weights, ema, size)


def open_encoder(path: str, ema: bool = False, size: Size | None = None) -> Trained:
    """Build the encoder of a classifier's or an autoencoder's file, without a head. As `open_classifier` otherwise."""
    return _build_convnext(path, replace(open_weights(path).weights, classes=None), ema, size, headless=True)


def open_autoencoder(path: str, mask_ratio: float | None = None, size: Size | None = None) -> Trained:
    """Build the masked autoencoder of a file; `mask_ratio` replaces the one that it was trained with.

    Raises:
        UserError: the file cannot be read, has no decoder or no channel statistics, or the size does not fit the model
    """
    weights = open_weights(path).weights.known()
    if not weights.decoder:
        raise UserError(f"{path} has no decoder: give the fcmae.pt of a pretraining run")
    weights = replace(weights, preprocessing=_preprocessing(path, weights, size), ema=None)
    config, settings = from_flat(weights.decoder_config | {"backend": "packed", "recompute": "none"})
    model = FCMAE(config, settings if mask_ratio is None else replace(settings, mask_ratio=mask_ratio))
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    load_strict(model, encoder | weights.decoder, path)
    return Trained(path, model.eval(), weights)


def _build_convnext(path: str, weights: Weights, ema: bool, size: Size | None, headless: bool = False) -> Trained:
    weights = use_ema(weights, path) if ema else weights
    weights = replace(weights, preprocessing=_preprocessing(path, weights, size), decoder={}, ema=None)
    if headless:
        weights = replace(weights, head={})
    model = ConvNeXt(weights.arch, weights.outputs)
    load_strict(model, weights.encoder | weights.known().head, path)
    return Trained(path, model.eval(), weights)


def _preprocessing(path: str, weights: Weights, size: Size | None) -> Preprocessing:
    """The file's preprocessing at a size that fits the model; its statistics must be known."""
    stored = weights.preprocessing
    if stored.mean is None:
        raise UserError(
            f"{path} does not record mean and std of its {stored.channels} channels: use an fcmae.pt or best.pt"
        )
    data = Data(size=size or stored.size)
    data.grid(weights.arch.stem_stride)  # raises for a size that patches do not divide
    return replace(stored, size=data.height_width)
