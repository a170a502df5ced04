"""Layer decay on the published sizes, layers written out."""

import pytest

from configs.schema import Encoder, Optim
from finetune.layer_decay import group_layer, layer_decay, single_layer
from launch.training.parameter_groups import parameter_groups
from models.convnext import ConvNeXt


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stem.0.weight", 1), ("stages.0.blocks.0.conv_dw.weight", 1), ("stages.0.blocks.2.norm.bias", 3),
        ("stages.1.downsample.1.weight", 4), ("stages.1.blocks.0.mlp.fc1.weight", 4),
        ("stages.2.downsample.0.weight", 7),
        ("stages.2.blocks.8.mlp.grn.weight", 15), ("stages.3.blocks.2.conv_dw.bias", 18), ("head.norm.weight", 19),
        ("head.fc.weight", 19),
    ],
)  # fmt: skip
def test_single(name, layer):
    assert single_layer(name, (3, 3, 9, 3)) == layer
    assert layer_decay(0.9, (3, 3, 9, 3), "single")(name) == pytest.approx(0.9 ** (19 - layer))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stem.1.bias", 0), ("stages.0.blocks.1.norm.weight", 1), ("stages.1.downsample.0.weight", 2),
        ("stages.1.blocks.2.norm.weight", 2), ("stages.2.downsample.1.weight", 3), ("stages.2.blocks.0.norm.weight", 3),
        ("stages.2.blocks.2.norm.weight", 3), ("stages.2.blocks.3.norm.weight", 4),
        ("stages.2.blocks.26.norm.weight", 11),
        ("stages.3.downsample.1.weight", 12), ("stages.3.blocks.0.norm.weight", 12), ("head.fc.bias", 13),
    ],
)  # fmt: skip
def test_group(name, layer):
    assert group_layer(name, (3, 3, 27, 3)) == layer
    assert layer_decay(0.6, (3, 3, 27, 3), "group")(name) == pytest.approx(0.6 ** (13 - layer))


def test_group_rises_steadily_at_other_depths():
    layers = [group_layer(f"stages.2.blocks.{j}.norm.weight", (3, 3, 9, 3)) for j in range(9)]
    assert layers == list(range(3, 12))


def test_parameter_groups():
    model = ConvNeXt(Encoder("convnextv2_atto", dims=(8, 8, 8, 8)), classes=2)
    groups = parameter_groups(model, Optim(), layer_decay(0.5, (2, 2, 6, 2), "single"))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            no_decay = (
                name.endswith("bias")
                or "norm" in name
                or "grn" in name
                or name == "stem.1.weight"
                or "downsample.0" in name
            )
            assert group["weight_decay"] == (0 if no_decay else 0.05), name
            assert group["lr_scale"] == pytest.approx(0.5 ** (13 - single_layer(name, (2, 2, 6, 2))))
