"""GELU + GRN kernels against their plain twin: C++, and Triton's, interpreted where there is no GPU."""

import pytest
import torch

from models import kernels
from models.convnext import GRN, ConvNeXt
from models.fcmae import FCMAE
from models.sparse.layouts import Dense, Packed
from tests.models.helpers import assert_close, masks, random_weights, tiny
from tests.models.kernels.test_depthwise import DEVICE, fused  # noqa: F401

SHAPES = [(2, 3, 8, 8, 20), (3, 5, 1, 1, 200), (1, 5, 8, 8, 24)]  # images, patches, s, s, channels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed(shape, scope, dtype, tolerance, fused):  # noqa: F811
    visible = torch.zeros(shape[0], 8, dtype=torch.bool, device=DEVICE)
    visible[:, : shape[1]] = True
    layout, grn = Packed(visible.view(-1, 2, 4), shape[1], scope), GRN(shape[-1]).to(DEVICE)
    random_weights(grn)
    h = torch.randn(shape, device=DEVICE).to(dtype)
    h[..., 0] = 0  # a dead channel: its norm is 0
    h.requires_grad_()
    parameters = [h, *grn.parameters()]
    with kernels.plain():
        expected = layout.gelu_grn(h.float(), grn)
    grad = torch.randn_like(expected)
    references = torch.autograd.grad(expected, parameters, grad)
    runs = []
    for _ in range(2):
        found = layout.gelu_grn(h, grn)
        runs.append([found.detach(), *torch.autograd.grad(found, parameters, grad.to(dtype))])
    for name, first, again, reference in zip(
        ("output", "h", "gamma", "beta"), *runs, (expected, *references), strict=True
    ):
        assert first.dtype == (dtype if name in ("output", "h") else torch.float32)
        assert_close(first.float(), reference.float(), name, tolerance)
        assert torch.equal(first, again), f"{name} differs from run to run"


def test_a_second_derivative_is_an_error(fused):  # noqa: F811
    """The kernels have none; without an error, it would be as if their gradients were constants."""
    h = torch.randn(1, 4, 4, 8, device=DEVICE, requires_grad=True)
    grad = torch.autograd.grad(Dense().gelu_grn(h, GRN(8).to(DEVICE)).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad[0].sum().backward()


def test_large_values_do_not_overflow(fused):  # noqa: F811
    """The norm is computed in fp32: in fp16 the sum of squares would overflow."""
    h = torch.full((1, 4, 4, 8), 200.0, dtype=torch.float16, device=DEVICE)
    assert torch.isfinite(Dense().gelu_grn(h, GRN(8).to(DEVICE))).all()


@pytest.mark.parametrize("name", ["convnextv2_atto", pytest.param("convnext_atto", marks=pytest.mark.slow)])
def test_a_whole_autoencoder(name, fused):  # noqa: F811
    """Loss and all gradients of the packed encoder and the dense decoder, through every kernel."""
    model = FCMAE(*tiny(name, depths=(1, 1, 1, 1), dims=(3, 4, 5, 6), decoder_dim=4, mask_ratio=0.7)).to(DEVICE)
    random_weights(model)
    visible, image = masks(1, (2, 2), 0.7).to(DEVICE), torch.randn(1, 3, 16, 16, device=DEVICE)
    found, expected = [], []
    for grads, mode in ((found, None), (expected, kernels.plain)):
        model.zero_grad()
        if mode is None:
            loss = model(image, visible)
        else:
            with mode():
                loss = model(image, visible)
        loss.backward()
        grads += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_a_dense_classifier(fused):  # noqa: F811
    config, _ = tiny(depths=(1, 1, 1, 1), dims=(3, 4, 5, 6))
    model = ConvNeXt(config, classes=3).to(DEVICE)
    random_weights(model)
    image = torch.randn(1, 3, 8, 16, device=DEVICE)
    with torch.no_grad(), kernels.plain():
        expected = model(image)
    with torch.no_grad():
        assert_close(model(image), expected)
