"""The dense model against timm's, sizes, and initialisation."""

import pytest
import timm
import torch

from configs.errors import UserError
from configs.schema import Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.sizes import SIZES, resolve
from models.sparse.layouts import Dense
from tests.models.helpers import tiny

UP_TO_BASE = [name for name in SIZES if not name.endswith(("large", "xlarge", "huge"))]


@pytest.mark.xdist_group("large")  # gigabytes each: never two at once
@pytest.mark.parametrize("name", UP_TO_BASE)
def test_logits_equal_timm(name):
    theirs = timm.create_model(name, pretrained=False, num_classes=10).eval()
    for key, tensor in theirs.state_dict().items():  # nothing may hide behind an initial zero or one
        tensor.copy_(torch.randn_like(tensor) * 0.05 + (1 if key.endswith("norm.weight") else 0))
    ours = ConvNeXt(Encoder(name), classes=10).eval()
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    ours.load_state_dict({key: tensor.reshape(state[key].shape) for key, tensor in theirs.state_dict().items()})
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, found = theirs(image), ours(image)
    assert expected.abs().max() > 0.1
    assert (expected - found).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "millions"),
    [("convnextv2_tiny", 28.6), ("convnextv2_huge", 660), ("convnext_tiny", 28.6), ("convnext_xlarge", 350)],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = ConvNeXt(Encoder(name), classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_initialisation():
    model = FCMAE(*tiny(dims=(32, 64, 128, 256), decoder_dim=128))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name == "mask_token":
            assert float(parameter.detach().std()) == pytest.approx(
                0.02, rel=0.25 if parameter.numel() < 4000 else 0.05
            ), name
        elif name.endswith("norm.weight") or name in ("encoder.stem.1.weight",) or name.endswith("downsample.0.weight"):
            assert (parameter == 1).all(), name
        else:
            assert (parameter == 0).all(), name


def test_v1_has_layer_scale_and_no_grn():
    names = dict(ConvNeXt(Encoder("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))).named_parameters())
    assert not any("grn" in name for name in names)
    assert (names["stages.0.blocks.0.gamma"] == 1e-6).all()


def test_drop_path_grows_linearly():
    model = ConvNeXt(Encoder("convnextv2_atto", dims=(8, 8, 8, 8)), drop_path=0.11)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_nothing(recompute):
    arch = Encoder("convnextv2_atto", stem_stride=1, depths=(1, 1, 2, 1), dims=(8, 16, 16, 16))
    plain, thrifty = ConvNeXt(arch), ConvNeXt(arch, recompute=recompute)
    thrifty.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 16, 24)
    for model in (plain, thrifty):
        model.forward_features(image, Dense()).square().sum().backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="convnextv2_tiny"):
        resolve(Encoder("convnextv2_tny"))
