"""Read weights of this project, the official code (dense and sparse), timm, transformers and mmpretrain.

The format is detected by tensor names, the architecture by shapes. No code of a file is executed.
"""

from pathlib import Path

from configs.errors import UserError
from configs.schema import Encoder
from models.formats.containers import read_container
from models.formats.metadata import class_names, preprocessing, pretraining
from models.formats.names import detect, from_name, from_shape, to_name, to_shape
from models.sizes import SIZES, resolve
from models.weights import (
    DECODER,
    ENCODER,
    FORMAT,
    Tensors,
    Weights,
    check_shapes,
    check_tensors,
    count_modules,
    expected_tensors,
    from_content,
    split_by_prefix,
)  # fmt: skip

MAX_WIDTH = 1 << 16  # channels


def read_weights(path: str | Path) -> tuple[Weights, str, list[str]]:
    """(weights, format, remarks on defaults assumed for values that the file does not specify) of a file or folder.

    Raises:
        UserError: the file is missing, truncated, contains code, has an unknown format, or has missing, unexpected or
            misshapen tensors, which are listed
    """
    path = Path(path)
    container = read_container(path)
    if container.metadata.get("format") == FORMAT:
        return from_content(container.metadata, path), "ours", []
    form = detect(container.tensors)
    if form is None:
        first = ", ".join(map(str, [*container.tensors][:3]))
        raise UserError(f"{path} is in no known format (its first tensors: {first})")
    if form == "transformers" and container.metadata.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has hidden_act {container.metadata['hidden_act']}: only gelu is supported")
    arch, encoder, decoder, head = translate(container.tensors, form, path, container.metadata.get("architecture"))
    ema = None
    if container.ema is not None:
        other, *parts = translate(container.ema, form, path, arch.name)
        ema, raw = parts[0] | parts[1] | parts[2], encoder | decoder | head
        if other != arch or {n: t.shape for n, t in ema.items()} != {n: t.shape for n, t in raw.items()}:
            raise UserError(f"{path}: its averaged weights belong to another model than its raw ones")
    if form in ("timm", "transformers") and _identity_norm(head):
        head = {}  # these formats store an identity for encoders without a head
    remarks: list[str] = []
    settings = pretraining(container.metadata, arch, decoder) if decoder else {}
    image = preprocessing(container.metadata, form, arch, remarks)
    weights = Weights(arch, image, encoder, decoder, settings, head, ema)
    weights.classes = class_names(container.metadata, form, weights.outputs, remarks)
    return weights, form, remarks


def translate(tensors: dict, form: str, path: Path, model: object = None) -> tuple[Encoder, Tensors, Tensors, Tensors]:
    """(architecture, encoder, decoder, head) of another format's tensors, under this project's names and in its shapes.

    `model` is the file's name of the model, used if the shapes match no named one. Raises a `UserError` that lists
    missing, unexpected and misshapen tensors by the file's names.
    """
    source = f"{path} (read as {form})"
    names = {ours: name for name in tensors if (ours := from_name(name, form))}  # ours to the file's
    check_tensors(source, {name: tensors[name] for name in names.values()})
    known = {ours: tensors[name] for ours, name in names.items()}
    arch = _architecture(known, form, source, model)
    if form == "official":  # GRN of the released pretraining files is shaped as in the sparse code, [1, 4 C]
        known |= {ours: t[None, None] for ours, t in known.items() if ".grn." in ours and t.ndim == 2}
    expected = expected_tensors(arch, known)
    conv_mlp = any(".mlp.fc" in ours and tensor.ndim == 4 for ours, tensor in known.items())
    prefix = names["stem.0.weight"].removesuffix(to_name("stem.0.weight", form))  # of missing tensors' names
    theirs = {
        names.get(ours, prefix + to_name(ours, form)): to_shape(ours, tensor, form, conv_mlp)
        for ours, tensor in expected.items()
    }
    check_shapes(source, theirs, tensors | {names[ours]: tensor for ours, tensor in known.items()})
    own = {ours: from_shape(ours, tensor, form, tuple(expected[ours].shape)) for ours, tensor in known.items()}
    encoder, decoder, head = (split_by_prefix(own, prefixes)[0] for prefixes in (ENCODER, DECODER, "head."))
    return arch, encoder, decoder, head


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
