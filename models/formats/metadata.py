"""What stands beside the tensors in another project's file: class names, preprocessing, settings of pretraining.

Files are from outside: each value is taken only if it is what it should be; what is not is left out, with a remark.
"""

import math
import re
from dataclasses import asdict

from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Encoder, FCMAESettings, PretrainModel
from models.fcmae import flat_config
from models.weights import Tensors, decoder_shape

SQUASH_FROM = 384  # pixels: transformers' ConvNextImageProcessor crops below, and squashes from here on
RESAMPLE = {"bicubic": 3, "bilinear": 2, "nearest": 0}  # interpolations, by the numbers PIL and transformers give them
WHOLE_CENTRE = 0.9999  # eval_crop for "all of the shorter side, cropped": 1 would squash


def _dict(value: object) -> dict:
    """A dict, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def _numbers(value: object, count: int) -> list[float] | None:
    """`count` finite numbers, or None."""
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    fine = all(type(number) in (int, float) and math.isfinite(number) for number in value)  # a bool is none
    return [float(number) for number in value] if fine else None


def _size(value: object) -> list[int] | None:
    """[height, width] in pixels of a number or a pair, or None."""
    pair = [value, value] if type(value) is int else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    return list(pair) if all(type(side) is int and 0 < side < 1 << 16 for side in pair) else None


def _arguments(beside: dict) -> dict:
    """The command line that the official code keeps in a checkpoint."""
    return vars(beside["args"]) if hasattr(beside.get("args"), "__dict__") else {}


def class_names(beside: dict, form: str, outputs: int, remarks: list[str]) -> list[str] | None:
    """Class names, from where each format keeps them; None where there are none, or not as many as outputs."""
    if form == "transformers":
        found = beside.get("id2label")
    elif form == "mmpretrain":
        meta = _dict(beside.get("meta"))
        found = _dict(meta.get("dataset_meta")).get("classes", meta.get("CLASSES"))  # the second in older files
    else:
        found = beside.get("label_names" if form == "timm" else "classes")
    if isinstance(found, dict) and all(re.fullmatch(r"\d{1,6}", str(key)) for key in found):
        found = [found[key] for key in sorted(found, key=int)]
    if found is None:
        return None
    if not isinstance(found, list | tuple) or not found or not all(isinstance(name, str | int) for name in found):
        remarks.append("its class names are no list of names: left out")
        return None
    if outputs and len(found) != outputs:
        remarks.append(f"it names {len(found)} classes for {outputs} outputs: names left out")
        return None
    names = [str(name) for name in found]
    unnamed = form == "transformers" and names == [f"LABEL_{i}" for i in range(len(names))]
    return None if unnamed else names


def preprocessing(beside: dict, form: str, arch: Encoder, remarks: list[str]) -> dict:
    """Image size, mean, std, crop and interpolation, from where each format keeps them.

    Where it tells none: ImageNet's mean and std, which all use; bicubic, which is left out of what is returned.
    """
    if form == "transformers":
        held = _of_processor(_dict(beside.get("preprocessor")), beside.get("image_size"))
    elif form == "timm":
        held = _of_timm(_dict(beside.get("pretrained_cfg")))
    else:
        held = _dict((_dict(beside.get("meta")) if form == "mmpretrain" else beside).get("image"))
        held = {"size": _arguments(beside).get("input_size")} | held
    image: dict = {"size": _size(held.get("size")) or [224, 224]}
    statistics = [_numbers(held.get(key), arch.channels) for key in ("mean", "std")]
    if None in statistics or min(statistics[1]) <= 0:
        known = arch.channels == 3
        statistics = [list(IMAGENET_MEAN), list(IMAGENET_STD)] if known else [None, None]
        taken = "ImageNet's mean and std taken" if known else f"mean and std of its {arch.channels} channels unknown"
        remarks.append(f"it does not tell how pixels were normalised: {taken}")
    image["mean"], image["std"] = statistics
    crop = _numbers([held.get("eval_crop")], 1)
    image |= {"eval_crop": crop[0]} if crop and 0 < crop[0] <= 1 else {}
    how = held.get("interpolation")
    if how not in (None, *RESAMPLE):
        remarks.append("its interpolation is none of bicubic, bilinear and nearest: bicubic taken")
        how = None
    return image | ({"interpolation": how} if how not in (None, "bicubic") else {})


def _of_timm(held: dict) -> dict:
    """Preprocessing of timm's pretrained_cfg."""
    size, crop = held.get("input_size"), held.get("crop_pct")
    if held.get("crop_mode") != "squash" and crop == 1:
        crop = WHOLE_CENTRE
    size = size[1:] if isinstance(size, list | tuple) else None
    return {"size": size, "eval_crop": crop} | {key: held.get(key) for key in ("mean", "std", "interpolation")}


def _of_processor(held: dict, side: object) -> dict:
    """Preprocessing of a transformers image processor; `side` is the model's own image size."""
    size, crop = held.get("size"), _dict(held.get("crop_size"))
    size = {"shortest_edge": size} if type(size) is int else _dict(size)  # a number in older files
    edge, share = size.get("shortest_edge"), held.get("crop_pct")
    resample = held.get("resample")
    how = next((how for how, number in RESAMPLE.items() if number == resample), resample)
    image = {"size": side, "mean": held.get("image_mean"), "std": held.get("image_std"), "interpolation": how}
    if _size(edge) and crop.get("height"):
        share = _numbers([crop["height"]], 1)
        share = round(share[0] / edge, 3) if share else None  # the edge was rounded to whole pixels
        return image | {"size": [crop.get("height"), crop.get("width")], "eval_crop": share}
    if "height" in size:
        whole = _size([size["height"], size.get("width")])
        return image | ({"size": whole, "eval_crop": 1.0} if whole else {})
    if _size(edge):
        share = 1.0 if edge >= SQUASH_FROM else WHOLE_CENTRE if share == 1 else share
        return image | {"size": edge, "eval_crop": share}
    return image


def pretraining(beside: dict, arch: Encoder, decoder: Tensors) -> dict:
    """Settings of the masked autoencoder in an official sparse checkpoint; the official code's GRN is over the batch.

    A file that this project wrote names them; else the command line that the official code keeps does.
    """
    width, depth = decoder_shape(decoder)
    args, stored = _arguments(beside), _dict(beside.get("pretraining"))
    ratio = stored.get("mask_ratio", args.get("mask_ratio"))
    ratio = ratio if isinstance(ratio, float) and 0 < ratio < 1 else 0.6
    norm_pix = bool(stored.get("norm_pix", args.get("norm_pix_loss", True)))
    scope = stored.get("grn_scope") if stored.get("grn_scope") in ("image", "batch") else "batch"
    settings = FCMAESettings(decoder_dim=width, decoder_depth=depth, mask_ratio=ratio, norm_pix=norm_pix)
    return flat_config(PretrainModel(**asdict(arch), grn_scope=scope), settings)
