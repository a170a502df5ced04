"""Read weights of this project and of others (`models.formats.FORMATS`).

The format is detected by tensor names, the architecture by shapes. No code of a file is executed.
"""

import re
from pathlib import Path
from typing import NamedTuple

from configs.errors import UserError, few
from configs.schema import Encoder
from models.formats.containers import read_container
from models.formats.hub import localize
from models.formats.metadata import class_names, preprocessing, pretraining
from models.formats.names import STAGE_NORMS, WRAPPERS, Detected, detect, from_shape, seems, to_name, to_shape
from models.sizes import SIZES, resolve
from models.weights import (
    DECODER,
    ENCODER,
    FORMAT,
    Tensors,
    Weights,
    check_finite,
    check_shapes,
    check_tensors,
    count_modules,
    expected_tensors,
    from_content,
    split_by_prefix,
)  # fmt: skip

MAX_WIDTH = 1 << 16  # channels


class Translated(NamedTuple):
    """A state dict under this project's names and in its shapes."""

    form: str
    arch: Encoder
    encoder: Tensors
    decoder: Tensors
    head: Tensors
    remarks: list[str]  # on tensors that were left out


def read_weights(path: str | Path) -> tuple[Weights, str, list[str]]:
    """(weights, format, remarks on defaults assumed for what the file does not specify, and on parts left out).

    Raises:
        UserError: the file is missing, truncated, contains code, has an unknown format, or has missing, unexpected or
            misshapen tensors or numbers that are not finite, which are listed
    """
    local = localize(path)
    origin = [local.remark] if local.remark else []
    container = read_container(local.path)
    if container.metadata.get("format") == FORMAT:
        return from_content(container.metadata, path), "ours", origin
    raw = translate(container.tensors, path, container.metadata.get("architecture"))
    form, arch, encoder, decoder, head, remarks = raw
    if form == "transformers" and container.metadata.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has hidden_act {container.metadata['hidden_act']}: only gelu is supported")
    ema = None
    if container.ema is not None:
        other = translate(container.ema, path, arch.name)
        ema, own = other.encoder | other.decoder | other.head, encoder | decoder | head
        if other.arch != arch or {n: t.shape for n, t in ema.items()} != {n: t.shape for n, t in own.items()}:
            raise UserError(f"{path}: its averaged weights belong to another model than its raw ones")
    if form in ("timm", "transformers") and _identity_norm(head):
        head = {}  # these formats store an identity for encoders without a head
    remarks = [*origin, *remarks, *container.remarks]
    settings = pretraining(container.metadata, arch, decoder) if decoder else {}
    image = preprocessing(container.metadata, form, arch, remarks)
    weights = Weights(arch, image, encoder, decoder, settings, head, ema)
    weights.classes = class_names(container.metadata, form, weights.outputs, remarks)
    return weights, form, remarks


def translate(tensors: dict, path: str | Path, model: object = None) -> Translated:
    """Detect the format of a state dict, and translate its names and shapes.

    Names may begin with any prefix, like `model.backbone.`; tensors outside of it are left out. `model` is the file's
    name of the model, used if the shapes match no named one. Raises a `UserError` that lists missing, unexpected and
    misshapen tensors by the file's names.
    """
    tensors = {WRAPPERS.sub("", str(name)): tensor for name, tensor in tensors.items()}
    try:
        found = detect(tensors)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if found is None:
        first = ", ".join([*tensors][:3])
        kind = f": it seems to be {other}, not a ConvNeXt" if (other := seems(tensors)) else ""
        raise UserError(f"{path} is in no known format (its first tensors: {first}){kind}")
    form, source = found.form, f"{path} (read as {found.form})"
    names = {ours: name for name in tensors if (ours := found.ours(name))}  # ours to the file's
    tensors, names, remarks = _without_others(tensors, names, found)
    check_tensors(source, {name: tensors[name] for name in names.values()})
    known = {ours: tensors[name] for ours, name in names.items()}
    arch = _architecture(known, form, source, model)
    if form == "official":  # GRN of the released pretraining files is shaped as in the sparse code, [1, 4 C]
        known |= {ours: t[None, None] for ours, t in known.items() if ".grn." in ours and t.ndim == 2}
    expected = expected_tensors(arch, known)
    conv_mlp = any(".mlp.fc" in ours and tensor.ndim == 4 for ours, tensor in known.items())
    theirs = {
        names.get(ours) or found.theirs(ours): to_shape(ours, tensor, form, conv_mlp)
        for ours, tensor in expected.items()
    }
    check_shapes(source, theirs, tensors | {names[ours]: tensor for ours, tensor in known.items()})
    check_finite(source, {names[ours]: tensor for ours, tensor in known.items()})
    own = {ours: from_shape(ours, tensor, form, tuple(expected[ours].shape)) for ours, tensor in known.items()}
    encoder, decoder, head = (split_by_prefix(own, prefixes)[0] for prefixes in (ENCODER, DECODER, "head."))
    return Translated(form, arch, encoder, decoder, head, remarks)


