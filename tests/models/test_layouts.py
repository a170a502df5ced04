"""The packed layout against the masked reference: outputs, all gradients, independence of hidden pixels and batch."""

import pytest
import torch

from configs.schema import visible_patches
from models.fcmae import FCMAE
from models.sparse.layouts import Dense, Masked, Packed, patchify, unpatchify
from tests.models.helpers import assert_close, assert_same_training, masks, pair, random_weights, tiny


@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.9])
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=["square", "rectangular"])
def test_packed_equals_masked(grid, channels, stem_stride, ratio):
    packed, masked = pair(channels=channels, stem_stride=stem_stride, mask_ratio=ratio)
    visible = masks(3, grid, ratio)
    image = torch.randn(3, channels, grid[0] * packed.patch, grid[1] * packed.patch)

    tokens = packed.encoder.forward_features(image, Packed(visible, visible_patches(visible[0].numel(), ratio)))
    reference = masked.encoder.forward_features(image, Masked(visible))
    assert_close(tokens.flatten(0, 3), reference[visible], "encoder")

    assert_same_training(packed, masked, image, visible, 2e-5)  # sums of a gradient cancel


def test_grn_over_the_batch():
    """As in the official sparse code: packed equals masked, and images of a batch depend on each other."""
    packed, masked = pair(grn_scope="batch")
    visible, image = masks(3, (4, 4), 0.6), torch.randn(3, 3, 32, 32)
    assert_same_training(packed, masked, image, visible)
    together, alone = encode(packed, image, visible)[:1], encode(packed, image[:1], visible[:1])
    assert not torch.allclose(together, alone, rtol=1e-3)

    x, layout = torch.randn(3, 6, 2, 2, 5), Packed(visible, 6, "batch")
    by_hand = torch.stack([x[..., c].square().sum().sqrt() for c in range(5)])
    assert_close(layout.image_norm(x).flatten(), by_hand)


@pytest.mark.xdist_group("large")  # gigabytes each: never two at once
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
def test_full_size_model(name):
    settings = {"channels": 3, "stem_stride": 4, "depths": None, "dims": None}
    packed, masked = pair(name=name, **settings)
    visible, image = masks(2, (7, 7), 0.6), torch.randn(2, 3, 224, 224)
    assert_same_training(packed, masked, image, visible, 2e-5 if packed.encoder.arch.dims[0] > 64 else 1e-5)


def encode(model: FCMAE, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.encoder.forward_features(image, model.layout(visible, int(visible[0].sum())))


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_an_image_does_not_depend_on_its_batch(backend):
    model = FCMAE(*tiny(backend=backend))
    random_weights(model)
    visible, image = masks(4, (4, 4), 0.6), torch.randn(4, 3, 32, 32)
    together = encode(model, image, visible)
    for i in range(4):
        alone = encode(model, image[i : i + 1], visible[i : i + 1])
        seen = ... if backend == "packed" else visible[i : i + 1]
        assert_close(alone[seen], together[i : i + 1][seen])


@pytest.mark.parametrize("backend", ["packed", "masked"])
@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_hidden_pixels_change_nothing(backend, poison):
    model = FCMAE(*tiny(backend=backend))
    random_weights(model)
    visible, image = masks(2, (4, 4), 0.6), torch.randn(2, 3, 32, 32)
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    before, after = encode(model, image, visible), encode(model, image.masked_fill(hidden, poison), visible)
    seen = ... if backend == "packed" else visible
    assert torch.equal(before[seen], after[seen])


def test_a_visible_pixel_does_change_the_output():
    model = FCMAE(*tiny())
    random_weights(model)
    visible, image = masks(1, (4, 4), 0.6), torch.randn(1, 3, 32, 32)
    y, x = visible[0].nonzero()[0] * 8
    changed = image.clone()
    changed[0, 0, y, x] += 1
    assert not torch.equal(encode(model, image, visible), encode(model, changed, visible))


@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_all_visible_packed_equals_dense(grid):
    model = FCMAE(*tiny())
    random_weights(model)
    image = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    visible = torch.ones(2, *grid, dtype=torch.bool)
    with torch.no_grad():
        packed = model.encoder.forward_features(image, Packed(visible, visible[0].numel()))
        dense = model.encoder.forward_features(image, Dense())
    assert_close(packed.flatten(0, 3), dense.flatten(0, 2))


def test_unequal_masks_are_refused():
    visible = masks(2, (4, 4), 0.6)
    visible[1] = True
    with pytest.raises(RuntimeError, match="visible"):
        Packed(visible, visible_patches(16, 0.6))


def test_patchify_is_undone_by_unpatchify():
    image = torch.randn(2, 5, 24, 16)
    patches = patchify(image, (3, 2))
    assert patches.shape == (2, 3, 2, 8, 8, 5)
    assert torch.equal(patches[1, 2, 0, 3, 4], image[1, :, 19, 4])
    assert torch.equal(unpatchify(patches), image)
