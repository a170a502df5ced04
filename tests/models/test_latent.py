"""Latent targets, against plain loops over images, masks and patches."""

import numpy as np
import pytest
import torch

from configs.schema import visible_patches
from data.transforms import draw_masks
from models.latent import Latent, spread
from models.sparse.layouts import Dense, Masked
from tests.models.helpers import assert_close, descend, random_weights, tiny

GRID = (3, 4)


def latent(stages: int = 1, pixel_weight: float = 0.0, latent_weight: float = 1.0, **settings) -> Latent:
    model = Latent(*tiny(**settings), stages, latent_weight, pixel_weight)
    random_weights(model)  # teacher and encoder differ
    return model


def inputs(model: Latent, masks: int, images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    n = visible_patches(GRID[0] * GRID[1], model.settings.mask_ratio)
    visible = torch.stack([draw_masks(np.random.default_rng(i), GRID, n, masks) for i in range(images)])
    image = torch.randn(images, model.config.channels, GRID[0] * model.patch, GRID[1] * model.patch)
    return image, visible if masks > 1 else visible[:, 0]


def normalized(x: torch.Tensor, eps: float, unbiased: bool) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=unbiased) + eps).sqrt()


def plain_loss(model: Latent, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The mean over images, masks and hidden patches; encoder on all positions with a mask, a patch at a time."""
    side, size, latent, pixel = model.patch, sum(model.dims), [], []
    for x, masks in zip(image, visible.view(len(image), -1, *GRID), strict=True):
        stages = list(model.teacher.forward_stages(x[None], Dense()))[-len(model.dims) :]
        for mask in masks:
            tokens = model.proj(model.encoder.forward_features(x[None], Masked(mask[None])))
            tokens = torch.where(mask[None, ..., None], tokens, model.mask_token)
            for block in model.decoder:
                tokens = block(tokens, Dense())
            for row, column in (~mask).nonzero().tolist():
                output = model.pred(tokens[0, row, column])
                parts = []
                for stage in stages:
                    s = stage.shape[1] // GRID[0]  # tokens along the side of a patch
                    patch = stage[0, row * s : (row + 1) * s, column * s : (column + 1) * s].detach()
                    parts.append(normalized(patch.mean((0, 1)), 1e-5, unbiased=False))
                latent.append((output[:size] - torch.cat(parts)).square().mean())
                pixels = (
                    x[:, row * side : (row + 1) * side, column * side : (column + 1) * side].permute(1, 2, 0).flatten()
                )
                if model.pixel_weight:
                    pixel.append((output[size:] - normalized(pixels, 1e-6, unbiased=True)).square().mean())
    loss = model.latent_weight * torch.stack(latent).mean()
    return loss + model.pixel_weight * torch.stack(pixel).mean() if pixel else loss


CASES = [
    (1, {}),
    (3, {"stages": 3, "pixel_weight": 0.5, "latent_weight": 2.0, "channels": 2}),
    (2, {"stages": 2, "name": "convnext_atto", "stem_stride": 2, "mask_ratio": 0.75, "decoder_depth": 2}),
]


@pytest.mark.parametrize(("masks", "settings"), CASES)
def test_loss_and_gradients_are_those_of_plain_loops(masks, settings):
    model = latent(**settings)
    image, visible = inputs(model, masks)
    loss = model(image, visible)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("teacher.")}
    found = {name: parameter.grad for name, parameter in trained.items()}
    model.zero_grad()
    expected = plain_loss(model, image, visible)
    expected.backward()
    assert_close(loss, expected, "loss")
    for name, parameter in trained.items():
        assert_close(found[name], parameter.grad, name, 5e-5)
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_the_teacher_sees_hidden_patches_and_the_student_does_not():
    model = latent()
    image, visible = inputs(model, 1)
    hidden = ~visible.repeat_interleave(model.patch, 1).repeat_interleave(model.patch, 2)[:, None]
    changed = torch.where(hidden, image + 1, image)
    with torch.no_grad():
        assert torch.equal(model.predict(image, visible).prediction, model.predict(changed, visible).prediction)
        assert not torch.allclose(model.features(image)[0], model.features(changed)[0])


def test_the_teacher_is_the_average_of_the_encoders():
    """At first equal to the encoder, then decay x teacher + (1 - decay) x encoder; always in evaluation mode."""
    model = Latent(*tiny(), 1, 1.0, 0.0)
    expected = {name: p.detach().double() for name, p in model.encoder.named_parameters()}
    assert all(torch.equal(p, expected[name].float()) for name, p in model.teacher.named_parameters())
    for decay in (0.9, 0.99, 0.5, 0.0, 0.999):
        random_weights(model.encoder)
        model.update_teacher(decay)
        expected = {
            name: decay * expected[name] + (1 - decay) * p.detach().double()
            for name, p in model.encoder.named_parameters()
        }
        for name, parameter in model.teacher.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-7)
    assert model.train().encoder.training and not model.teacher.training


def test_scores_of_a_step():
    model = latent(stages=2, pixel_weight=1.0)
    image, visible = inputs(model, 2)
    loss = model(image, visible)
    scores = {name: float(value) for name, value in model.scores.items()}
    assert float(loss.detach()) == pytest.approx(scores["latent_loss"] + scores["pixel_loss"])
    least = min(float((x.var(0).mean() / x.square().mean()).sqrt()) for x in model.features(image))  # of the stages
    assert scores["target_spread"] == pytest.approx(least, rel=1e-5)
    model(image[:1], visible[:1])
    assert "target_spread" not in model.scores  # of one image there is none


def test_spread_is_zero_where_images_do_not_differ():
    positions = torch.randn(1, 3, 4, 8)
    assert float(spread(positions.expand(5, -1, -1, -1))) == 0
    assert float(spread(torch.zeros(5, 3, 4, 8))) == 0
    features = torch.randn(50, 3, 4, 8)
    assert float(spread(features)) == pytest.approx(1, abs=0.02)
    assert float(spread(1e-3 * features)) == pytest.approx(float(spread(features)), rel=1e-4)  # at any scale


def test_training_lowers_the_loss():
    model = Latent(*tiny(channels=1, depths=(1, 1, 1, 1)), 1, 1.0, 0.0)
    image = torch.linspace(-1, 1, 32)[None, None, None] * torch.randn(8, 1, 24, 1).sign()
    _, visible = inputs(model, 1, 8)
    first, last = descend(model, (image, visible), 30, lambda: model.update_teacher(0.99))
    assert last < 0.5 * first
