"""Test weights, and file names of each format."""

from dataclasses import replace

import torch

from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, flat_config, from_flat
from models.sizes import resolve
from models.sparse.layouts import Dense
from models.weights import Weights, split_by_prefix

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
FILES = {
    "ours": "x.pt", "official": "x.pth", "official-sparse": "x.pth", "timm": "x.pth", "transformers": "x",
    "mmpretrain": "x.pth", "timm-features": "x.pth", "torchvision": "x.pth",
}  # fmt: skip


def numbered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state whose tensors have no two equal numbers, so that swapped axes are detected."""
    return {name: torch.arange(1.0, 1.0 + t.numel()).view(t.shape) for name, t in model.state_dict().items()}


def natural(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A random state with outputs of normal size."""
    return {
        name: torch.randn(t.shape) * 0.05 + (1 if name.endswith("norm.weight") else 0)
        for name, t in model.state_dict().items()
    }


def preprocessing(channels: int) -> Preprocessing:
    """A preprocessing of 64 pixels whose channels differ."""
    statistics = tuple(0.1 * (i + 1) for i in range(channels))
    return Preprocessing((64, 64), channels, statistics, statistics, crop=0.8)


def change(weights: Weights, **values) -> None:
    """Change the preprocessing of weights in place."""
    weights.preprocessing = replace(weights.preprocessing, **values)


def classifier(name: str = "convnextv2_atto", classes: int = 5, fill=natural, channels: int = 3, **shape) -> Weights:
    """A classifier's weights; with 0 classes an encoder's."""
    arch = resolve(Encoder(name, channels=channels, **shape))
    with torch.device("meta"):
        model = ConvNeXt(arch, classes)
    head, encoder = split_by_prefix(fill(model), "head.")
    names = [f"class {i}" for i in range(classes)] or None
    return Weights(arch, preprocessing(channels), encoder, head=head, classes=names)


def weights_for(form: str) -> Weights:
    """Small weights with all that a format can store."""
    if form in ("ours", "official-sparse"):
        return autoencoder(**SMALL)
    if form == "torchvision":
        return classifier("convnext_tiny", **SMALL)
    return classifier(classes=0 if form == "timm-features" else 5, **SMALL)


def autoencoder(name: str = "convnextv2_atto", fill=natural, channels: int = 3, **settings) -> Weights:
    """A masked autoencoder's weights."""
    given = from_flat({"name": name, "channels": channels, **settings})
    with torch.device("meta"):
        model = FCMAE(*given)
    encoder, decoder = split_by_prefix(fill(model), "encoder.")
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in encoder.items()}
    return Weights(model.encoder.arch, preprocessing(channels), encoder, decoder, flat_config(*given))


PLAIN = ("timm-features", "torchvision")  # formats that store tensors only


def assert_same(found: dict, expected: dict) -> None:
    """The same names, shapes, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits(weights: Weights, image: torch.Tensor) -> torch.Tensor:
    """Logits of the weights in this project's model."""
    model = ConvNeXt(weights.arch, len(weights.head["head.fc.bias"])).eval()
    model.load_state_dict(weights.encoder | weights.head)
    with torch.no_grad():
        return model(image)


def maps(weights: Weights, image: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps [B, C, H, W] of the four stages in this project's model."""
    model, found = ConvNeXt(weights.arch).eval(), []
    model.load_state_dict(weights.encoder)
    for stage in model.stages:
        stage.register_forward_hook(lambda _, inputs, output: found.append(output.permute(0, 3, 1, 2)))
    with torch.no_grad():
        model.forward_features(image, Dense())
    return found
