"""The encoder as a backbone inside other libraries' segmentation models: equal feature maps of all four stages."""

import re

import pytest
import torch

from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from models.convnext import ConvNeXt
from models.formats.write import to_form, write_weights
from models.sparse.layouts import Dense
from models.weights import Weights, cpu_state
from tests.models.helpers import random_weights

ARCH = Encoder("convnextv2_atto", 3, 4)


def encoder() -> tuple[ConvNeXt, Weights]:
    model = ConvNeXt(ARCH).eval()
    random_weights(model)
    return model, Weights(model.arch, Preprocessing((64, 64), 3, (0.5,) * 3, (0.2,) * 3), cpu_state(model))


def assert_equal_maps(model: ConvNeXt, image: torch.Tensor, maps: list[torch.Tensor]) -> None:
    ours = [x.permute(0, 3, 1, 2) for x in model.forward_stages(image, Dense())]
    assert len(maps) == 4
    for found, expected in zip(maps, ours, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_inside_transformers_upernet(tmp_path):
    from transformers import ConvNextV2Backbone, ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    model, weights = encoder()
    write_weights(tmp_path / "hub", weights, "transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    shape = {"depths": list(model.arch.depths), "hidden_sizes": list(model.arch.dims), "out_features": stages}
    config = UperNetConfig(backbone_config=ConvNextV2Config(**shape), auxiliary_in_channels=160, num_labels=5)
    theirs = UperNetForSemanticSegmentation(config).eval()
    theirs.backbone = ConvNextV2Backbone.from_pretrained(tmp_path / "hub", out_features=stages).eval()
    found = []
    for stage in theirs.backbone.encoder.stages:
        stage.register_forward_hook(lambda _, inputs, output: found.append(output))
    image = torch.randn(2, 3, 64, 96)
    assert theirs(pixel_values=image).logits.shape == (2, 5, 64, 96)
    assert_equal_maps(model, image, found)


@pytest.mark.slow
@torch.no_grad()
def test_inside_smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    model, weights = encoder()
    state, _ = to_form(weights, "timm")
    theirs = smp.Unet("tu-convnextv2_atto", encoder_weights=None, classes=5).eval()
    state = {re.sub(r"^(stem|stages)\.", r"\1_", key): x for key, x in state.items()}
    theirs.encoder.model.load_state_dict(state)
    image = torch.randn(2, 3, 64, 96)
    assert theirs(image).shape == (2, 5, 64, 96)
    assert_equal_maps(model, image, [x for x in theirs.encoder(image) if x.shape[1] in model.arch.dims][-4:])
