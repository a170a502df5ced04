"""Start a run from a weight file: `--init` of both stages. Adapted, replaced and missing layers are logged.

The `start_` functions raise `UserError` if the file contains another model; it names the keys to set.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from configs.errors import UserError, counted
from configs.log import say
from configs.schema import Data, Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.opening import Opened, open_weights
from models.weights import DECODER, Tensors, Weights, decoder_shape, load_strict, split_by_prefix

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
    """The data section with mean and std of `--init`, if the file records them and has as many channels.

    Raises `UserError` if the section sets other values.
    """
    if init is None or init.weights.arch.channels != channels or init.weights.preprocessing.mean is None:
        return data
    stored = {key: getattr(init.weights.preprocessing, key) for key in ("mean", "std")}
    for key, values in stored.items():
        given = getattr(data, key)
        if given is not None and (len(given) != len(values) or not np.allclose(given, values, atol=1e-4)):
            trained = f"was trained with data.{key} {list(values)}, not {list(given)}"
            raise UserError(f"{init.path} {trained}: leave the key out")
    return replace(data, **stored)


def start_encoder(model: ConvNeXt, init: Opened) -> None:
    """Load the encoder of `--init`; a head of the model keeps its values. For objectives and tasks with own parts."""
    load_strict(model, _adapted(init, model.arch).encoder, init.path, "head.")


def start_parts(model: nn.Module, init: Opened, parts: Mapping[str, Tensors]) -> bool:
    """Load the encoder of `--init` into `model.encoder` and, if the file has them, other parts of the model.

    `parts` are those of the model, by name, that are loaded from a file of an objective. They are loaded if the file
    has the same, in the same shapes; returns whether they are.
    """
    start_encoder(model.encoder, init)
    wanted, stored = parts.get(init.weights.objective or "fcmae"), init.weights.decoder
    if wanted is None or {name: x.shape for name, x in stored.items()} != {name: x.shape for name, x in wanted.items()}:
        return False
    model.load_state_dict(stored, strict=False)
    return True


def start_classifier(model: ConvNeXt, init: Opened, classes: list[str]) -> bool:
    """Load `--init` into a classifier. Returns whether the file's head fits the classes and is kept."""
    weights = _adapted(init, model.arch)
    head, outputs = weights.head, weights.outputs
    keep = outputs == len(classes) and weights.classes in (None, classes)
    if outputs:
        other = " (other names)" if outputs == len(classes) else ""
        action = "kept" if keep else f"replaced by a new one for {len(classes)} classes{other}"
        say(f"{init.path}: its classifier of {outputs} classes is {action}")
    if not keep:
        _, head = split_by_prefix(head, "head.fc.")
    load_strict(model, weights.encoder | head, init.path, () if keep else "head.fc." if head else "head.")
    return keep


def start_autoencoder(model: FCMAE, init: Opened) -> None:
    """Load `--init` into a masked autoencoder, including the decoder if the file has one."""
    path, config, settings = init.path, model.config, model.settings
    weights = _adapted(init, model.encoder.arch)
    width, depth = decoder_shape(weights.decoder)
    if weights.decoder and (width, depth) != (settings.decoder_dim, settings.decoder_depth):
        keys = f"--objective.decoder_dim {width} --objective.decoder_depth {depth}"
        raise UserError(f"{path} has a decoder of another shape: set {keys}")
    for key, value in (("model.grn_scope", config.grn_scope), ("objective.norm_pix", settings.norm_pix)):
        stored = weights.decoder_config.get(key.split(".")[1], value)
        if stored != value:
            say(f"{path} was pretrained with {key} {stored}; this run has {value}")
    if not weights.decoder:
        say(f"{path} has no decoder: a new one is trained")
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    load_strict(model, encoder | weights.decoder, path, () if weights.decoder else DECODER)


def _adapted(init: Opened, arch: Encoder) -> Weights:
    """The file's encoder, FCMAE decoder and classifier, adapted to the input channels of `arch`."""
    weights, stored = init.weights.known(), init.weights.arch
    wrong = [key for key in SHAPE_KEYS if getattr(stored, key) != getattr(arch, key)]
    if wrong or stored.name.partition("_")[0] != arch.name.partition("_")[0]:  # V1 or V2
        keys = {"name": stored.name} | {key: getattr(stored, key) for key in wrong}
        flags = " ".join(f"--model.{key} {str(value).replace(' ', '')}" for key, value in keys.items())
        raise UserError(f"{init.path} contains another model than the configuration: set {flags.translate(BRACKETS)}")
    if stored.channels == arch.channels:
        return weights
    say(f"{init.path} has {counted(stored.channels, 'input channel')}, the model {arch.channels}: stem adapted")
    return other_channels(weights, arch.channels)


def other_channels(weights: Weights, channels: int) -> Weights:
    """Adapt the stem, and the prediction layer if present, to another number of input channels.

    Kernels of the old channels are repeated cyclically and scaled, so that an image with equal channels gives about the
    same tokens; for one channel they are summed. The prediction layer repeats the old channels in the same order.
    """
    stem, old = weights.encoder["stem.0.weight"], weights.arch.channels
    source = torch.arange(channels) % old
    new = stem.sum(1, keepdim=True) if channels == 1 else stem[:, source] * (old / channels)
    pred = {  # [P * P * C, ...], ordered (row, column, channel)
        name: tensor.unflatten(0, (-1, old))[:, source].flatten(0, 1)
        for name, tensor in weights.decoder.items()
        if name.startswith("pred.")
    }
    return replace(weights, encoder=weights.encoder | {"stem.0.weight": new}, decoder=weights.decoder | pred)
