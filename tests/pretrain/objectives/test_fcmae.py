"""What FCMAE needs of a batch, and what it gives to the stage."""

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, FCMAESettings, Pretrain
from data.transforms import sample_rng
from launch.training.memory import measure_activations
from models.fcmae import from_flat
from pretrain.objectives.fcmae import Objective
from tests.conftest import has
from tests.models.helpers import tiny


def objective(**settings) -> Objective:
    model, _ = tiny()
    return Objective(Pretrain(data=Data(size=64), model=model, objective=FCMAESettings(decoder_dim=16, **settings)))


def test_a_sample_has_an_image_and_a_mask():
    made = objective(mask_ratio=0.75)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 80, 90), np.uint8))
    sample = made.transform()(image, -1, sample_rng(0, 0, 0))
    assert sample["image"].shape == (3, 64, 64) and sample["visible"].dtype == torch.bool
    assert int(sample["visible"].sum()) == made.visible == made.patches // 4


def test_the_forward_of_the_model_is_the_loss_of_the_inputs():
    made = objective()
    model, image = made.build(), torch.rand(2, 3, 64, 64)
    inputs = made.inputs(image, made.example(2))
    loss = model(*inputs)
    assert loss.ndim == 0 and loss.requires_grad
    output = model.predict(*inputs)
    expected = (output.prediction - model.target(image, output.hidden)).square().mean()
    assert torch.equal(loss, expected)


def test_the_decoder_in_a_file_builds_the_same_model():
    made = objective(norm_pix=False)
    tensors, settings = made.decoder(made.build())
    assert {name.split(".")[0] for name in tensors} == {"proj", "mask_token", "decoder", "pred"}
    assert from_flat(settings)[1] == FCMAESettings(decoder_dim=16, norm_pix=False)


def test_a_ratio_that_hides_nothing_is_refused():
    model, _ = tiny()
    with pytest.raises(UserError) as error:
        Objective(Pretrain(data=Data(size=8 * model.stem_stride), model=model, objective=FCMAESettings()))
    assert has(error.value, "objective.mask_ratio model.stem_stride")


def test_masks_multiply_the_activations_of_an_image():
    per_image = {}
    for masks in (1, 3):
        made = objective(masks=masks)
        images = [torch.rand(count, 3, 64, 64) for count in (2, 4)]
        batches = [made.inputs(image, made.example(len(image))) for image in images]
        per_image[masks] = measure_activations(made.build(), batches, low=False).per_image
        assert ("masks" in made.describe()) == (masks > 1)
    assert per_image[3] == pytest.approx(3 * per_image[1], rel=0.02)


def test_a_picture_shows_the_first_mask_of_each_image():
    made = objective(masks=3)
    image, visible = made.inputs(torch.rand(2, 3, 64, 64), made.example(2))
    visible = torch.stack([visible[:, 0], ~visible[:, 0], ~visible[:, 0]], 1)
    assert torch.equal(made.first_mask(image, visible)[1], visible[:, 0])
