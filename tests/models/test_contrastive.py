"""Contrastive learning beside FCMAE, against loops, and cases whose value is known."""

import math

import pytest
import torch

from configs.schema import FCMAESettings
from models.contrastive import Contrastive, matched, nt_xent, similarities
from models.fcmae import FCMAE
from models.sparse.layouts import Masked
from tests.models.helpers import masks, random_weights, tiny


def small(views: int = 2) -> Contrastive:
    config, _ = tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    settings = FCMAESettings(mask_ratio=0.5, decoder_dim=8)
    model = Contrastive(config, settings, views, width=12, dim=5, temperature=0.3, pixel_weight=0.7)
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


def by_loops(model: Contrastive, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The loss of a crop after another, and of a pair of crops after another."""
    means, pixel = [], 0
    for crop, mask in zip(image, visible, strict=True):
        tokens = model.encoder.forward_features(crop[None], Masked(mask[None]))
        means.append(tokens[0, mask].mean(0))
        pixel = pixel + FCMAE.forward(model, crop[None], mask[None]) / len(image)
    embeddings = [x / x.norm() for x in project(model.projector, means)]
    total, pairs = 0, 0
    for i, one in enumerate(embeddings):
        exponents = [torch.exp(one @ other / model.temperature) for k, other in enumerate(embeddings) if k != i]
        for k, other in enumerate(embeddings):
            if k != i and k // model.views == i // model.views:
                total = total - torch.log(torch.exp(one @ other / model.temperature) / sum(exponents))
                pairs += 1
    return total / pairs + model.pixel_weight * pixel


@pytest.mark.parametrize("views", [2, 3])
def test_loss_and_gradients_are_those_of_loops(views):
    model = small(views)
    image, visible = torch.randn(4 * views, 3, 16, 24), masks(4 * views, (2, 3), 0.5)
    found = []
    for loss in (model(image, visible), by_loops(model, image, visible)):
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_masks_of_a_crop_are_views_like_crops():
    """Two masks of each of two crops: the loss of four crops, of which two are equal."""
    model = small(4)
    image, visible = torch.randn(6, 3, 16, 24), masks(12, (2, 3), 0.5)
    torch.testing.assert_close(
        model(image, visible.unflatten(0, (6, 2))), model(image.repeat_interleave(2, 0), visible)
    )


@pytest.mark.parametrize("views", [2, 4])
def test_known_values(views):
    """All embeddings equal: chance. Those of an image equal, of others opposite or orthogonal: as small as it gets."""
    same = torch.ones(4 * views, 1)
    assert float(nt_xent(similarities(same), views)) == pytest.approx(math.log(4 * views - 1), rel=1e-6)
    best = torch.eye(4).repeat_interleave(views, 0)
    expected = math.log(views - 1 + 3 * views * math.exp(-1 / 0.1))
    assert float(nt_xent(similarities(best) / 0.1, views)) == pytest.approx(expected, abs=1e-5)
    assert float(matched(similarities(best), views)) == 1
    mixed = torch.eye(4).repeat(views, 1)  # the crops of an image are all different
    assert float(matched(similarities(mixed), views)) < 0.5


def test_one_image_has_no_others():
    assert float(nt_xent(similarities(torch.eye(2)), 2)) == 0


def test_embeddings_that_collapse_are_spread():
    """Descent from nearly equal embeddings: crops of an image stay alike, images become different."""
    torch.manual_seed(0)
    x = (1 + 1e-2 * torch.randn(64, 8)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nt_xent(similarities(torch.nn.functional.normalize(x, dim=1)) / 0.2, 2).backward()
        optimizer.step()
    cosine = similarities(torch.nn.functional.normalize(x.detach(), dim=1))
    assert float(matched(cosine, 2)) == 1
    between = cosine[::2, 2::2]
    assert float(cosine[::2, 1::2].diagonal().mean()) > 0.95 > 0.4 > float(between[between.isfinite()].mean())


def test_scores_and_length_of_embeddings():
    model = small()
    image, visible = torch.randn(8, 3, 16, 24), masks(8, (2, 3), 0.5)
    loss, scores = model(image, visible), model.scores
    torch.testing.assert_close(loss.detach(), scores["contrastive_loss"] + 0.7 * scores["pixel_loss"])
    torch.testing.assert_close(model.embed(image, visible).norm(dim=1), torch.ones(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(image, visible).dtype == torch.float32
