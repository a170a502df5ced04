"""Reconstruction pictures and the measure of feature collapse."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from configs.style import hatching
from models.fcmae import FCMAE
from models.sparse.layouts import Dense
from pretrain.pictures import COLUMNS, feature_distance, reconstruct, reconstruction_grid
from tests.models.helpers import masks, random_weights, tiny


@pytest.mark.parametrize("norm_pix", [True, False])
def test_visible_patches_are_pasted_and_hidden_ones_predicted(norm_pix):
    model = FCMAE(*tiny(norm_pix=norm_pix))
    random_weights(model)
    visible, image = masks(2, (2, 3), 0.6), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        masked, predicted, pasted = reconstruct(model, image, visible)
    seen = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(image)
    assert torch.equal(masked[seen], image[seen]) and masked[~seen].isnan().all()
    assert predicted[seen].isnan().all() and torch.equal(pasted[~seen], predicted[~seen])
    assert torch.equal(pasted[seen], image[seen])
    assert pasted.isfinite().all() and not torch.isclose(pasted[~seen], image[~seen]).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_grid_shows_any_number_of_channels(channels):
    """Hidden patches are hatched, in blue where images of one channel are grey."""
    model = FCMAE(*tiny(channels=channels))
    visible, image = masks(5, (2, 2), 0.6), torch.randn(5, channels, 16, 16)
    with torch.no_grad():
        sheet = reconstruction_grid(model, image, visible, torch.zeros(channels), torch.ones(channels))
    assert len(sheet.groups) == 5 and all(group.together for group in sheet.groups)
    for group, seen in zip(sheet.groups, visible, strict=True):
        assert [cell.lines for cell in group.cells] == list(COLUMNS)
        pixels = [np.asarray(cell.picture) for cell in group.cells]
        shown = np.kron(seen.numpy(), np.ones([side // 2 for side in pixels[0].shape[:2]], bool))
        assert np.array_equal(pixels[1][shown], pixels[0][shown])
        hatched = hatching(*pixels[0].shape[:2])
        assert np.array_equal(pixels[1][~shown], hatched[~shown]) and np.array_equal(pixels[2][shown], hatched[shown])
        assert pixels[0].std() > 10 and not np.array_equal(pixels[3][~shown], hatched[~shown])


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto"])
@torch.no_grad()
def test_feature_distance(name):
    """Mean over all pairs of channels, images and blocks of a stage, of the inputs of fc2."""
    encoder, image = FCMAE(*tiny(name)).encoder, torch.randn(2, 3, 32, 32)
    random_weights(encoder)
    found = feature_distance(encoder, image)
    inputs = []
    for block in encoder.stages[2].blocks:
        block.mlp.fc2.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    encoder.forward_features(image, Dense())
    maps = torch.stack(inputs).flatten(2, 3).mT  # [blocks, B, C, T]
    cosine = cosine_similarity(maps[:, :, :, None], maps[:, :, None], dim=-1)
    assert cosine.shape == (2, 2, 128, 128)
    assert found["stage_3"] == pytest.approx(float((1 - cosine).mean() / 2), abs=1e-5)


@torch.no_grad()
def test_feature_distance_of_alike_and_of_unrelated_channels():
    encoder, image = FCMAE(*tiny()).encoder, torch.randn(2, 3, 64, 64)
    for stage in encoder.stages:
        stage.blocks[0].mlp.fc1.weight[1:] = stage.blocks[0].mlp.fc1.weight[0]
    found = feature_distance(encoder, image)
    assert [found[f"stage_{i}"] for i in (1, 2, 4)] == pytest.approx([0, 0, 0], abs=1e-5)
    assert 0.15 < found["stage_3"] < 0.3  # of its two blocks only one is alike
