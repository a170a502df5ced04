"""Int8 for ONNX: static quantisation with calibration images, and a task's score before and after."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Data, Run
from data.loader import eval_loader
from finetune.batches import padded_batches
from finetune.exporters.comparison import Predict, explain_errors
from finetune.inference import predict
from launch.training.world import destroy_world, init_world

# the others (norms, GELU, GRN) stay fp32: their sums and ratios lose too much in 8 bits, and take little time
QUANTIZED = ["Conv", "MatMul", "Gemm"]
BATCH = 32  # images in scoring


class _Reader(CalibrationDataReader):
    """Feeds images [1, C, H, W] to onnxruntime's calibration."""

    def __init__(self, name: str, images: Iterable[Tensor]):
        self.feeds = ({name: image.numpy()} for image in images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantize(source: Path, out: Path, name: str, images: Tensor) -> None:
    """Write an ONNX file with int8 weights (by channel) and activations (by tensor), as QDQ nodes.

    `images` [N, C, H, W], from 0 to 1, are fed to the input `name` to measure the range of activations. Raises
    `UserError` if onnxruntime cannot quantise the model.
    """
    with explain_errors("onnx"):
        quantize_static(
            source, out, _Reader(name, images.split(1)), quant_format=QuantFormat.QDQ, op_types_to_quantize=QUANTIZED,
            per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QInt8,
        )  # fmt: skip


class _Exported(nn.Module):
    """An exported graph as the model of a task: normalised images [B, C, H, W] to its only output."""

    def __init__(self, run: Predict):
        super().__init__()
        self.run = run

    def forward(self, image: Tensor) -> Tensor:
        return self.run(image)[0]


def scores(task: Any, images: Any, count: int, models: dict[str, Predict], data: Data) -> tuple[dict[str, float], int]:
    """A task's score of exported models, by name, and the number of images that count.

    Args:
        task: an `Inference` with `score`, matched with the images
        images: the split to score on; at most `count` images, evenly spread
    Raises:
        UserError: no image has a target
    """
    used = min(count, len(images))
    samples, channels = np.arange(used) * len(images) // used, task.trained.preprocessing.channels
    batch, world = min(BATCH, used), init_world(Run(device="cpu"))
    try:
        loader = eval_loader(
            images, task.transform, channels, data, batch, samples=samples, read_target=task.read_target
        )
        modules = {name: _Exported(run) for name, run in models.items()}
        # the graphs normalise: they take pixels from 0 to 1
        plain = torch.zeros(channels), torch.ones(channels)
        found = predict(task, modules, padded_batches(loader, batch, {}, True), world, *plain, "fp32")
        results = {name: task.evaluation(predictions)["scores"] for name, predictions in found.items()}
    finally:
        destroy_world()
    first = next(iter(results.values()))
    return {name: result[task.score] for name, result in results.items()}, first["images"]


def check_drop(before: float, after: float, count: int, max_drop: float, name: str) -> str:
    """A line on the score before and after. Raises `UserError` if it falls by more than `max_drop` points."""
    line = f"{name} {100 * before:.2f} % in fp32, {100 * after:.2f} % in int8, on {count:,} images"
    if not 100 * (before - after) <= max_drop:  # also NaN
        way_out = "raise --max-drop, give more or other --calibrate images, or use --fp16"
        raise UserError(f"--quantize int8 loses too much: {line}: nothing is written; {way_out}")
    return line
