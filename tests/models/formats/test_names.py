"""Names and shapes of the official code's and mmpretrain's files, written out; the order of sparse taps."""

import itertools
import re

import pytest
import torch

from models.formats.names import TABLES, detect, from_name, to_name
from models.formats.write import to_form
from models.sparse.taps import from_taps, to_taps
from tests.conftest import ROOT
from tests.models.formats.helpers import SMALL, autoencoder, classifier, weights_for

# One block of stage 1, the layers around it, and the ends, of a model with dims 8, 16, 24, 32 and depths 1, 2, 1, 1
OFFICIAL = {
    "downsample_layers.0.0.weight": (8, 3, 4, 4), "downsample_layers.0.0.bias": (8,),
    "downsample_layers.0.1.weight": (8,), "downsample_layers.0.1.bias": (8,),
    "downsample_layers.1.0.weight": (8,), "downsample_layers.1.0.bias": (8,),
    "downsample_layers.1.1.weight": (16, 8, 2, 2), "downsample_layers.1.1.bias": (16,),
    "stages.1.1.dwconv.weight": (16, 1, 7, 7), "stages.1.1.dwconv.bias": (16,),
    "stages.1.1.norm.weight": (16,), "stages.1.1.norm.bias": (16,),
    "stages.1.1.pwconv1.weight": (64, 16), "stages.1.1.pwconv1.bias": (64,),
    "stages.1.1.grn.gamma": (1, 1, 1, 64), "stages.1.1.grn.beta": (1, 1, 1, 64),
    "stages.1.1.pwconv2.weight": (16, 64), "stages.1.1.pwconv2.bias": (16,),
    "norm.weight": (32,), "norm.bias": (32,), "head.weight": (5, 32), "head.bias": (5,),
}  # fmt: skip
SPARSE = {
    "encoder.downsample_layers.0.0.weight": (8, 3, 4, 4), "encoder.downsample_layers.0.0.bias": (8,),
    "encoder.downsample_layers.0.1.weight": (8,), "encoder.downsample_layers.0.1.bias": (8,),
    "encoder.downsample_layers.1.0.ln.weight": (8,), "encoder.downsample_layers.1.0.ln.bias": (8,),
    "encoder.downsample_layers.1.1.kernel": (4, 8, 16), "encoder.downsample_layers.1.1.bias": (1, 16),
    "encoder.stages.1.1.dwconv.kernel": (49, 16), "encoder.stages.1.1.dwconv.bias": (1, 16),
    "encoder.stages.1.1.norm.ln.weight": (16,), "encoder.stages.1.1.norm.ln.bias": (16,),
    "encoder.stages.1.1.pwconv1.linear.weight": (64, 16), "encoder.stages.1.1.pwconv1.linear.bias": (64,),
    "encoder.stages.1.1.grn.gamma": (1, 64), "encoder.stages.1.1.grn.beta": (1, 64),
    "encoder.stages.1.1.pwconv2.linear.weight": (16, 64), "encoder.stages.1.1.pwconv2.linear.bias": (16,),
    "mask_token": (1, 12, 1, 1), "proj.weight": (12, 32, 1, 1), "proj.bias": (12,),
    "decoder.0.dwconv.weight": (12, 1, 7, 7), "decoder.0.dwconv.bias": (12,),
    "decoder.0.norm.weight": (12,), "decoder.0.norm.bias": (12,),
    "decoder.0.pwconv1.weight": (48, 12), "decoder.0.pwconv1.bias": (48,),
    "decoder.0.grn.gamma": (1, 1, 1, 48), "decoder.0.grn.beta": (1, 1, 1, 48),
    "decoder.0.pwconv2.weight": (12, 48), "decoder.0.pwconv2.bias": (12,),
    "pred.weight": (3072, 12, 1, 1), "pred.bias": (3072,),
}  # fmt: skip
MMPRETRAIN = {
    "backbone.downsample_layers.0.0.weight": (8, 3, 4, 4), "backbone.downsample_layers.0.0.bias": (8,),
    "backbone.downsample_layers.0.1.weight": (8,), "backbone.downsample_layers.0.1.bias": (8,),
    "backbone.downsample_layers.1.0.weight": (8,), "backbone.downsample_layers.1.0.bias": (8,),
    "backbone.downsample_layers.1.1.weight": (16, 8, 2, 2), "backbone.downsample_layers.1.1.bias": (16,),
    "backbone.stages.1.1.depthwise_conv.weight": (16, 1, 7, 7), "backbone.stages.1.1.depthwise_conv.bias": (16,),
    "backbone.stages.1.1.norm.weight": (16,), "backbone.stages.1.1.norm.bias": (16,),
    "backbone.stages.1.1.pointwise_conv1.weight": (64, 16), "backbone.stages.1.1.pointwise_conv1.bias": (64,),
    "backbone.stages.1.1.grn.gamma": (64,), "backbone.stages.1.1.grn.beta": (64,),
    "backbone.stages.1.1.pointwise_conv2.weight": (16, 64), "backbone.stages.1.1.pointwise_conv2.bias": (16,),
    "backbone.norm3.weight": (32,), "backbone.norm3.bias": (32,), "head.fc.weight": (5, 32), "head.fc.bias": (5,),
}  # fmt: skip


