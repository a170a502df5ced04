"""Starting from a weight file: `--init` of both stages. What is adapted, replaced or missing is said in a line."""

from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError
from configs.log import say
from configs.schema import Data, Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.formats.open import digest
from models.formats.read import read_weights
from models.sizes import resolve
from models.weights import Tensors, Weights, decoder_shape, load_strict, other_channels, split_by_prefix

BRACKETS = str.maketrans("()", "[]")  # no shell takes a bare (1,2)
SHAPE_KEYS = ("stem_stride", "depths", "dims")


@dataclass
class Init:
    """The weights of a file and where they came from."""

    path: str
    weights: Weights
    digest: str  # of the file: a run is not resumed from another one


def open_init(path: str) -> Init | None:
    """What `--init` names, in any format; None for `none`. Raises `UserError` where it cannot be read."""
    if path == "none":
        return None
    weights, form, remarks = read_weights(path)
    say(f"starting from {path} ({form}{''.join(f'; {remark}' for remark in remarks)})")
    return Init(path, weights, digest(path))


def with_statistics(data: Data, init: Init | None, channels: int) -> Data:
    """The data section with the statistics of `--init`, which belong to its weights.

    A file that does not know them, or has other channels, leaves the section as it is. Raises `UserError` where the
    section names others.
    """
    if init is None or init.weights.arch.channels != channels or init.weights.image["mean"] is None:
        return data
    stored = {key: tuple(init.weights.image[key]) for key in ("mean", "std")}
    for key, held in stored.items():
        given = getattr(data, key)
        if given is not None and (len(given) != len(held) or not np.allclose(given, held, atol=1e-4)):
            raise UserError(
                f"{init.path} was trained with data.{key} {list(held)}, not {list(given)}: leave the key out"
            )
    return replace(data, **stored)


def start_classifier(model: ConvNeXt, init: Init, classes: list[str]) -> bool:
    """Load `--init` into a classifier; True if the file's own head fits the classes and is kept.

    Raises:
        UserError: the file is of another model
    """
    path, head = init.path, init.weights.head
    encoder, _ = _for_channels(init, model.arch.channels)
    outputs = init.weights.outputs
    keep = outputs == len(classes) and init.weights.classes in (None, classes)
    if outputs:
        other = " (other names)" if outputs == len(classes) else ""
        fate = "kept" if keep else f"replaced by a new one for {len(classes)} classes{other}"
        say(f"{path}: its classifier of {outputs} classes is {fate}")
    if not keep:
        _, head = split_by_prefix(head, "head.fc.")
    ignored = "head." if not head else None if keep else "head.fc."
    load_strict(model, encoder | head, path, ignored)
    return keep


def start_autoencoder(model: FCMAE, init: Init) -> None:
    """Load `--init` into a masked autoencoder, with the decoder if the file has one.

    Raises:
        UserError: the file is of another model, or its decoder of another shape; names the keys to set
    """
    path, weights, config, settings = init.path, init.weights, model.config, model.settings
    _check_shape(init, model.encoder.arch)
    if weights.decoder and decoder_shape(weights.decoder) != (settings.decoder_dim, settings.decoder_depth):
        width, depth = decoder_shape(weights.decoder)
        keys = f"--objective.decoder_dim {width} --objective.decoder_depth {depth}"
        raise UserError(f"{path} has a decoder of another shape: set {keys}")
    for key, own in (("model.grn_scope", config.grn_scope), ("objective.norm_pix", settings.norm_pix)):
        stored = weights.decoder_config.get(key.split(".")[1], own)
        if stored != own:
            say(f"{path} was pretrained with {key} {stored}; this run has {own}")
    encoder, decoder = _for_channels(init, config.channels)
    if decoder:
        load_strict(model, {f"encoder.{name}": tensor for name, tensor in encoder.items()} | decoder, path)
    else:
        load_strict(model.encoder, encoder, path)
        say(f"{path} has no decoder: a new one is trained")


def _for_channels(init: Init, channels: int) -> tuple[Tensors, Tensors]:
    """(encoder, decoder) of the file, adapted to a number of input channels."""
    weights = init.weights
    if weights.arch.channels == channels:
        return weights.encoder, weights.decoder
    say(f"{init.path} has {weights.arch.channels} input channels, the model {channels}: stem adapted")
    tensors = other_channels(weights.encoder | weights.decoder, channels)
    return {name: tensors[name] for name in weights.encoder}, {name: tensors[name] for name in weights.decoder}


def _check_shape(init: Init, arch: Encoder) -> None:
    """Raise `UserError`, with the keys to set, if the file's encoder is not that of the configuration."""
    held = resolve(init.weights.arch)
    version = {encoder.name.partition("_")[0] for encoder in (held, arch)}
    wrong = [key for key in SHAPE_KEYS if getattr(held, key) != getattr(arch, key)]
    if len(version) == 1 and not wrong:
        return
    keys = {"name": held.name} | {key: getattr(held, key) for key in wrong}
    flags = " ".join(f"--model.{key} {str(value).replace(' ', '')}" for key, value in keys.items())
    raise UserError(f"{init.path} holds another model than the configuration: set {flags.translate(BRACKETS)}")
