"""Starting from a weight file: `--init` of both stages. What is adapted, replaced or missing is said in a line."""

from dataclasses import dataclass, replace

import numpy as np

from configs.command import say
from configs.errors import UserError
from configs.schema import Data, Encoder
from models.convnext import ConvNeXt, resolve
from models.fcmae import FCMAE
from models.formats.read import digest, read
from models.weights import Tensors, Weights, divide, load_strict, other_channels

SHAPE_KEYS = ("stem_stride", "depths", "dims")


@dataclass
class Start:
    """The weights of a file and where they came from."""

    path: str
    weights: Weights
    digest: str  # of the file: a run is not resumed from another one


def open_init(path: str) -> Start | None:
    """What `--init` names, in any format; None for `none`. Raises `UserError` where it cannot be read."""
    if path == "none":
        return None
    weights, form, remarks = read(path)
    say(f"starting from {path} ({form}{''.join(f'; {remark}' for remark in remarks)})")
    return Start(path, weights, digest(path))


def with_statistics(data: Data, start: Start | None, channels: int) -> Data:
    """The data section with the statistics of `--init`, which belong to its weights.

    A file that does not know them, or has other channels, leaves the section as it is. Raises `UserError` where the
    section names others.
    """
    if start is None or start.weights.arch.channels != channels or start.weights.image["mean"] is None:
        return data
    stored = {key: tuple(start.weights.image[key]) for key in ("mean", "std")}
    for key, held in stored.items():
        given = getattr(data, key)
        if given is not None and not np.allclose(given, held, atol=1e-4):
            raise UserError(
                f"{start.path} was trained with data.{key} {list(held)}, not {list(given)}: leave the key out"
            )
    return replace(data, **stored)


def start_classifier(model: ConvNeXt, start: Start, classes: list[str]) -> bool:
    """Load `--init` into a classifier; True if the file's own head fits the classes and is kept.

    Raises:
        UserError: the file is of another model
    """
    path, head = start.path, start.weights.head
    encoder, _ = _for_channels(start, model.arch.channels)
    outputs = len(head["head.fc.bias"]) if "head.fc.bias" in head else 0
    keep = outputs == len(classes) and start.weights.classes in (None, classes)
    if outputs:
        other = " (other names)" if outputs == len(classes) else ""
        fate = "kept" if keep else f"replaced by a new one for {len(classes)} classes{other}"
        say(f"{path}: its classifier of {outputs} classes is {fate}")
    if not keep:
        _, head = divide(head, "head.fc.")
    ignored = "head." if not head else None if keep else "head.fc."
    load_strict(model, encoder | head, path, ignored)
    return keep


def start_autoencoder(model: FCMAE, start: Start) -> None:
    """Load `--init` into a masked autoencoder, with the decoder if the file has one.

    Raises:
        UserError: the file is of another model, or its decoder of another shape; names the keys to set
    """
    path, weights, config = start.path, start.weights, model.config
    _check_shape(start, model.encoder.arch)
    settings = weights.decoder_config
    for key in ("decoder_dim", "decoder_depth") if weights.decoder else ():
        if settings[key] != getattr(config, key):
            raise UserError(f"{path} has a decoder of another shape: set --model.{key} {settings[key]}")
    for key in ("grn_scope", "norm_pix"):
        if key in settings and settings[key] != getattr(config, key):
            say(f"{path} was pretrained with model.{key} {settings[key]}; this run has {getattr(config, key)}")
    encoder, decoder = _for_channels(start, config.channels)
    load_strict(model.encoder, encoder, path)
    if decoder:
        model.load_state_dict(model.state_dict() | decoder)
    else:
        say(f"{path} has no decoder: a new one is trained")


def _for_channels(start: Start, channels: int) -> tuple[Tensors, Tensors]:
    """(encoder, decoder) of the file, adapted to a number of input channels."""
    weights = start.weights
    if weights.arch.channels == channels:
        return weights.encoder, weights.decoder
    say(f"{start.path} has {weights.arch.channels} input channels, the model {channels}: stem adapted")
    tensors = other_channels(weights.encoder | weights.decoder, channels)
    return {name: tensors[name] for name in weights.encoder}, {name: tensors[name] for name in weights.decoder}


def _check_shape(start: Start, arch: Encoder) -> None:
    """Raise `UserError`, with the keys to set, if the file's encoder is not that of the configuration."""
    held = resolve(start.weights.arch)
    version = {encoder.name.partition("_")[0] for encoder in (held, arch)}
    if len(version) == 1 and all(getattr(held, key) == getattr(arch, key) for key in SHAPE_KEYS):
        return
    named = resolve(replace(held, depths=None, dims=None))
    keys = {"name": held.name, "stem_stride": held.stem_stride}
    keys |= {key: list(getattr(held, key)) for key in ("depths", "dims") if getattr(held, key) != getattr(named, key)}
    flags = " ".join(f"--model.{key} {str(value).replace(' ', '')}" for key, value in keys.items())
    raise UserError(f"{start.path} holds another model than the configuration: set {flags}")
