"""Small models and masks for the tests of this folder."""

from collections.abc import Callable

import torch

from configs.schema import FCMAESettings, PretrainModel, visible_patches
from models.fcmae import FCMAE, from_flat


def tiny(name: str = "convnextv2_atto", **settings) -> tuple[PretrainModel, FCMAESettings]:
    """Settings of a small `FCMAE`."""
    small = {"channels": 3, "stem_stride": 1, "depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "decoder_dim": 32}
    return from_flat({"name": name, **small, **settings})


def descend(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], steps: int, after: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """The first and the last loss of so many steps of AdamW on the same inputs; `after` is called after each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(steps):
        loss = model(*inputs)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
    return losses[0], losses[-1]


def random_weights(model: torch.nn.Module) -> None:
    """Set random parameters: initial zeros and ones would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def masks(batch: int, grid: tuple[int, int], ratio: float) -> torch.Tensor:
    """Random masks [B, gy, gx] with the same number of visible patches in each image."""
    patches = grid[0] * grid[1]
    n = visible_patches(patches, ratio)
    return torch.stack([torch.randperm(patches) < n for _ in range(batch)]).view(batch, *grid)


def pair(**settings) -> tuple[FCMAE, FCMAE]:
    """The same autoencoder with the packed and with the masked backend."""
    packed, masked = FCMAE(*tiny(**settings)), FCMAE(*tiny(backend="masked", **settings))
    random_weights(packed)
    masked.load_state_dict(packed.state_dict())
    return packed, masked


def assert_same_training(
    model: FCMAE, reference: FCMAE, image: torch.Tensor, visible: torch.Tensor, tolerance: float = 1e-5
) -> None:
    """The same loss, and the same gradients of all parameters."""
    loss, expected = model(image, visible), reference(image, visible)
    assert_close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, name, tolerance)


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest expected value."""
    error = float(((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).detach())
    assert error <= tolerance, f"{what}: relative error {error:.1e}"
