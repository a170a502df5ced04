"""Weights with a different number at every place, and what a real file of each format is named."""

import torch

from configs.schema import Encoder
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, flat_config, from_flat
from models.sizes import resolve
from models.sparse.layouts import Dense
from models.weights import Weights, split_by_prefix

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
IMAGE = {"size": [64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "eval_crop": 0.8}
FILES = {
    "ours": "x.pt", "official": "x.pth", "official-sparse": "x.pth", "timm": "x.pth", "transformers": "x",
    "mmpretrain": "x.pth",
}  # fmt: skip


def numbered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state of the model in which no two numbers of a tensor are equal: any mix-up of axes shows."""
    return {name: torch.arange(1.0, 1.0 + t.numel()).view(t.shape) for name, t in model.state_dict().items()}


def natural(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A random state that neither explodes nor vanishes."""
    return {
        name: torch.randn(t.shape) * 0.05 + (1 if name.endswith("norm.weight") else 0)
        for name, t in model.state_dict().items()
    }


def classifier(name: str = "convnextv2_atto", classes: int = 5, fill=natural, channels: int = 3, **shape) -> Weights:
    """A classifier's weights; with 0 classes an encoder's."""
    arch = resolve(Encoder(name, channels=channels, **shape))
    with torch.device("meta"):
        model = ConvNeXt(arch, classes)
    head, encoder = split_by_prefix(fill(model), "head.")
    names = [f"class {i}" for i in range(classes)] or None
    image = IMAGE | {key: [0.1 * (i + 1) for i in range(channels)] for key in ("mean", "std")}
    return Weights(arch, image, encoder, head=head, classes=names)


def autoencoder(name: str = "convnextv2_atto", fill=natural, channels: int = 3, **settings) -> Weights:
    """A masked autoencoder's weights."""
    given = from_flat({"name": name, "channels": channels, **settings})
    with torch.device("meta"):
        model = FCMAE(*given)
    encoder, decoder = split_by_prefix(fill(model), "encoder.")
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in encoder.items()}
    image = IMAGE | {key: [0.1 * (i + 1) for i in range(channels)] for key in ("mean", "std")}
    return Weights(model.encoder.arch, image, encoder, decoder, flat_config(*given))


def assert_same(found: dict, expected: dict) -> None:
    """The same names, shapes, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits(weights: Weights, image: torch.Tensor) -> torch.Tensor:
    """What the weights compute here."""
    model = ConvNeXt(weights.arch, len(weights.head["head.fc.bias"])).eval()
    model.load_state_dict(weights.encoder | weights.head)
    with torch.no_grad():
        return model(image)


def maps(weights: Weights, image: torch.Tensor) -> list[torch.Tensor]:
    """The maps [B, C, H, W] of the four stages that the weights compute here."""
    model, found = ConvNeXt(weights.arch).eval(), []
    model.load_state_dict(weights.encoder)
    for stage in model.stages:
        stage.register_forward_hook(lambda _, inputs, output: found.append(output.permute(0, 3, 1, 2)))
    with torch.no_grad():
        model.forward_features(image, Dense())
    return found