def _without_others(tensors: dict, names: dict[str, str], found: Detected) -> tuple[dict, dict[str, str], list[str]]:
    """Tensors and names without those of other modules, of norms that a backbone adds, and of a classifier that is more
    than a linear layer; remarks on them.
    """
    prefix, remarks, known = found.outer + found.own, [], set(names.values())
    norms = {name for name in tensors if re.match(re.escape(prefix) + STAGE_NORMS.get(found.form, r"\Z"), name)}
    if found.form == "mmpretrain" and len({name.rpartition(".")[0] for name in norms}) == 1:
        norms = set()  # the norm of its classifier
    if norms:
        remarks.append(f"left out: the norms that its library adds after the stages ({len(norms)} tensors)")
    classifier = set()
    if to_name("head.fc.weight", found.form):
        start = found.theirs("head.fc.weight").removesuffix("weight")
        classifier = {name for name in tensors if name.startswith(start)}
    if classifier <= known:
        classifier = set()
    else:
        remarks.append(f"left out: its classifier, which is more than a linear layer ({len(classifier)} tensors)")
    others = {name for name in tensors if not name.startswith(prefix)} - known - classifier
    if others:
        modules = sorted({name.removeprefix(found.outer).partition(".")[0] for name in others})
        remarks.append(f"left out: {len(others)} tensors outside of {prefix.removesuffix('.')} ({few(modules, 5)})")
    gone = norms | classifier | others
    names = {ours: name for ours, name in names.items() if name not in gone}
    return {name: tensor for name, tensor in tensors.items() if name not in gone}, names, remarks


def _architecture(tensors: Tensors, form: str, source: str, claimed: object) -> Encoder:
    """Infer the architecture from tensors with this project's names and the file's shapes."""
    marks = ["stem.0.weight", *(f"stages.{i}.downsample.1.bias" for i in (1, 2, 3))]
    missing = [to_name(name, form) for name in marks if name not in tensors]
    if missing:
        raise UserError(f"{source} contains another model: missing {', '.join(missing)}")
    shape = list(tensors["stem.0.weight"].shape)
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in (1, 2, 4):
        raise UserError(f"{source}: {to_name(marks[0], form)} is {shape}, expected [width, channels, 4, 4]")
    dims = (shape[0], *(tensors[name].numel() for name in marks[1:]))
    if not all(0 < width < MAX_WIDTH for width in (*dims, shape[1])):
        raise UserError(f"{source}: widths {list(dims)} do not belong to a ConvNeXt")
    depths = tuple(max(1, count_modules(tensors, rf"stages\.{i}\.blocks\.(\d+)\.")) for i in range(4))
    version = "convnextv2_" if any(".grn." in name for name in tensors) else "convnext_"
    sizes = {name: resolve(Encoder(name)) for name in SIZES if name.startswith(version)}
    fitting = [name for name, size in sizes.items() if (size.depths, size.dims) == (depths, dims)]
    claimed = [name for name in sizes if name == claimed]
    smallest = min(sizes, key=lambda name: sizes[name].dims)
    return Encoder([*fitting, *claimed, smallest][0], shape[1], shape[2], depths, dims)


def _identity_norm(head: Tensors) -> bool:
    weight, bias = head.get("head.norm.weight"), head.get("head.norm.bias")
    return len(head) == 2 and None not in (weight, bias) and bool((weight == 1).all() and (bias == 0).all())
