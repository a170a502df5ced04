"""The autoencoder's loss, computed by hand, and its published settings."""

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import visible_patches
from data.transforms import draw_masks
from models.fcmae import FCMAE
from models.sizes import check_size
from models.sparse.layouts import Dense
from tests.models.helpers import assert_close, descend, masks, pair, random_weights, tiny


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_by_hand(norm_pix):
    model = FCMAE(*tiny(channels=2, norm_pix=norm_pix))
    random_weights(model)
    visible, image = masks(3, (2, 3), 0.6), torch.randn(3, 2, 16, 24)
    with torch.no_grad():
        loss, output = float(model(image, visible)), model.predict(image, visible)
    pixels, errors = image.numpy().astype(np.float64), []
    for b in range(3):
        hidden = [(y, x) for y in range(2) for x in range(3) if not visible[b, y, x]]
        assert len(hidden) == 4  # int(6 * .4) = 2 are visible
        for k, (y, x) in enumerate(hidden):
            patch = [pixels[b, c, 8 * y + i, 8 * x + j] for i in range(8) for j in range(8) for c in range(2)]
            target = np.array(patch)
            if norm_pix:
                variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)  # unbiased
                target = (target - target.mean()) / np.sqrt(variance + 1e-6)
            errors.append(((output.prediction[b, k].numpy() - target) ** 2).mean())
    assert loss == pytest.approx(np.mean(errors), rel=1e-5)


def test_predictions_belong_to_the_patches_they_name():
    """Prediction k belongs to grid position hidden[k]: it equals the prediction layer on the whole decoded grid."""
    model = FCMAE(*tiny())
    random_weights(model)
    visible, image = masks(3, (3, 4), 0.6), torch.randn(3, 3, 24, 32)
    with torch.no_grad():
        output = model.predict(image, visible)
        layout = model.layout(visible, int(visible[0].sum()))
        grid = layout.to_grid(model.proj(model.encoder.forward_features(image, layout)), model.mask_token)
        whole = model.pred(model.decoder[0](grid, Dense()))
    for b in range(3):
        for k, position in enumerate(output.hidden[b].tolist()):
            y, x = divmod(position, 4)
            assert not visible[b, y, x]
            assert torch.allclose(output.prediction[b, k], whole[b, y, x], atol=1e-5)


def test_visible_pixels_are_no_target():
    """The target has hidden pixels only; visible pixels enter through the encoder."""
    model = FCMAE(*tiny())
    random_weights(model)
    visible, image = masks(2, (4, 4), 0.6), torch.randn(2, 3, 32, 32)
    hidden = model.predict(image, visible).hidden
    shown = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    assert torch.equal(model.target(image, hidden), model.target(image.masked_fill(shown, 7.0), hidden))


def test_zeroed_is_plain_dense_code():
    """The encoder convolves the image with zeros at hidden patches; the decoder is the same."""
    model = FCMAE(*tiny(backend="zeroed"))
    random_weights(model)
    visible, image = masks(3, (3, 4), 0.6), torch.randn(3, 3, 24, 32)
    shown = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    layout = model.layout(visible, int(visible[0].sum()))
    unread = image.masked_fill(~shown, float("nan"))
    found = model.encoder.forward_features(unread, layout)
    reference = model.encoder.forward_features(image * shown, Dense())
    assert torch.equal(found, reference) and reference[~visible].std() > 0.01  # what sparse convolution has not: leaks
    grid = layout.to_grid(found, torch.full([found.shape[-1]], 7.0))
    assert torch.equal(grid[visible], found[visible]) and (grid[~visible] == 7).all()
    packed = FCMAE(*tiny())
    packed.load_state_dict(model.state_dict())
    assert abs(float((packed(image, visible) - model(image, visible)).detach())) > 1e-4


def test_zeroed_has_no_batch_scope():
    with pytest.raises(UserError, match=r"model\.grn_scope"):
        tiny(backend="zeroed", grn_scope="batch")


def test_the_published_mask_keeps_19_of_49():
    assert visible_patches(49, 0.6) == 19
    assert visible_patches(10, 0.9) == 1  # 10 * (1 - .9) is a little under 1 in floating point
    assert visible_patches(4, 0.9) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_decoder_depth_and_width(depth):
    model = FCMAE(*tiny(decoder_depth=depth, decoder_dim=24))
    assert len(model.decoder) == depth
    assert model.pred.weight.shape == (8 * 8 * 3, 24)
    model(torch.randn(2, 3, 32, 32), masks(2, (4, 4), 0.6)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_grid_of_one_patch_is_refused():
    with pytest.raises(UserError, match=r"1 patch.*data\.size|data\.size.*1 patch"):
        check_size(1, 0.6, (1, 1))


def test_training_lowers_the_loss():
    model = FCMAE(*tiny(channels=1))
    image = torch.linspace(-1, 1, 32)[None, None, None] * torch.randn(8, 1, 32, 1).sign()
    visible = masks(8, (4, 4), 0.6)
    first, last = descend(model, (image, visible), 60)
    assert last < 0.5 * first


SEVERAL = [
    {},
    {"norm_pix": False, "stem_stride": 2, "channels": 2},
    {"backend": "masked"},
    {"backend": "zeroed"},
    {"name": "convnext_atto", "mask_ratio": 0.75},
]


@pytest.mark.parametrize("settings", SEVERAL)
def test_several_masks_are_the_mean_of_single_ones(settings):
    """Loss and all gradients, on a grid of 3 x 5 patches, which 6 visible ones do not divide."""
    model = FCMAE(*tiny(**settings))
    random_weights(model)
    image, masks = several(model, 4)
    loss = model(image, masks)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = torch.stack([model(image, masks[:, i]) for i in range(4)]).mean()
    expected.backward()
    assert_close(loss, expected, "loss")
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, name, 2e-5)


def test_several_masks_and_grn_over_the_batch():
    """The batch are all rows, of all masks: the loss of images repeated for their masks, packed and masked."""
    packed, masked = pair(grn_scope="batch")
    image, masks = several(packed, 2)
    loss = packed(image, masks)
    assert_close(loss, packed(image.repeat_interleave(2, 0), masks.flatten(0, 1)), "repeated")
    assert_close(loss, masked(image, masks), "masked")
    assert abs(float((loss - (packed(image, masks[:, 0]) + packed(image, masks[:, 1])) / 2).detach())) > 1e-5


def several(model: FCMAE, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of 3 x 5 patches, and masks [2, count, 3, 5]."""
    grid = (3, 5)
    n = visible_patches(15, model.settings.mask_ratio)
    masks = torch.stack([draw_masks(np.random.default_rng(i), grid, n, count) for i in range(2)])
    return torch.randn(2, model.config.channels, 3 * model.patch, 5 * model.patch), masks
