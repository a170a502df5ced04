"""Start a run from a weight file: `--init` of both stages. Adapted, replaced and missing layers are logged."""

from dataclasses import replace

import numpy as np

from configs.errors import UserError
from configs.log import say
from configs.schema import Data, Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.opening import Opened, open_weights
from models.sizes import resolve
from models.weights import Tensors, decoder_shape, load_strict, other_channels, split_by_prefix

BRACKETS = str.maketrans("()", "[]")  # shells need quotes around (1,2)
SHAPE_KEYS = ("stem_stride", "depths", "dims")


def open_init(path: str) -> Opened | None:
    """Open the weights of `--init`, in any format; None for `none`. Raises `UserError` if they are unreadable."""
    if path == "none":
        return None
    init = open_weights(path)
    say(f"starting from {path} ({'; '.join([init.format, *init.remarks])})")
    return init


def with_statistics(data: Data, init: Opened | None, channels: int) -> Data:
    """The data section with the mean and std of `--init`.

    Unchanged if the file does not record them or has another number of channels. Raises `UserError` if the section sets
    other values.
    """
    if init is None or init.weights.arch.channels != channels or init.weights.preprocessing.mean is None:
        return data
    stored = {key: getattr(init.weights.preprocessing, key) for key in ("mean", "std")}
    for key, values in stored.items():
        given = getattr(data, key)
        if given is not None and (len(given) != len(values) or not np.allclose(given, values, atol=1e-4)):
            raise UserError(
                f"{init.path} was trained with data.{key} {list(values)}, not {list(given)}: leave the key out"
            )
    return replace(data, **stored)


def start_encoder(model: ConvNeXt, init: Opened) -> None:
    """Load the encoder of `--init`; a head of the model keeps its values. For objectives and tasks with own parts.

    Raises:
        UserError: the file is of another model; names the keys to set
    """
    _check_shape(init, model.arch)
    encoder, _ = _for_channels(_known(init), model.arch.channels)
    load_strict(model, encoder, init.path, "head.")


def start_classifier(model: ConvNeXt, init: Opened, classes: list[str]) -> bool:
    """Load `--init` into a classifier. Returns whether the file's head fits the classes and is kept.

    Raises:
        UserError: the file contains another model
    """
    init = _known(init)
    path, head = init.path, init.weights.head
    encoder, _ = _for_channels(init, model.arch.channels)
    outputs = init.weights.outputs
    keep = outputs == len(classes) and init.weights.classes in (None, classes)
    if outputs:
        other = " (other names)" if outputs == len(classes) else ""
        action = "kept" if keep else f"replaced by a new one for {len(classes)} classes{other}"
        say(f"{path}: its classifier of {outputs} classes is {action}")
    if not keep:
        _, head = split_by_prefix(head, "head.fc.")
    ignored = "head." if not head else None if keep else "head.fc."
    load_strict(model, encoder | head, path, ignored)
    return keep


def start_autoencoder(model: FCMAE, init: Opened) -> None:
    """Load `--init` into a masked autoencoder, including the decoder if the file has one.

    Raises:
        UserError: the file contains another encoder or a decoder of another shape; lists the keys to set
    """
    init = _known(init)
    path, weights, config, settings = init.path, init.weights, model.config, model.settings
    _check_shape(init, model.encoder.arch)
    if weights.decoder and decoder_shape(weights.decoder) != (settings.decoder_dim, settings.decoder_depth):
        width, depth = decoder_shape(weights.decoder)
        keys = f"--objective.decoder_dim {width} --objective.decoder_depth {depth}"
        raise UserError(f"{path} has a decoder of another shape: set {keys}")
    for key, value in (("model.grn_scope", config.grn_scope), ("objective.norm_pix", settings.norm_pix)):
        stored = weights.decoder_config.get(key.split(".")[1], value)
        if stored != value:
            say(f"{path} was pretrained with {key} {stored}; this run has {value}")
    encoder, decoder = _for_channels(init, config.channels)
    if decoder:
        load_strict(model, {f"encoder.{name}": tensor for name, tensor in encoder.items()} | decoder, path)
    else:
        load_strict(model.encoder, encoder, path)
        say(f"{path} has no decoder: a new one is trained")


def _known(init: Opened) -> Opened:
    """The file without a decoder of another objective than FCMAE, and without a head of another task."""
    return replace(init, weights=init.weights.known())


def _for_channels(init: Opened, channels: int) -> tuple[Tensors, Tensors]:
    """(encoder, decoder) of the file, with the stem adapted to `channels` input channels."""
    weights = init.weights
    if weights.arch.channels == channels:
        return weights.encoder, weights.decoder
    say(f"{init.path} has {weights.arch.channels} input channels, the model {channels}: stem adapted")
    tensors = other_channels(weights.encoder | weights.decoder, channels)
    return {name: tensors[name] for name in weights.encoder}, {name: tensors[name] for name in weights.decoder}


def _check_shape(init: Opened, arch: Encoder) -> None:
    """Raise `UserError`, listing the keys to set, if the file's encoder differs from the configured one."""
    stored = resolve(init.weights.arch)
    version = {encoder.name.partition("_")[0] for encoder in (stored, arch)}
    wrong = [key for key in SHAPE_KEYS if getattr(stored, key) != getattr(arch, key)]
    if len(version) == 1 and not wrong:
        return
    keys = {"name": stored.name} | {key: getattr(stored, key) for key in wrong}
    flags = " ".join(f"--model.{key} {str(value).replace(' ', '')}" for key, value in keys.items())
    raise UserError(f"{init.path} contains another model than the configuration: set {flags.translate(BRACKETS)}")
