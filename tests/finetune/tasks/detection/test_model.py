"""The detector: levels and anchors for every stem stride, detections equal to torchvision's; moved boxes."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from configs.schema import Augment, Data, Encoder
from finetune.tasks.detection import Settings
from finetune.tasks.detection.model import Detector
from finetune.tasks.detection.transforms import EvalTransform, TrainTransform
from models.sizes import resolve
from models.sparse.layouts import Dense


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_levels_anchors_and_detections(stride):
    torch.manual_seed(0)
    arch = resolve(Encoder("convnextv2_atto", 3, stride, (1, 1, 1, 1), (8, 16, 16, 16)))
    head = {"classes": 3, "width": 16, "hidden": 32, "masks": True, "samples": 32, "detections": 20}
    model = Detector(arch, head).eval()
    image = torch.randn(2, 3, 16 * stride, 24 * stride)
    with torch.no_grad():
        found = model(image)
        stages = zip(model.head.norms, model.forward_stages(image, Dense()), strict=True)
        maps = [norm(x).permute(0, 3, 1, 2) for norm, x in stages]
        features = model.head.fpn(OrderedDict(zip("0123", maps, strict=True)))
        images = ImageList(image, [tuple(image.shape[-2:])] * 2)
        proposals, _ = model.head.rpn(images, features)
        expected, _ = model.head.roi(features, proposals, images.image_sizes)
    sides = [image.shape[2] // x.shape[2] for x in list(features.values())[:2]]
    assert sides == [stride, 2 * stride] and model.head.roi.box_roi_pool.scales == [1 / stride / 2**i for i in range(4)]
    first = model.head.rpn.anchor_generator(images, list(features.values()))[0][:3]
    assert np.allclose((first[:, 2:] - first[:, :2]).prod(1) ** 0.5, 8 * stride, rtol=0.1 + 0.2 / stride)
    for i, one in enumerate(expected):
        count = len(one["scores"])
        assert count and int((found[1][i] > 0).sum()) == count
        for mine, name in zip(found, ("boxes", "scores", "labels", "masks"), strict=True):
            wanted = {"labels": one["labels"] - 1, "masks": one["masks"][:, 0]}.get(name, one.get(name))
            assert torch.allclose(mine[i, :count].float(), wanted.float(), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_follow_their_pixels(seed):
    """A bright rectangle is where its box and its mask say, after every crop, scale and flip."""
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    image[:, 30:60, 40:80] = 255
    outline = [[40, 30, 80, 30, 80, 60, 40, 60]]
    boxes = [{"class": "cell", "box": [40, 30, 40, 30], "segmentation": outline}]
    settings = Settings("detection", masks=True, jitter=(0.7, 1.6))
    data = Data(size=(96, 96), hflip=0.5, vflip=0.5, interpolation="bilinear")
    transform = TrainTransform(data, Augment(), settings, (0, 0, 0), ("cell",))
    target = {"height": 90, "width": 120, "boxes": boxes}
    found = transform(image, target, np.random.default_rng(seed))
    ys, xs = np.nonzero(found["image"][0].numpy() > 127)
    corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert np.allclose(found["object_box"][0], corners, atol=1)
    assert ((found["image"][0] > 127) != found["object_mask"][0].bool()).sum() < 150
    whole = EvalTransform((96, 96), (0, 0, 0))(image)
    assert whole["content"].tolist() == [72, 96] and whole["source"].tolist() == [90, 120]


def test_an_empty_image_has_a_loss():
    arch = resolve(Encoder("convnextv2_atto", 5, 2, (1, 1, 1, 1), (8, 16, 16, 16)))
    head = {"classes": 3, "width": 16, "hidden": 32, "masks": True, "samples": 32, "detections": 20}
    none = torch.tensor([0]), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 32, 32).byte()
    loss = Detector(arch, head).train()(torch.randn(1, 5, 32, 32), *none)
    loss.backward()
    assert torch.isfinite(loss)


def losses(model: Detector, precision: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of two images with three objects, and all gradients."""
    torch.manual_seed(1)  # of the images, and of the sample of proposals
    boxes = torch.tensor([[4.0, 4, 40, 30], [20, 10, 60, 60], [8, 8, 24, 24]])
    targets = torch.tensor([2, 1]), boxes, torch.tensor([0, 2, 1]), (torch.rand(3, 64, 64) > 0.5).byte()
    model.zero_grad()
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        loss = model(torch.randn(2, 3, 64, 64), *targets)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def detector(recompute: str = "none") -> Detector:
    """A small Mask R-CNN, the same each time."""
    torch.manual_seed(0)
    arch = resolve(Encoder("convnextv2_atto", 3, 4, (1, 1, 1, 1), (8, 16, 16, 16)))
    head = {"classes": 3, "width": 16, "hidden": 32, "masks": True, "samples": 32, "detections": 20}
    return Detector(arch, head, 0.0, recompute).train()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_loss_in_16_bits(precision):
    """It is that of fp32 but for rounding; boxes are computed in fp32."""
    expected, _ = losses(detector())
    loss, gradients = losses(detector(), precision)
    assert abs(loss - expected) < 0.02 * expected
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_recomputing_changes_nothing():
    expected, gradients = losses(detector())
    loss, again = losses(detector("block"))
    assert loss == expected
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients.items())