def expected(table: dict, block: str, layer: str) -> dict:
    """The written-out names of block 1 of stage 1 and layer 1, for every block and layer of the small model."""
    widths, whole = SMALL["dims"], {}
    for name, shape in table.items():
        if block in name:
            for i, depth in enumerate(SMALL["depths"]):
                for j in range(depth):
                    grown = tuple({16: widths[i], 64: 4 * widths[i]}.get(n, n) for n in shape)
                    whole[name.replace(block, block.replace("1.1", f"{i}.{j}"))] = grown
        elif layer in name:
            for i in (1, 2, 3):
                grown = tuple({8: widths[i - 1], 16: widths[i]}.get(n, n) for n in shape)
                whole[name.replace(layer, layer.replace("1", str(i)))] = grown
        else:
            whole[name] = shape
    return whole


@pytest.mark.parametrize(
    ("form", "table", "block", "layer"),
    [
        ("official", OFFICIAL, "stages.1.1.", "downsample_layers.1."),
        ("official-sparse", SPARSE, "encoder.stages.1.1.", "downsample_layers.1."),
        ("mmpretrain", MMPRETRAIN, "backbone.stages.1.1.", "downsample_layers.1."),
    ],
)
def test_names_and_shapes(form, table, block, layer):
    weights = autoencoder(decoder_dim=12, **SMALL) if form == "official-sparse" else classifier(**SMALL)
    tensors, remarks = to_form(weights, form)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected(table, block, layer)
    assert remarks == [] and detect(tensors).form == form


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("official", "stages.1.1.gamma"),
        ("mmpretrain", "backbone.stages.1.1.gamma"),
        ("timm", "stages.1.blocks.1.gamma"),
        ("transformers", "convnext.encoder.stages.1.layers.1.layer_scale_parameter"),
    ],
)
def test_layer_scale_of_v1(form, name):
    tensors, _ = to_form(classifier("convnext_tiny", **SMALL), form)
    assert tensors[name].shape == (16,) and not any("grn" in name for name in tensors)


@pytest.mark.parametrize("form", TABLES)
def test_names_round_trip(form):
    weights = weights_for(form)
    v1 = {} if form == "official-sparse" else classifier("convnext_tiny", **SMALL).encoder
    ours = weights.encoder | weights.decoder | weights.head | v1
    theirs = {to_name(name, form) for name in ours}
    assert None not in theirs and len(theirs) == len(ours)
    assert {from_name(name, form) for name in theirs} == set(ours)


def test_depthwise_taps():
    """Tap (row y, column x) of channel c is row 7 x + y of MinkowskiEngine's kernel."""
    dense = torch.tensor([[[[100 * c + 10 * y + x for x in range(7)] for y in range(7)]] for c in range(3)])
    kernel = to_taps(dense)
    for y in range(7):
        for x in range(7):
            for c in range(3):
                assert kernel[7 * x + y, 0, c] == 100 * c + 10 * y + x
    assert torch.equal(from_taps(kernel), dense)


def test_convolution_taps():
    """Tap (row y, column x) from channel i to o is at [2 x + y, i, o]."""
    dense = torch.arange(2.0 * 3 * 4).view(3, 2, 2, 2)
    kernel = to_taps(dense)
    for o in range(3):
        for i in range(2):
            for y in range(2):
                for x in range(2):
                    assert kernel[2 * x + y, i, o] == dense[o, i, y, x]
    assert torch.equal(from_taps(kernel), dense)


def test_the_table_in_the_docs():
    """docs/weights.md lists every name by format; a dash means that the format has no such tensor."""
    lines = (ROOT / "docs/weights.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| ours, timm |"))
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines[head:]]
    rows = list(itertools.takewhile(bool, cells[2:]))
    some = {"i": 1, "j": 1, "k": 2, "n": 0, "p": "weight"} | {"2i": 2, "2i+1": 3, "2k+1": 5}
    for ours, *theirs in rows:
        for form, cell in zip(cells[0][1:], theirs, strict=True):
            expected = to_name(ours.format(**some), form)
            assert (expected or "-") == cell.format(**some), f"{ours} in {form}"
    weights = [autoencoder(**SMALL), classifier("convnext_tiny", **SMALL)]
    names = {name for w in weights for part in (w.encoder, w.decoder, w.head) for name in part}
    patterns = [re.compile(re.sub(r"\\{\w\\}", r"\\w+", re.escape(row[0]))) for row in rows]
    assert all(any(pattern.fullmatch(name) for pattern in patterns) for name in names)
