"""Weights of any format: this project's, the official code's (dense and sparse), timm's, transformers', mmpretrain's.

The format is recognised by the tensors' names. What the model is, is read off their shapes. Nothing is executed.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError, reason
from configs.files import sha256
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Encoder, PretrainModel
from models.convnext import SIZES, ConvNeXt
from models.fcmae import FCMAE
from models.formats.names import PREFIXES, detect, from_name, from_shape, to_name, to_shape
from models.weights import FORMAT, Tensors, Weights, check_shapes, divide, from_content, load_file

CONTAINERS = ("model", "state_dict", "module")  # where a checkpoint keeps the tensors
AVERAGES = ("model_ema", "state_dict_ema")  # and their moving average
DECODER = ("proj.", "mask_token", "decoder.", "pred.")
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name


def read(path: str | Path) -> tuple[Weights, str, list[str]]:
    """(weights, format, remarks on what the file does not tell or holds besides).

    Args:
        path: a file of `torch.save` or safetensors; or a folder with config.json, as transformers and timm write it
    Raises:
        UserError: no such file, truncated, holding code, of no known format, or with missing, unexpected or misshapen
            tensors, which are listed
    """
    path = Path(path)
    content = _open(path)
    if content.get("format") == FORMAT:
        return from_content(content, path), "ours", []
    tensors = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    average = next((content[key] for key in AVERAGES if isinstance(content.get(key), dict)), None)
    form = detect(map(_bare, tensors))
    if form is None:
        raise UserError(
            f"{path} is in no format that is known here (its first names: {', '.join(map(str, list(tensors)[:3]))})"
        )
    arch, encoder, decoder, head = translate(tensors, form, path)
    remarks: list[str] = []
    if form in ("timm", "transformers") and _identity_norm(head):
        head = {}  # these formats cannot leave it out, so an encoder without a head carries one that does nothing
    ema = None
    if average is not None:
        _, *parts = translate(average, form, path)
        ema = {name: tensor for part in parts for name, tensor in part.items()}
    classes = _classes(content, form, head, remarks)
    image = _image(content, form, arch, remarks)
    settings = _pretraining(content, arch, decoder) if decoder else {}
    return Weights(arch, image, encoder, decoder, settings, head, ema, classes), form, remarks


def digest(path: str | Path) -> str:
    """Short hash of a weight file's content, or of a folder's."""
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return "-".join(sha256(file)[:16] for file in files)


def _open(path: Path) -> dict:
    """Tensors and what stands beside them."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _open_safetensors(path)
        return {"state_dict": tensors} | _json(metadata.get("config", "{}"), path)
    return load_file(path)


def _open_folder(path: Path) -> dict:
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path} is a folder without config.json: give a weight file, or a model folder")
    beside = _json(config.read_text(), config)
    preprocessor = path / "preprocessor_config.json"
    if preprocessor.is_file():
        beside["preprocessor"] = _json(preprocessor.read_text(), preprocessor)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        parts = sorted(set(_json(index.read_text(), index)["weight_map"].values()))
    else:
        parts = [name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
    if not parts:
        raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    tensors: Tensors = {}
    for part in parts:
        file = path / Path(part).name
        tensors |= _open_safetensors(file)[0] if file.suffix == ".safetensors" else load_file(file)
    return beside | {"state_dict": tensors}


def _open_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a weight file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None


def _json(text: str, path: Path) -> dict:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return content


def _bare(name: str) -> str:
    """A tensor's name without the prefixes that wrappers and transformers put before it."""
    name = str(name)
    for prefix in (*WRAPPERS, *PREFIXES):
        name = name.removeprefix(prefix)
    return name


def translate(tensors: dict, form: str, path: Path) -> tuple[Encoder, Tensors, Tensors, Tensors]:
    """(architecture, encoder, decoder, head) of another format's tensors, under our names and in our shapes.

    Raises:
        UserError: lists what is missing, unexpected or misshapen, under the file's own names
    """
    known = {str(theirs): from_name(_bare(theirs), form) for theirs in tensors}
    ours = {name: tensors[theirs] for theirs, name in known.items() if name and isinstance(tensors[theirs], Tensor)}
    arch = _architecture(ours, form, path)
    needed = _meta_tensors(arch, ours)
    conv_mlp = any(".mlp.fc" in name and tensor.ndim == 4 for name, tensor in ours.items())
    named = {name: theirs for theirs, name in known.items() if name in ours}
    prefix = next(
        (theirs.removesuffix(to_name(name, form)) for name, theirs in named.items() if "head." not in name), ""
    )
    check_shapes(
        f"{path} (read as {form})",
        {
            named.get(name) or prefix + (to_name(name, form) or name): tuple(to_shape(name, t, form, conv_mlp).shape)
            for name, t in needed.items()
        },
        {str(theirs): tuple(getattr(tensor, "shape", ())) for theirs, tensor in tensors.items()},
    )
    mine = {name: from_shape(name, tensor, form, tuple(needed[name].shape)) for name, tensor in ours.items()}
    head, rest = divide(mine, "head.")
    encoder = {name: tensor for name, tensor in rest.items() if name.startswith(("stem.", "stages."))}
    return arch, encoder, {name: tensor for name, tensor in rest.items() if name not in encoder}, head


def _architecture(tensors: Tensors, form: str, path: Path) -> Encoder:
    """Which ConvNeXt these tensors are, under our names but in their shapes."""
    marks = ["stem.0.weight", *(f"stages.{i}.downsample.1.bias" for i in (1, 2, 3))]
    missing = [to_name(name, form) for name in marks if name not in tensors]
    if missing:
        raise UserError(f"{path} (read as {form}) is of another model: missing {', '.join(map(str, missing))}")
    stem = tensors["stem.0.weight"]
    if stem.ndim != 4 or stem.shape[2] != stem.shape[3] or stem.shape[2] not in (1, 2, 4):
        raise UserError(f"{path}: {to_name(marks[0], form)} is {list(stem.shape)}, needed [width, channels, 4, 4]")
    dims = (stem.shape[0], *(tensors[name].numel() for name in marks[1:]))
    depths = tuple(_count(tensors, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(4))
    version = "convnextv2_" if any(".grn." in name for name in tensors) else "convnext_"
    sizes = {name: size for name, size in SIZES.items() if name.startswith(version)}
    named = [name for name, (d, width) in sizes.items() if (d, tuple(width * 2**i for i in range(4))) == (depths, dims)]
    name = named[0] if named else min(sizes, key=lambda name: sizes[name][1])  # of another shape: the smallest's name
    return Encoder(name, stem.shape[1], stem.shape[2], depths, dims)


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the greatest number that the pattern finds."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _meta_tensors(arch: Encoder, found: Tensors) -> Tensors:
    """All tensors, without memory, of the parts of a model that `found` has some of; our names, our shapes."""
    with torch.device("meta"):
        tensors = ConvNeXt(arch, found["head.fc.bias"].numel() if "head.fc.bias" in found else 1).state_dict()
        if any(name.startswith(DECODER) for name in found):
            width = next((found[name].numel() for name in ("mask_token", "proj.bias") if name in found), 1)
            depth = max(1, _count(found, r"decoder\.(\d+)\."))
            model = FCMAE(PretrainModel(**asdict(arch), decoder_dim=width, decoder_depth=depth))
            tensors |= divide(model.state_dict(), "encoder.")[1]
    for part in ("head.fc.", "head."):
        if not any(name.startswith(part) for name in found):
            _, tensors = divide(tensors, part)
    return tensors


def _identity_norm(head: Tensors) -> bool:
    norm = [head.get(f"head.norm.{part}") for part in ("weight", "bias")]
    return len(head) == 2 and None not in norm and bool((norm[0] == 1).all() and (norm[1] == 0).all())


def _arguments(content: dict) -> dict:
    """The command line that the official code keeps in a checkpoint."""
    return vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}


def _classes(content: dict, form: str, head: Tensors, remarks: list[str]) -> list[str] | None:
    """Class names, from where each format keeps them."""
    if form == "transformers":
        labels = content.get("id2label") or {}
        found = [labels[key] for key in sorted(labels, key=int)]
        found = None if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in found) else found
    elif form == "mmpretrain":
        meta = content.get("meta") or {}
        found = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    else:
        found = content.get("label_names" if form == "timm" else "classes")
    outputs = head["head.fc.bias"].numel() if "head.fc.bias" in head else 0
    if found and outputs and len(found) != outputs:
        remarks.append(f"it names {len(found)} classes for {outputs} outputs: names left out")
        return None
    return [str(name) for name in found] if found else None


