"""Reconstruction pictures and the measure of feature collapse."""

import pytest
import torch

from models.fcmae import FCMAE
from models.sparse.layouts import Dense
from pretrain.pictures import feature_distance, reconstruct, reconstruction_grid
from tests.models.helpers import masks, random_weights, tiny


@pytest.mark.parametrize("norm_pix", [True, False])
def test_visible_patches_are_pasted_and_hidden_ones_predicted(norm_pix):
    model = FCMAE(tiny(norm_pix=norm_pix))
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
    model = FCMAE(tiny(channels=channels))
    visible, image = masks(5, (2, 2), 0.6), torch.randn(5, channels, 16, 16)
    with torch.no_grad():
        picture = reconstruction_grid(model, image, visible, torch.zeros(channels), torch.ones(channels))
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 10


def test_feature_distance():
    class Fixed:
        def __init__(self, tokens):
            self.tokens = tokens

        def forward_features(self, image, layout):
            assert isinstance(layout, Dense)
            return self.tokens

    collapsed = torch.ones(2, 3, 3, 8) * torch.rand(2, 3, 3, 1)
    assert feature_distance(Fixed(collapsed), None) == pytest.approx(0, abs=1e-6)
    assert feature_distance(Fixed(torch.randn(4, 9, 9, 32)), None) == pytest.approx(0.5, abs=0.05)
