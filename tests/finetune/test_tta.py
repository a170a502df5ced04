"""Test-time augmentation: views, and what is averaged."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.errors import UserError
from data.transforms import EvalTransform
from finetune.options import PredictionOptions
from finetune.tta import Averaged, with_views


def mean(outputs):
    return torch.stack(outputs).mean(0)


class Corner(nn.Module):
    """The first pixel of each image."""

    def forward(self, image):
        return image[:, :, 0, 0]


@pytest.mark.parametrize(
    ("names", "expected"), [(["hflip"], 0.5), (["vflip"], 1.0), (["hflip", "vflip"], 1.5), (["vflip", "hflip"], 1.5)]
)
def test_flips(names, expected):
    image = torch.tensor([[0.0, 1], [2, 3]])[None, None]
    assert Averaged(Corner(), names, (2, 2), mean)(image).item() == expected


def test_an_output_that_is_an_image_is_flipped_back():
    image = torch.rand(2, 3, 4, 5)
    assert torch.allclose(Averaged(nn.Identity(), ["hflip", "vflip"], (4, 5), mean)(image), image)


def test_crops_are_corners_and_centre():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert Averaged(Corner(), ["crops"], (2, 2), lambda x: torch.cat(x))(image).flatten().tolist() == [0, 2, 8, 10, 5]


@pytest.mark.parametrize(("crop", "side"), [(0.875, 64), (1, 64), (0.5, 64)])
def test_the_centre_of_a_larger_image_is_the_usual_crop(crop, side):
    """Crops of 56 pixels from 64; with eval_crop 1 the whole image is enlarged."""
    image = (torch.rand(1, 128, 128) * 255).byte()
    plain = EvalTransform((56, 56), crop)
    large = plain.enlarged(8 / 7)(image)["image"]
    assert large.shape == (1, side, side)
    if crop < 1:
        centre = large[:, 4:60, 4:60].int()
        assert (centre - plain(image)["image"].int()).abs().max() <= 2


def test_a_task_without_an_average_is_refused():
    task = SimpleNamespace(transform=None, trained=SimpleNamespace(weights=SimpleNamespace(task="boxes")))
    with pytest.raises(UserError, match=r"--tta hflip: task boxes"):
        with_views(task, ["hflip"])
    with pytest.raises(UserError, match=r"--tta is flips.*hflip"):
        PredictionOptions(weights="x.pt", tta=("flips",))