def _image(content: dict, form: str, arch: Encoder, remarks: list[str]) -> dict:
    """Image size, mean and std, from where each format keeps them; ImageNet's, which all of them use, if nowhere."""
    if form == "transformers":
        image = _processor(content)
    elif form == "timm":
        held = content.get("pretrained_cfg") or {}
        image = {"size": held.get("input_size", (0,))[1:], "eval_crop": held.get("crop_pct")} | {
            key: held.get(key) for key in ("mean", "std")
        }
    else:
        image = (content.get("meta") or {} if form == "mmpretrain" else content).get("image") or {}
        if "input_size" in _arguments(content):
            image = {"size": [_arguments(content)["input_size"]] * 2} | image
    image = {key: list(value) if isinstance(value, list | tuple) else value for key, value in image.items() if value}
    if len(image.get("mean") or ()) != arch.channels or len(image.get("std") or ()) != arch.channels:
        known = arch.channels == 3
        image |= {"mean": list(IMAGENET_MEAN) if known else None, "std": list(IMAGENET_STD) if known else None}
        remarks.append(
            "it does not tell how pixels were normalised: "
            + ("ImageNet's mean and std taken" if known else f"mean and std of its {arch.channels} channels unknown")
        )
    return {"size": [224, 224]} | image


def _processor(content: dict) -> dict:
    """Preprocessing of a transformers image processor."""
    held, side = content.get("preprocessor") or {}, content.get("image_size")
    size, crop = held.get("size") or {}, held.get("crop_size") or {}
    image = {"mean": held.get("image_mean"), "std": held.get("image_std"), "eval_crop": held.get("crop_pct")}
    if crop and "shortest_edge" in size:
        share = round(crop["height"] / size["shortest_edge"], 3)  # the edge was rounded to whole pixels
        image |= {"size": [crop["height"], crop["width"]], "eval_crop": share}
    elif "height" in size:
        image |= {"size": [size["height"], size["width"]], "eval_crop": 1.0}
    elif "shortest_edge" in size:
        image["size"] = [size["shortest_edge"]] * 2
    elif side:
        image["size"] = side if isinstance(side, list) else [side] * 2
    return image


def _pretraining(content: dict, arch: Encoder, decoder: Tensors) -> dict:
    """Settings of the masked autoencoder in an official sparse checkpoint; its GRN is over the batch."""
    stored, args = content.get("pretraining"), _arguments(content)
    settings = {
        "decoder_dim": decoder["mask_token"].numel(),
        "decoder_depth": _count(decoder, r"decoder\.(\d+)\."),
        "mask_ratio": args.get("mask_ratio", 0.6),
        "norm_pix": bool(args.get("norm_pix_loss", True)),
        "grn_scope": "batch",
    }
    model = asdict(PretrainModel(**asdict(arch), **settings))
    return model | (stored if isinstance(stored, dict) else {})
