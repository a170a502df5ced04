"""Weights of any format: this project's, the official code's (dense and sparse), timm's, transformers', mmpretrain's.

The format is recognised by the tensors' names. What the model is, is read off their shapes. Nothing is executed.
"""

import re
from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from configs.schema import Encoder
from models.formats.metadata import class_names, preprocessing, pretraining
from models.formats.names import PREFIXES, detect, from_name, from_shape, to_name, to_shape
from models.formats.open import open_weights
from models.sizes import SIZES, resolve
from models.weights import (
    FORMAT,
    Tensors,
    Weights,
    check_shapes,
    check_tensors,
    count,
    expected_tensors,
    from_content,
    split_by_prefix,
)  # fmt: skip

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name
WIDEST = 1 << 16  # channels; no model comes near


def read_weights(path: str | Path) -> tuple[Weights, str, list[str]]:
    """(weights, format, remarks on what the file does not tell).

    Args:
        path: a file of `torch.save` or safetensors; or a folder with config.json, as transformers and timm write it
    Raises:
        UserError: no such file, truncated, holding code, of no known format, or with missing, unexpected or misshapen
            tensors, which are listed
    """
    path = Path(path)
    opened = open_weights(path)
    if opened.beside.get("format") == FORMAT:
        return from_content(opened.beside, path), "ours", []
    form = detect(_bare(name) for name in opened.tensors)
    if form is None:
        first = ", ".join(map(str, list(opened.tensors)[:3]))
        raise UserError(f"{path} is in no format that is known here (its first names: {first})")
    if form == "transformers" and opened.beside.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has hidden_act {opened.beside['hidden_act']}: only gelu is a ConvNeXt here")
    arch, encoder, decoder, head = translate(opened.tensors, form, path, opened.beside.get("architecture"))
    ema = None
    if opened.average is not None:
        other, *parts = translate(opened.average, form, path, arch.name)
        ema = {name: tensor for part in parts for name, tensor in part.items()}
        raw = encoder | decoder | head
        if other != arch or {n: t.shape for n, t in ema.items()} != {n: t.shape for n, t in raw.items()}:
            raise UserError(f"{path}: its averaged weights are of another model than its raw ones")
    if form in ("timm", "transformers") and _identity_norm(head):
        head = {}  # these formats cannot leave it out, so an encoder without a head carries one that does nothing
    remarks: list[str] = []
    settings = pretraining(opened.beside, arch, decoder) if decoder else {}
    weights = Weights(arch, {}, encoder, decoder, settings, head, ema)
    weights.classes = class_names(opened.beside, form, weights.outputs, remarks)
    weights.image = preprocessing(opened.beside, form, arch, remarks)
    return weights, form, remarks


def _bare(name: object) -> str:
    """A tensor's name without what wrappers and transformers put before it."""
    name = str(name)
    while (bare := re.sub(rf"^({'|'.join(map(re.escape, WRAPPERS + PREFIXES))})", "", name)) != name:
        name = bare
    return name


def translate(
    tensors: dict, form: str, path: Path, architecture: object = None
) -> tuple[Encoder, Tensors, Tensors, Tensors]:
    """(architecture, encoder, decoder, head) of another format's tensors, under our names and in our shapes.

    Args:
        architecture: name of the model that the file claims, for a shape that no name implies
    Raises:
        UserError: lists what is missing, unexpected or misshapen, under the file's own names
    """
    source = f"{path} (read as {form})"
    theirs = {ours: name for name in tensors if (ours := from_name(_bare(name), form))}
    found = {ours: tensors[name] for ours, name in theirs.items() if isinstance(tensors[name], Tensor)}
    arch = _architecture(found, form, source, architecture)
    if form == "official":  # the released files after pretraining have GRN as the sparse code has it, [1, 4 C]
        found |= {ours: t[None, None] for ours, t in found.items() if ".grn." in ours and t.ndim == 2}
    needed = expected_tensors(arch, found)
    conv_mlp = any(".mlp.fc" in ours and tensor.ndim == 4 for ours, tensor in found.items())
    prefix = _prefix(theirs, form)
    shapes = {theirs[ours]: tuple(tensor.shape) for ours, tensor in found.items()}
    check_shapes(
        source,
        {
            theirs.get(ours, prefix + to_name(ours, form)): tuple(to_shape(ours, tensor, form, conv_mlp).shape)
            for ours, tensor in needed.items()
        },
        {name: shapes.get(name, ()) for name in tensors},
    )
    check_tensors(source, found)
    mine = {ours: from_shape(ours, tensor, form, tuple(needed[ours].shape)) for ours, tensor in found.items()}
    head, rest = split_by_prefix(mine, "head.")
    encoder = {name: tensor for name, tensor in rest.items() if name.startswith(("stem.", "stages."))}
    return arch, encoder, {name: tensor for name, tensor in rest.items() if name not in encoder}, head


def _prefix(theirs: dict[str, str], form: str) -> str:
    """What this file puts before the format's own names, to name what is missing as the file would."""
    stems = (name.removesuffix(to_name(ours, form)) for ours, name in theirs.items() if ours.startswith("stem."))
    return next(stems, "")


def _architecture(tensors: Tensors, form: str, source: str, claimed: object) -> Encoder:
    """Which ConvNeXt these tensors are, under our names but in their shapes."""
    marks = ["stem.0.weight", *(f"stages.{i}.downsample.1.bias" for i in (1, 2, 3))]
    missing = [to_name(name, form) for name in marks if name not in tensors]
    if missing:
        raise UserError(f"{source} is of another model: missing {', '.join(missing)}")
    stem = tensors["stem.0.weight"]
    dims = (len(stem) if stem.ndim else 0, *(tensors[name].numel() for name in marks[1:]))
    if stem.ndim != 4 or stem.shape[2] != stem.shape[3] or stem.shape[2] not in (1, 2, 4) or 0 in stem.shape:
        raise UserError(f"{source}: {to_name(marks[0], form)} is {list(stem.shape)}, needed [width, channels, 4, 4]")
    if not all(0 < width < WIDEST for width in (*dims, stem.shape[1])):
        raise UserError(f"{source}: widths {list(dims)} are no ConvNeXt's")
    depths = tuple(max(1, count(tensors, rf"stages\.{i}\.blocks\.(\d+)\.")) for i in range(4))
    version = "convnextv2_" if any(".grn." in name for name in tensors) else "convnext_"
    sizes = {name: resolve(Encoder(name)) for name in SIZES if name.startswith(version)}
    named = [name for name, size in sizes.items() if (size.depths, size.dims) == (depths, dims)]
    if not named and claimed in sizes:
        named = [claimed]
    name = named[0] if named else min(sizes, key=lambda name: sizes[name].dims)  # of another shape: the smallest's name
    return Encoder(name, stem.shape[1], stem.shape[2], depths, dims)


def _identity_norm(head: Tensors) -> bool:
    norm = [head.get(f"head.norm.{part}") for part in ("weight", "bias")]
    return len(head) == 2 and None not in norm and bool((norm[0] == 1).all() and (norm[1] == 0).all())
