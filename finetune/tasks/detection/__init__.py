"""Object detection and, with `masks`, instance segmentation: Faster R-CNN and Mask R-CNN."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from configs.keys import Choice, Share, fixed, require
from configs.schema import Finetune

if TYPE_CHECKING:
    from data.shards import Split
    from finetune.tasks.detection.inference import DetectionInference
    from finetune.tasks.detection.task import DetectionTask
    from models.opening import Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: head and augmentation. Images keep their shape and are padded to data.size;
    data.crop_scale, data.crop_ratio and augment.eval_crop are not used.
    """

    masks: bool = fixed(False, "also predict outlines (Mask R-CNN); every object needs a polygon or mask")
    width: PositiveInt = fixed(256, "channels of the FPN and of the mask head")
    hidden: PositiveInt = fixed(1024, "width of the box head")
    samples: PositiveInt = fixed(512, "proposals of each image that the box head is trained on")
    detections: PositiveInt = fixed(100, "maximum number of detections per image")
    jitter: tuple[float, float] = fixed(
        (0.1, 2.0), "large-scale jitter: range of the image's scale; 1 = it just fits into data.size"
    )
    max_objects: PositiveInt = fixed(500, "maximum number of objects of an image in training, chosen at random")
    metric: Literal["ap", "ap50", "mask_ap", "mask_ap50"] = fixed("ap", "score that selects the best weights")
    label_share: Share = fixed(1.0, "share of the images to train on, drawn with run.seed")

    def __post_init__(self):
        low, high = self.jitter
        require(0 < low <= high, "task.jitter", self.jitter, "two scales with 0 < min <= max")
        require(self.masks or "mask" not in self.metric, "task.metric", self.metric, "ap or ap50 without task.masks")


def make_task(config: Finetune, train: "Split", evaluation: "Split") -> "DetectionTask":
    """The task's `finetune.finetuning.Task`. Raises `UserError` if an image of either split has no boxes entry."""
    from finetune.tasks.detection.task import DetectionTask

    return DetectionTask(config, train, evaluation)


def make_inference(trained: "Trained") -> "DetectionInference":
    """The task's `finetune.inference.Inference` for a trained detector."""
    from finetune.tasks.detection.inference import DetectionInference

    return DetectionInference(trained)
