"""LeJEPA, against loops, a closed form of the statistic, and cases whose value is known."""

import math

import pytest
import torch

from configs.schema import FCMAESettings
from models.fcmae import FCMAE
from models.lejepa import LARGEST, POINTS, LeJEPA, draw_directions, sigreg
from models.sparse.layouts import Masked
from tests.models.helpers import masks, random_weights, tiny


def closed_form(x: torch.Tensor) -> float:
    """The Epps-Pulley statistic of one projection [B], integrated over all t (Epps and Pulley, 1983)."""
    pairs = (x[:, None] - x[None]).square()
    own, cross = (-pairs / 2).exp().mean() * math.sqrt(2 * math.pi), (-x.square() / 4).exp().mean() * math.sqrt(math.pi)
    return len(x) * float(own - 2 * cross + math.sqrt(2 * math.pi / 3))


def test_the_statistic_of_epps_and_pulley():
    """The sum over few points is the integral to a few per cent."""
    generator = torch.Generator().manual_seed(0)
    for scale, shift in ((1, 0), (2, 0), (0.3, 0), (1, 1)):
        x = scale * torch.randn(200, 5, generator=generator) + shift
        directions = draw_directions(5, 7, 0)
        expected = sum(closed_form(row) for row in (x @ directions).T) / 7
        assert float(sigreg(x, directions)) == pytest.approx(expected, rel=0.03)


def small(views: int = 2, **settings) -> LeJEPA:
    config, _ = tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    settings = FCMAESettings(mask_ratio=0.5, decoder_dim=8, **settings)
    model = LeJEPA(config, settings, views, width=12, dim=5, weight=0.3, pixel_weight=0.7)
    random_weights(model)
    return model


def project(layers: torch.nn.Sequential, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The projector on one row after another; batch norm by its definition."""
    for layer in layers:
        if isinstance(layer, torch.nn.BatchNorm1d):
            mean = sum(rows) / len(rows)
            std = (sum((row - mean).square() for row in rows) / len(rows) + layer.eps).sqrt()
            rows = [(row - mean) / std * layer.weight + layer.bias for row in rows]
        else:
            rows = [layer(row) for row in rows]
    return rows


def by_loops(model: LeJEPA, image: torch.Tensor, visible: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The loss of an image after another, and of a direction after another."""
    means, pixel = [], 0
    for crop, mask in zip(image, visible, strict=True):
        tokens = model.encoder.forward_features(crop[None], Masked(mask[None]))
        means.append(tokens[0, mask].mean(0))
        pixel = pixel + FCMAE.forward(model, crop[None], mask[None]) / len(image)
    embeddings = project(model.projector, means)
    images = [embeddings[i : i + model.views] for i in range(0, len(embeddings), model.views)]
    agreement = 0
    for views in images:
        mean = sum(views) / model.views
        agreement += sum((view - mean).square().mean() for view in views) / model.views / len(images)
    step, gaussian = LARGEST / (POINTS - 1), 0
    for v in range(model.views):
        for direction in directions.T:
            projected = [views[v] @ direction for views in images]
            for k in range(POINTS):
                t = k * step
                normal, width = math.exp(-t * t / 2), step / (2 if k in (0, POINTS - 1) else 1)
                real = sum((t * p).cos() for p in projected) / len(projected) - normal
                imaginary = sum((t * p).sin() for p in projected) / len(projected)
                gaussian = gaussian + 2 * len(projected) * width * normal * (real**2 + imaginary**2)
    gaussian = gaussian / model.views / directions.shape[1]
    return (1 - model.weight) * agreement + model.weight * gaussian + model.pixel_weight * pixel


@pytest.mark.parametrize("views", [2, 3])
def test_loss_and_gradients_are_those_of_loops(views):
    model = small(views)
    image, directions = torch.randn(4 * views, 3, 16, 24), draw_directions(5, 3, 1)
    visible = masks(4 * views, (2, 3), 0.5)
    found = []
    for loss in (model(image, visible, directions), by_loops(model, image, visible, directions)):
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_masks_of_a_crop_are_views_like_crops():
    """Two masks of each of two crops: the loss of four crops, of which two are equal."""
    model = small(4)
    image, directions = torch.randn(6, 3, 16, 24), draw_directions(5, 3, 1)
    visible = masks(12, (2, 3), 0.5)
    torch.testing.assert_close(
        model(image, visible.unflatten(0, (6, 2)), directions),
        model(image.repeat_interleave(2, 0), visible, directions),
    )


def test_normal_embeddings_are_best_and_collapsed_ones_worst():
    """The value of normal embeddings does not depend on their number; others grow with it."""
    directions, generator = draw_directions(16, 64, 0), torch.Generator().manual_seed(0)
    for count in (128, 2048):
        x = torch.randn(count, 16, generator=generator)
        assert float(sigreg(x, directions)) == pytest.approx(1, abs=0.25)
        for other in (torch.zeros_like(x), 2 * x, 0.5 * x, x + 1, x.sign() * 2):
            assert float(sigreg(other, directions)) > 0.02 * count


def test_embeddings_that_collapse_are_spread():
    """Descent from nearly equal embeddings ends in a standard normal distribution."""
    torch.manual_seed(0)
    x = (0.3 + 1e-2 * torch.randn(256, 4)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(200):
        optimizer.zero_grad()
        sigreg(x, draw_directions(4, 32, step)).backward()
        optimizer.step()
    torch.testing.assert_close(x.mean(0), torch.zeros(4), rtol=0, atol=0.15)
    torch.testing.assert_close(x.T.cov(), torch.eye(4), rtol=0, atol=0.25)


def test_directions():
    assert torch.equal(draw_directions(6, 9, 3), draw_directions(6, 9, 3))
    assert not torch.equal(draw_directions(6, 9, 3), draw_directions(6, 9, 4))
    torch.testing.assert_close(draw_directions(6, 9, 3).norm(dim=0), torch.ones(9))
