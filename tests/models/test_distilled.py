"""The student of a frozen teacher, against plain loops over images, masks and patches."""

import numpy as np
import pytest
import torch

from configs.schema import visible_patches
from data.transforms import draw_masks
from models.distilled import Distilled
from models.fcmae import normalize_features
from models.sparse.layouts import Dense, Masked
from tests.models.helpers import assert_close, random_weights, tiny

GRID, WIDTHS = (3, 4), (10, 7)


def distilled(loss: str = "cosine", visible_weight: float = 1.0, pooled_weight: float = 1.0, **settings) -> Distilled:
    model = Distilled(*tiny(**settings), WIDTHS, loss, visible_weight, pooled_weight)
    random_weights(model)
    return model


def inputs(model: Distilled, masks: int, images: int = 3) -> tuple[torch.Tensor, ...]:
    n = visible_patches(GRID[0] * GRID[1], model.settings.mask_ratio)
    visible = torch.stack([draw_masks(np.random.default_rng(i), GRID, n, masks) for i in range(images)])
    image = torch.randn(images, model.config.channels, GRID[0] * model.patch, GRID[1] * model.patch)
    patches, pooled = 3 * torch.randn(images, *GRID, WIDTHS[0]) + 1, torch.randn(images, WIDTHS[1])
    return image, visible if masks > 1 else visible[:, 0], patches, pooled


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def plain_distance(loss: str, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = normalized(target)
    if loss == "cosine":
        return 1 - predicted @ target / (predicted.norm() * target.norm())
    error = (predicted - target).abs()
    return torch.where(error < 1, error.square() / 2, error - 0.5).mean()


def plain_loss(model: Distilled, image, visible, patches, pooled) -> torch.Tensor:
    """Encoder on all positions with a mask, a patch at a time."""
    hidden, shown, whole = [], [], []
    for i, masks in enumerate(visible.view(len(image), -1, *GRID)):
        for mask in masks:
            encoded = model.encoder.forward_features(image[i : i + 1], Masked(mask[None]))
            tokens = torch.where(mask[None, ..., None], model.proj(encoded), model.mask_token)
            for block in model.decoder:
                tokens = block(tokens, Dense())
            for row, column in (~mask).nonzero().tolist():
                output = model.pred(tokens[0, row, column])
                hidden.append(plain_distance(model.loss, output, patches[i, row, column]))
            if model.visible_weight:
                for row, column in mask.nonzero().tolist():
                    output = model.visible_head(encoded[0, row, column])
                    shown.append(plain_distance(model.loss, output, patches[i, row, column]))
            if model.pooled_weight:
                output = model.pooled_head(encoded[0, mask].mean(0))
                whole.append(plain_distance(model.loss, output, pooled[i]))
    loss = torch.stack(hidden).mean()
    for weight, parts in ((model.visible_weight, shown), (model.pooled_weight, whole)):
        loss = loss + weight * torch.stack(parts).mean() if parts else loss
    return loss


CASES = [
    (1, {}),
    (3, {"loss": "smooth_l1", "visible_weight": 0.5, "pooled_weight": 2.0, "channels": 2}),
    (2, {"visible_weight": 0.0, "name": "convnext_atto", "stem_stride": 2, "mask_ratio": 0.75, "decoder_depth": 2}),
    (1, {"pooled_weight": 0.0, "backend": "masked"}),
]


@pytest.mark.parametrize(("masks", "settings"), CASES)
def test_loss_and_gradients_are_those_of_plain_loops(masks, settings):
    model = distilled(**settings)
    batch = inputs(model, masks)
    loss = model(*batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = plain_loss(model, *batch)
    expected.backward()
    assert_close(loss, expected, "loss")
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, name, 5e-5)
    assert ("visible_head.weight" in found) == bool(model.visible_weight)
    assert ("pooled_head.weight" in found) == bool(model.pooled_weight)


def test_the_cosine_loss_ignores_scale_and_offset_of_the_teacher():
    model = distilled()
    image, visible, patches, pooled = inputs(model, 1)
    with torch.no_grad():
        loss, other = model(image, visible, patches, pooled), model(image, visible, 5 * patches - 3, 0.5 * pooled + 2)
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=0)


def test_scores_are_the_parts_of_the_loss():
    model = distilled(visible_weight=0.5, pooled_weight=2.0)
    loss = model(*inputs(model, 2))
    scores = {name: float(value) for name, value in model.scores.items()}
    parts = scores["hidden_loss"] + 0.5 * scores["visible_loss"] + 2 * scores["pooled_loss"]
    assert float(loss.detach()) == pytest.approx(parts)


@pytest.mark.parametrize("visible_weight", [0.0, 1.0])
def test_predicted_features_lie_on_the_grid(visible_weight):
    """At hidden patches those of the decoder, at visible ones those of the encoder, or none."""
    model = distilled(visible_weight=visible_weight)
    image, visible, *_ = inputs(model, 1)
    with torch.no_grad():
        grid, output = model.feature_grid(image, visible), model.predict_features(image, visible)
    for i in range(len(image)):
        assert torch.equal(grid[i][~visible[i]], normalize_features(output.features[i]))
        if visible_weight:
            assert torch.equal(grid[i][visible[i]], normalize_features(output.visible[i]))
        else:
            assert grid[i][visible[i]].isnan().all()
