"""A trained model from a file: with the preprocessing and the class names that belong to it."""

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.arguments import parse_size
from configs.errors import UserError
from configs.schema import Augment, Data
from data.transforms import EvalTransform
from models.convnext import ConvNeXt
from models.formats.read import read_weights
from models.weights import Weights, averaged, load_strict


@dataclass(frozen=True)
class Trained:
    """A classifier to use, or an encoder.

    Args:
        path: the file
        model: in evaluation mode; normalised images [B, C, H, W] to logits [B, classes]; a backbone has no head
        weights: what the file holds of it, with the preprocessing that is used
        classes: class names; None = the file has none
        transform: what an image goes through before it is normalised
        mean: [C] of the channels
        std: [C]
    """

    path: str
    model: ConvNeXt
    weights: Weights
    classes: list[str] | None
    transform: EvalTransform
    mean: Tensor
    std: Tensor


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a classifier: its file, which of its weights, at which size."""
    parser.add_argument("weights", metavar="WEIGHTS", help="best.pt, or a file or folder of any other format")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights in place of the raw ones")
    parser.add_argument(
        "--size", type=parse_size, metavar="PIXELS", help="side of the images, or [height,width] (default: the file's)"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that uses a classifier: those of `add_model`, and where it runs."""
    add_model(parser)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="default: bf16 on a GPU that has it, else fp32",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it


def open_trained(
    path: str, ema: bool = False, size: int | tuple[int, int] | None = None, backbone: bool = False
) -> Trained:
    """Read a classifier, or the encoder of one or of an autoencoder, in any format.

    Args:
        path: best.pt, or a file or folder of another format
        ema: take the averaged weights, not the raw ones
        size: height and width of the images, pixels; None = those of the file
        backbone: leave the head out, if there is one
    Raises:
        UserError: the file cannot be read, has no classifier, no averaged weights or no statistics; the size does not
            suit the model
    """
    weights, _, _ = read_weights(path)
    if not (weights.outputs or backbone):
        raise UserError(f"{path} has no classifier: fine-tune it first, with python finetune/main.py --init {path}")
    weights = averaged(weights, path) if ema else weights
    image = weights.image
    if image["mean"] is None:
        raise UserError(
            f"{path} does not tell how its {weights.arch.channels} channels were normalised: use an fcmae.pt or best.pt"
        )
    data = Data(size=size or tuple(image["size"]))
    data.grid(weights.arch.stem_stride)  # may refuse the size
    crop, interpolation = image.get("eval_crop", Augment.eval_crop), image.get("interpolation", "bicubic")
    image = image | {"size": list(data.height_width), "eval_crop": crop, "interpolation": interpolation}
    weights = replace(weights, image=image, decoder={}, ema=None)
    if backbone:
        weights = replace(weights, head={}, classes=None)
    model = ConvNeXt(weights.arch, weights.outputs)
    load_strict(model, weights.encoder | weights.head, path)
    transform = EvalTransform(data.height_width, crop, interpolation)
    mean, std = torch.tensor(image["mean"]), torch.tensor(image["std"])
    return Trained(path, model.eval(), weights, weights.classes, transform, mean, std)
