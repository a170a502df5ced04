"""Faster R-CNN (1506.01497) and Mask R-CNN (1703.06870) with an FPN (1612.03144) on the four stages.

The parts and the training are torchvision's. Its `GeneralizedRCNN` is not used: images arrive normalised and of one
size. The detections are computed here with fixed shapes, so that they can be exported; they equal torchvision's.

Boxes are (x0, y0, x1, y1) in pixels of the padded image; B = images, N = objects of all images, D = detections.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from configs.schema import Encoder
from models.convnext import EPS, ConvNeXt
from models.sparse.layouts import Dense

LEVELS = ("0", "1", "2", "3")  # names of the stages' maps; `pool` follows
ANCHOR = 8  # side of an anchor, in strides of its level: 32 pixels at stride 4, as in the FPN paper
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
TOP_PROPOSALS = {"training": 2000, "testing": 1000}  # before NMS from each level, and after NMS
CANDIDATES = 4000  # most likely (proposal, class) pairs of an image that enter the last NMS
MIN_SCORE = 0.05  # of a detection
MASK_SIDE = 28  # pixels of a predicted mask
MIN_SIDES = 1e-3, 1e-2  # pixels: of a proposal, of a detection


class Detector(ConvNeXt):
    """An encoder with a detection head; see `DetectionHead`."""

    def __init__(self, arch: Encoder, head: dict, drop_path: float = 0.0, recompute: str = "none"):
        super().__init__(arch, 0, drop_path, recompute)
        self.head = DetectionHead(self.arch, **head)

    def forward(self, image: Tensor, *targets: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised images [B, C, H, W] and, in training, targets as `DetectionHead` takes them, to the sum of the
        losses [] or the detections.
        """
        return self.head(image, *self.forward_stages(image, Dense()), *targets)


class Float(nn.Module):
    """Outputs of a module as float32: under autocast, boxes would have the 8 bits of bf16."""

    def forward(self, x: Tensor | list[Tensor]) -> tuple[Tensor | list[Tensor], ...]:
        return tuple(
            [y.float() for y in part] if isinstance(part, list) else part.float() for part in super().forward(x)
        )


class FloatRPNHead(Float, RPNHead):
    """RPN's head with float32 outputs."""


class FloatPredictor(Float, FastRCNNPredictor):
    """Classes and boxes of proposals in float32."""


