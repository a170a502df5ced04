"""Training of a detector: boxes of the shards, augmentation, loss, COCO's scores."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError, counted
from configs.log import say
from configs.schema import Encoder, Finetune
from data.boxes import Target
from data.loader import Transform
from data.sampler import labelled_share
from data.shards import Split
from finetune.tasks.building import any_target, build_model
from finetune.tasks.detection import scores
from finetune.tasks.detection.model import Detector
from finetune.tasks.detection.scores import Predictions
from finetune.tasks.detection.transforms import EvalTransform, ReadTarget, TrainTransform
from models.opening import Opened
from models.start import start_encoder

MEASURED_OBJECTS = 20  # of each image that the memory of a step is measured with


def box_classes(split: Split) -> list[str]:
    """Class names of a split's boxes. Raises `UserError` if it has none, or images that were not annotated."""
    where, targets = f"{split.folder}, split {split.name}", getattr(split, "targets", None)
    if not targets or targets["kind"] != "boxes":
        raise UserError(f"{where} has no boxes: prepare it with python data/prepare.py SOURCE OUT --boxes FILE")
    if missing := split.without_target():
        raise UserError(f"{where} has {missing:,} images that were not annotated: prepare it with their boxes")
    return targets["names"]


def has_boxes(target: Target) -> bool:
    """Whether an image has a box that is not of a crowd region."""
    return any(not box.get("crowd") for box in target["boxes"])


def classes_with_boxes(split: Split, read_target: ReadTarget) -> set[str]:
    """Classes of a split's boxes; damaged samples are passed over, as in evaluation."""
    names = set()
    for sample in range(len(split)):
        with suppress(UserError):
            names |= {box["class"] for box in read_target(split.read_target(sample))["boxes"]}
    return names


class DetectionTask:
    """Faster or Mask R-CNN, the sum of its losses, COCO's AP. Implements `finetune.finetuning.Task`."""

    join = staticmethod(scores.join)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        self.config, self.train, self.evaluation, settings = config, train, evaluation, config.task
        self.classes, self.metric = box_classes(train), settings.metric
        box_classes(evaluation)
        self.read_target = ReadTarget(tuple(self.classes), settings.masks)
        for split in (train, evaluation):
            if not any_target(split, self.read_target, has_boxes):
                raise UserError(f"{split.folder}, split {split.name}: no image has a box: add images with boxes")
        seen = classes_with_boxes(evaluation, self.read_target)
        self.unseen = [name for name in self.classes if name not in seen]
        keys = ("width", "hidden", "masks", "samples", "detections")
        self.head = {"classes": len(self.classes), **{key: getattr(settings, key) for key in keys}}
        self.head_config = {"head": self.head, "ids": train.targets.get("ids")}
        self.mean: tuple[float, ...] = ()

    def describe(self) -> str:
        kind = "Mask R-CNN" if self.config.task.masks else "Faster R-CNN"
        return f"{kind} of {counted(len(self.classes), 'class', 'classes')}"

    def check_batch(self, micro: int) -> None:
        """Any micro batch will do."""

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        self.mean = mean
        return TrainTransform(self.config.data, self.config.augment, self.config.task, mean, tuple(self.classes))

    def eval_transform(self) -> Transform:
        data = self.config.data
        return EvalTransform(data.height_width, self.mean, data.eval_interpolation)

    def sample_weights(self) -> np.ndarray | None:
        share, seed = self.config.task.label_share, self.config.run.seed
        if share == 1:
            return None
        return labelled_share(np.zeros(len(self.train), int), share, seed).astype(float)

    def build(self, arch: Encoder) -> Detector:
        return build_model(self.config.model, lambda *options: Detector(arch, self.head, *options))

    def load(self, model: Detector, init: Opened | None) -> None:
        """Load --init: the encoder, and the head of a detector with the same settings and classes."""
        if init is None:
            return
        start_encoder(model, init)
        weights = init.weights
        if weights.task != "detection":
            return
        keep = weights.classes == self.classes and weights.task_config["head"] == self.head
        if keep:
            model.load_state_dict(weights.head, strict=False)
        say(f"{init.path}: its detection head is {'kept' if keep else 'replaced by a new one'}")

    def inputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] with made-up targets, to measure the memory of a step."""
        count, (height, width) = len(image), image.shape[-2:]
        start = torch.rand(count * MEASURED_OBJECTS, 2) / 2
        scale = torch.tensor([width, height, width, height])
        boxes = torch.cat([start, start + 0.05 + torch.rand_like(start) / 4], 1) * scale
        targets = [torch.full((count,), MEASURED_OBJECTS), boxes, torch.zeros(len(boxes), dtype=torch.int64)]
        if self.config.task.masks:
            targets.append(torch.ones(len(boxes), height, width, dtype=torch.uint8))
        return image, *targets

    def loss(self, model: Callable[..., Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of proposals, classes, boxes and masks."""
        keys = ("object_box", "object_label", "object_mask")
        targets = [batch[key].to(image.device, non_blocking=True) for key in keys if key in batch]
        return model(image, batch["objects"], *targets)

    def run(self, model: nn.Module, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return model(image)

    def collect(self, output: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Predictions:
        number = {name: i for i, name in enumerate(self.classes)}
        return scores.collect(output, batch, partial(truth_of, self.evaluation), number)

    def restore(self, state: dict) -> Predictions:
        return Predictions(**state)

    def format(self, scores: dict[str, float]) -> str:
        line = f"AP {scores['ap']:.2%}, AP50 {scores['ap50']:.2%}"
        return f"{line}, mask AP {scores['mask_ap']:.2%}" if "mask_ap" in scores else line

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write examples.png."""
        from finetune.tasks.detection.pictures import examples

        examples(folder / "examples.png", predictions, self.evaluation, self.classes)


def truth_of(split: Split, sample: int) -> dict:
    """A sample's target, already checked by the loader."""
    return json.loads(split.read_target(sample))
