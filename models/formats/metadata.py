"""Metadata of other projects' weight files: class names, preprocessing, pretraining settings.

Files are untrusted: invalid values are ignored with a remark.
"""

import math
import re
from dataclasses import asdict

from configs.preprocessing import MAX_SIDE, Preprocessing
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Encoder, FCMAESettings, PretrainModel
from models.fcmae import flat_config
from models.weights import Tensors, decoder_shape

SQUASH_FROM = 384  # pixels: from this size on, transformers' ConvNextImageProcessor squashes; below it crops
RESAMPLE = {"bicubic": 3, "bilinear": 2, "nearest": 0}  # PIL's and transformers' numbers
WHOLE_CENTRE = 0.9999  # centre crop of the whole shorter side; 1 squashes the image


def _dict(value: object) -> dict:
    """The value if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def _numbers(value: object, count: int) -> list[float] | None:
    """The value if it is a list of `count` finite numbers, else None."""
    right_length = isinstance(value, list | tuple) and len(value) == count
    valid = right_length and all(type(number) in (int, float) and math.isfinite(number) for number in value)  # no bool
    return [float(number) for number in value] if valid else None


def _size(value: object) -> list[int] | None:
    """[height, width] in pixels, from a number or a pair; else None."""
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    valid = len(pair) == 2 and all(type(side) is int and 0 < side < MAX_SIDE for side in pair)
    return pair if valid else None


def _arguments(metadata: dict) -> dict:
    """The command line that the official code stores in a checkpoint."""
    return vars(metadata["args"]) if hasattr(metadata.get("args"), "__dict__") else {}


def class_names(metadata: dict, form: str, outputs: int, remarks: list[str]) -> list[str] | None:
    """Class names from the format's metadata; None if there are none or their number differs from `outputs`."""
    if form == "transformers":
        names = metadata.get("id2label")
    elif form == "mmpretrain":
        meta = _dict(metadata.get("meta"))
        names = _dict(meta.get("dataset_meta")).get("classes", meta.get("CLASSES"))  # CLASSES: older files
    elif form == "timm":
        config = _timm_config(metadata)
        names = metadata.get("label_names", config.get("label_names", config.get("labels")))
    else:
        names = metadata.get("classes")
    if isinstance(names, dict) and all(re.fullmatch(r"\d{1,6}", str(key)) for key in names):
        names = [names[key] for key in sorted(names, key=int)]
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str | int) for name in names):
        remarks.append("its class names are not a list of names: ignored")
        return None
    if outputs and len(names) != outputs:
        remarks.append(f"it has {len(names)} class names for {outputs} outputs: ignored")
        return None
    names = [str(name) for name in names]
    unnamed = form == "transformers" and names == [f"LABEL_{i}" for i in range(len(names))]
    return None if unnamed else names


def preprocessing(metadata: dict, form: str, arch: Encoder, remarks: list[str]) -> Preprocessing:
    """Preprocessing from the format's metadata.

    Defaults: 224 x 224 pixels, ImageNet's mean and std for 3 channels, bicubic, the crop of `Preprocessing`.
    """
    if form == "transformers":
        stored = _of_processor(_dict(metadata.get("preprocessor")), metadata.get("image_size"))
    elif form == "timm":
        stored = _of_timm(_timm_config(metadata))
    else:
        stored = _dict((_dict(metadata.get("meta")) if form == "mmpretrain" else metadata).get("image"))
        stored = {"size": _arguments(metadata).get("input_size")} | stored
    image: dict = {"size": _size(stored.get("size")) or [224, 224]}
    mean, std = (_numbers(stored.get(key), arch.channels) for key in ("mean", "std"))
    if mean is None or std is None or min(std) <= 0:
        mean, std, assumed = None, None, f"those of its {arch.channels} channels are unknown"
        if arch.channels == 3:
            mean, std, assumed = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and std assumed"
        remarks.append(f"it does not record mean and std: {assumed}")
    crop, interpolation, depth = (stored.get(key) for key in ("eval_crop", "interpolation", "bit_depth"))
    if _numbers([crop], 1) and 0 < crop <= 1:
        image["eval_crop"] = float(crop)
    if interpolation in [*RESAMPLE]:
        image["interpolation"] = interpolation
    elif interpolation is not None:
        remarks.append("its interpolation is not bicubic, bilinear or nearest: bicubic assumed")
    if type(depth) is int and 0 < depth <= 64:
        image["bit_depth"] = depth
    return Preprocessing.from_dict(image | {"mean": mean, "std": std}, arch.channels)


def _timm_config(metadata: dict) -> dict:
    """timm's pretrained_cfg; older config.json files have its keys at the top."""
    nested = "pretrained_cfg" in metadata or "architecture" not in metadata
    return _dict(metadata.get("pretrained_cfg")) if nested else metadata


def _of_timm(config: dict) -> dict:
    """Preprocessing of timm's pretrained_cfg."""
    size, crop = config.get("input_size"), config.get("crop_pct")
    size = size[1:] if isinstance(size, list | tuple) else None
    crop = WHOLE_CENTRE if crop == 1 and config.get("crop_mode") != "squash" else crop
    return config | {"size": size, "eval_crop": crop}


def _of_processor(config: dict, side: object) -> dict:
    """Preprocessing of a transformers image processor; `side` is the image size in the model's config."""
    size, crop, share = config.get("size"), _dict(config.get("crop_size")), config.get("crop_pct")
    size = {"shortest_edge": size} if type(size) is int else _dict(size)  # older files have a number
    edge, resample = (_size(size.get("shortest_edge")) or [0])[0], config.get("resample")
    name = next((name for name, number in RESAMPLE.items() if number == resample), resample)
    image = {"size": side, "mean": config.get("image_mean"), "std": config.get("image_std"), "interpolation": name}
    if edge and crop.get("height"):
        height = _numbers([crop["height"]], 1)
        share = round(height[0] / edge, 3) if height else None  # the edge is rounded to whole pixels
        return image | {"size": [crop["height"], crop.get("width")], "eval_crop": share}
    if _size([size.get("height"), size.get("width")]):
        return image | {"size": [size["height"], size["width"]], "eval_crop": 1.0}
    if edge:
        share = 1.0 if edge >= SQUASH_FROM else WHOLE_CENTRE if share == 1 else share
        return image | {"size": edge, "eval_crop": share}
    return image


def pretraining(metadata: dict, arch: Encoder, decoder: Tensors) -> dict:
    """Settings of the masked autoencoder: this project's metadata, or else the official code's command line.

    The official code's GRN normalises over the batch.
    """
    width, depth = decoder_shape(decoder)
    args, stored = _arguments(metadata), _dict(metadata.get("pretraining"))
    ratio = stored.get("mask_ratio", args.get("mask_ratio"))
    ratio = ratio if isinstance(ratio, float) and 0 < ratio < 1 else 0.6
    norm_pix = bool(stored.get("norm_pix", args.get("norm_pix_loss", True)))
    scope = stored.get("grn_scope") if stored.get("grn_scope") in ("image", "batch") else "batch"
    settings = FCMAESettings(decoder_dim=width, decoder_depth=depth, mask_ratio=ratio, norm_pix=norm_pix)
    return flat_config(PretrainModel(**asdict(arch), grn_scope=scope), settings)