class DetectionHead(nn.Module):
    """LayerNorm of each stage, FPN, region proposals, box head and, with `masks`, mask head.

    Args:
        classes: number of classes
        width: channels of the FPN and of the mask head
        hidden: width of the box head
        masks: whether outlines are predicted
        samples: proposals of an image that the box head is trained on
        detections: maximum number of detections per image
    """

    def __init__(
        self, arch: Encoder, classes: int, width: int, hidden: int, masks: bool, samples: int, detections: int
    ):
        super().__init__()
        self.masks, self.detections = masks, detections
        strides = [arch.stem_stride * 2**i for i in range(5)]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, EPS) for dim in arch.dims)
        self.fpn = FeaturePyramidNetwork(list(arch.dims), width, extra_blocks=LastLevelMaxPool())
        anchors = AnchorGenerator(tuple((ANCHOR * stride,) for stride in strides), (RATIOS,) * len(strides))
        self.rpn = RegionProposalNetwork(
            anchors, FloatRPNHead(width, len(RATIOS)), 0.7, 0.3, 256, 0.5, TOP_PROPOSALS, TOP_PROPOSALS, 0.7
        )
        parts = {}
        if masks:
            parts["mask_roi_pool"] = _pool(MASK_SIDE // 2, strides)
            parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1)
            parts["mask_predictor"] = MaskRCNNPredictor(width, width, 1 + classes)
        self.roi = RoIHeads(
            _pool(7, strides), TwoMLPHead(width * 49, hidden), FloatPredictor(hidden, 1 + classes),
            0.5, 0.5, samples, 0.25, None, MIN_SCORE, 0.5, detections, **parts,
        )  # fmt: skip

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tokens [B, Hi, Wi, Ci] of the four stages and, in training, targets: `objects` [B] (on the CPU), `boxes`
        [N, 4], `labels` [N] from 0 and, for masks, `masks` [N, H, W]; to the loss or what `detect` returns.
        """
        maps = (norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, inputs[:4], strict=True))
        features = self.fpn(OrderedDict(zip(LEVELS, maps, strict=True)))
        images = ImageList(image, [tuple(image.shape[-2:])] * len(image))
        if not self.training:
            return self.detect(images, features)
        objects, *targets = inputs[4:]
        parts = [x.split(objects.tolist()) for x in (targets[0], 1 + targets[1], *targets[2:])]
        names = ("boxes", "labels", "masks")
        by_image = [dict(zip(names, part, strict=False)) for part in zip(*parts, strict=True)]
        proposals, losses = self.rpn(images, features, by_image)
        losses |= self.roi(features, proposals, images.image_sizes, by_image)[1]
        return sum(losses.values())

    def detect(self, images: ImageList, features: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Boxes [B, D, 4], scores [B, D] and labels [B, D] from 0, in descending order of scores, padded with score 0;
        with masks also their probabilities [B, D, 28, 28], each mask stretched over its box.
        """
        proposals = self._proposals(images, features)
        sizes = images.image_sizes
        logits, deltas = self.roi.box_predictor(self.roi.box_head(self.roi.box_roi_pool(features, proposals, sizes)))
        count = len(proposals[0])
        boxes = self.roi.box_coder.decode(deltas, proposals).unflatten(0, (-1, count))
        scores = logits.softmax(-1).unflatten(0, (-1, count))
        found = [self._best(*part) for part in zip(boxes, scores, sizes, strict=True)]
        boxes, scores, labels = (torch.stack(part) for part in zip(*found, strict=True))
        if not self.masks:
            return boxes, scores, labels
        pooled = self.roi.mask_roi_pool(features, list(boxes), sizes)
        masks = self.roi.mask_predictor(self.roi.mask_head(pooled)).float()
        index = (1 + labels.flatten())[:, None, None, None].expand(-1, 1, MASK_SIDE, MASK_SIDE)
        return boxes, scores, labels, masks.gather(1, index)[:, 0].sigmoid().unflatten(0, labels.shape)

    def _proposals(self, images: ImageList, features: dict[str, Tensor]) -> list[Tensor]:
        """Proposals of each image, equally many: the missing ones have no area."""
        maps = list(features.values())
        objectness, deltas = self.rpn.head(maps)
        anchors = self.rpn.anchor_generator(images, maps)
        per_level = [math.prod(x.shape[1:]) for x in objectness]
        logits, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = self.rpn.box_coder.decode(deltas, anchors).unflatten(0, (len(anchors), -1))[:, :, 0]
        logits = logits.unflatten(0, (len(anchors), -1))[..., 0]
        found = []
        for box, logit, size in zip(boxes, logits, images.image_sizes, strict=True):
            best, start = [], 0
            for count in per_level:
                best.append(start + logit[start : start + count].topk(min(TOP_PROPOSALS["testing"], count)).indices)
                start += count
            level = torch.cat([torch.full_like(part, i) for i, part in enumerate(best)])
            chosen = torch.cat(best)
            box, score = clip_boxes_to_image(box[chosen], size), logit[chosen]  # onnxruntime's sigmoid(-16) is 0
            valid = _kept(box, score, level, self.rpn.nms_thresh, MIN_SIDES[0], -torch.inf)
            score, order = torch.where(valid, score, -torch.inf).topk(min(TOP_PROPOSALS["testing"], len(score)))
            found.append(box[order] * (score > -torch.inf)[:, None])
        return found

    def _best(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The detections of an image, from boxes [P, 1 + classes, 4] and scores [P, 1 + classes] of its proposals."""
        classes = scores.shape[1] - 1
        scores, boxes = scores[:, 1:].flatten(), clip_boxes_to_image(boxes[:, 1:].flatten(0, 1), size)
        scores, order = scores.topk(min(CANDIDATES, len(scores)))
        boxes, labels = boxes[order], order % classes
        valid = _kept(boxes, scores, labels, self.roi.nms_thresh, MIN_SIDES[1], MIN_SCORE)
        scores, order = torch.where(valid, scores, 0.0).topk(min(self.detections, len(scores)))
        return boxes[order], scores, labels[order]


def _kept(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, min_side: float, min_score: float) -> Tensor:
    """Bools [N]: which boxes remain after NMS within groups; those too small or unlikely do not take part."""
    large = ((boxes[:, 2:] - boxes[:, :2]) >= min_side).all(1) & (scores > min_score)
    groups = torch.where(large, groups + 1, 0)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # apart by their places, as torchvision has it there
        shift = groups * (boxes.max() + 1)
        kept = nms(boxes + shift[:, None], scores, overlap)
    else:
        kept = batched_nms(boxes, scores, groups, overlap)
    return torch.zeros_like(large).scatter(0, kept, torch.ones_like(kept, dtype=torch.bool)) & large


def _pool(side: int, strides: list[int]) -> MultiScaleRoIAlign:
    """RoIAlign from the level that fits a box; the scales are set, because torchvision guesses them from the first
    images.
    """
    pool = MultiScaleRoIAlign(list(LEVELS), side, 2)
    pool.scales = [1 / stride for stride in strides[:4]]
    lowest, highest = (int(math.log2(strides[i])) for i in (0, 3))
    pool.map_levels = initLevelMapper(lowest, highest)
    return pool
