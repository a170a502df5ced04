"""Frozen teachers: every kind of model, on the student's grid, in the right place; what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Encoder
from models.convnext import ConvNeXt
from models.networks import Network
from models.sparse.layouts import Dense
from models.teacher import Teacher, to_grid
from models.weights import Weights, cpu_state, save
from tests.conftest import has
from tests.models.helpers import random_weights

GRID, SIZE = (2, 3), (64, 96)  # of a student with patches of 32 pixels
STATISTICS = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIT = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
TIMM = {
    "resnet10t": {},
    "convnext_atto_ols": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT | {"img_size": 70, "init_values": 1.0},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
}
CONFIG = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}


def timm_folder(folder: Path, name: str, **more) -> str:
    options = TIMM[name] | more
    model = timm.create_model(name, num_classes=5, **options).eval()
    random_weights(model)
    save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return str(folder)


def transformers_folder(folder: Path, kind: str) -> str:
    transformers = pytest.importorskip("transformers")
    small = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(patch_size=16, **CONFIG)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(patch_size=8, num_register_tokens=3, **CONFIG)
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(intermediate_size=48, **CONFIG)),
        "no pooler": lambda: transformers.ViTModel(
            transformers.ViTConfig(intermediate_size=48, **CONFIG), add_pooling_layer=False
        ),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=CONFIG | {"patch_size": 16, "intermediate_size": 48},
                text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
                | {"intermediate_size": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1},
            )
        ),
        "resnet": lambda: transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        ),
    }
    model = small[kind]()
    random_weights(model)
    model.save_pretrained(folder)
    processor = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def own_file(folder: Path, channels: int = 3, spoilt: bool = False) -> str:
    """A fine-tuned classifier of this project."""
    arch = Encoder("convnextv2_atto", channels, 4, (1, 1, 1, 1), (8, 8, 16, 16))
    model = ConvNeXt(arch, classes=3)
    random_weights(model)
    if spoilt:
        model.stem[0].weight.data[0, 0] = float("nan")
    tensors = cpu_state(model)
    head = {name: x for name, x in tensors.items() if name.startswith("head.")}
    encoder = {name: x for name, x in tensors.items() if name not in head}
    image = Preprocessing((64, 96), channels, (0.5,) * channels, (0.25,) * channels)
    save(folder / "best.pt", Weights(arch, image, encoder, head=head, classes=["a", "b", "c"]))
    return str(folder / "best.pt")


def made(kind: str, folder: Path) -> str:
    if kind == "own":
        return own_file(folder)
    return timm_folder(folder, kind) if kind in TIMM else transformers_folder(folder, kind)


KINDS = ["own", *TIMM, "dinov2", "registers", "vit", "no pooler", "clip", "resnet"]
INPUT = {"vit_small_patch14_reg4_dinov2": (56, 84)}  # multiples of 14 and the grid; others have 64 x 96


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_every_kind_of_model_are_where_the_image_is(kind, tmp_path, monkeypatch):
    """A mark in a patch changes the features of its own cell most; nothing of the teacher is trained or random."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = made(kind, tmp_path)
    before = torch.get_rng_state()
    teacher = Teacher(source, GRID, SIZE, STATISTICS)
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.size == INPUT.get(kind, SIZE)
    assert not any(x.requires_grad for x in teacher.parameters())
    assert not any(module.training for module in teacher.train().modules())
    blank = torch.zeros(1, 3, *SIZE)
    expected = teacher(blank)
    assert (expected.patches.shape[3], expected.pooled.shape[1]) == teacher.widths
    for row, column in ((0, 2), (1, 0), (1, 1)):
        marked = blank.clone()
        # the upper left quarter of the patch, because the padding of a ResNet centres its cells on their corners there
        marked[..., 32 * row : 32 * row + 16, 32 * column : 32 * column + 16] = 4 * torch.randn(3, 16, 16)
        change = (teacher(marked).patches - expected.patches).norm(dim=-1)
        assert change.shape == (1, *GRID) and int(change.argmax()) == row * GRID[1] + column, change
    assert Teacher(source, GRID, SIZE, STATISTICS).digest == teacher.digest


@torch.no_grad()
def test_features_are_those_of_the_model_used_alone(tmp_path):
    """With its own normalisation, the mean over the cells of a patch, and the class token after the norm."""
    teacher = Teacher(timm_folder(tmp_path, "vit_tiny_patch16_224"), GRID, SIZE, STATISTICS)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **(VIT | {"img_size": SIZE})).eval()
    stored = load_file(tmp_path / "model.safetensors")
    stored["pos_embed"] = timm.layers.resample_abs_pos_embed(stored["pos_embed"], (4, 6), num_prefix_tokens=1)
    model.load_state_dict(stored)
    pixels = torch.rand(2, 3, *SIZE)
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS)
    features = teacher((pixels - mean) / std)
    tokens = model.forward_features((pixels - 0.5) / 0.5)  # this model's mean and std
    for row in range(2):
        for column in range(3):
            index = [1 + y * 6 + x for y in (2 * row, 2 * row + 1) for x in (2 * column, 2 * column + 1)]
            torch.testing.assert_close(features.patches[:, row, column], tokens[:, index].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled, tokens[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_own_model_with_other_statistics(tmp_path):
    teacher = Teacher(own_file(tmp_path), GRID, SIZE, STATISTICS)
    pixels = torch.rand(2, 3, *SIZE)
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS)
    features = teacher((pixels - mean) / std)
    expected = teacher.network.model.forward_features((pixels - 0.5) / 0.25, Dense())
    torch.testing.assert_close(features.patches, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled, expected.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_grid_is_resampled_by_areas_or_linearly():
    cells = torch.randn(2, 6, 6, 5)
    coarse = to_grid(cells, (2, 3))
    torch.testing.assert_close(coarse[:, 1, 2], cells[:, 3:, 4:].mean((1, 2)))
    assert to_grid(cells, (6, 6)) is cells
    rows = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 1)
    assert to_grid(rows, (6, 2))[0, :, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2]
    odd = to_grid(torch.arange(5.0).view(1, 5, 1, 1), (2, 1))  # areas of two and a half cells, shared in the middle
    assert odd.flatten().tolist() == [1, 3]


def test_images_of_another_size_are_resized(tmp_path):
    """Smaller students have enlarged images; `wanted` overrides the size."""
    source = own_file(tmp_path)
    small = Teacher(source, (4, 4), (32, 32), STATISTICS)
    assert small.size == (128, 128)
    smooth = F.interpolate(torch.randn(1, 3, 2, 2), (32, 32), mode="bilinear")
    assert small(smooth).patches.shape == (1, 4, 4, 16)
    larger = Teacher(source, GRID, SIZE, STATISTICS, wanted=(128, 128))
    assert larger.size == (128, 128) and larger(torch.randn(2, 3, *SIZE)).patches.shape == (2, 2, 3, 16)
    with pytest.raises(UserError) as error:
        Teacher(source, GRID, SIZE, STATISTICS, wanted=(100, 128))
    assert has(error.value, "objective.teacher_size 100x128 32 96x128 null")


def one_line(source: str, statistics: tuple = STATISTICS) -> str:
    with pytest.raises(UserError) as error:
        Teacher(source, GRID, SIZE, statistics)
    assert "\n" not in str(error.value)
    return str(error.value)


def spoil(folder: Path, name: str, index: tuple) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def test_what_is_no_teacher(tmp_path, monkeypatch):
    for name in "abcde":
        (tmp_path / name).mkdir()
    assert has(one_line(own_file(tmp_path, spoilt=True)), "not finite stem.0.weight")
    grey = own_file(tmp_path, channels=1)
    assert has(one_line(grey), "objective.teacher best.pt 1 channels model.channels 3")
    assert has(one_line("timm:resnet51x"), "timm:resnet51x is not a model of timm nearest: resnet51")
    assert has(one_line("timm:resnet10t.no_such"), "timm:resnet10t.no_such has no pretrained weights resnet10t.c3_in1k")
    vit = timm_folder(tmp_path / "a", "vit_tiny_patch16_224")
    spoil(tmp_path / "a", "norm.weight", (0,))
    assert has(one_line(vit), f"{vit} not finite model.norm.weight")
    tensors = load_file(tmp_path / "a/model.safetensors")
    save_file({name: x for name, x in tensors.items() if name != "cls_token"}, tmp_path / "a/model.safetensors")
    assert has(one_line(vit), f"{vit} missing cls_token")
    (tmp_path / "b/config.json").write_text('{"architecture": "resnet_of_tomorrow"}')
    assert has(one_line(str(tmp_path / "b")), "resnet_of_tomorrow timm")
    (tmp_path / "c/config.json").write_text('{"model_type": "vit_of_tomorrow"}')
    assert has(one_line(str(tmp_path / "c")), "transformers cannot load")
    options = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}
    fixed = timm.create_model("cait_xxs24_224", num_classes=5, **options)
    save_for_hf(fixed, tmp_path / "d", model_args=options, safe_serialization=True)
    assert has(one_line(str(tmp_path / "d")), "objective.teacher cannot take images of 64x96 objective.teacher_size")
    monkeypatch.setattr("models.networks.find_spec", lambda _: None)
    (tmp_path / "e/config.json").write_text('{"model_type": "dinov2"}')
    assert has(one_line(str(tmp_path / "e")), "pip install transformers")


def test_outputs_without_a_feature_map():
    network = Network("x", torch.nn.Identity(), 16, Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3))
    image = torch.zeros(1, 3, 32, 48)
    cells = torch.randn(1, 2, 3, 4)
    assert torch.equal(network.as_map(cells, image), cells)
    assert torch.equal(network.as_map(cells.permute(0, 3, 1, 2), image), cells)
    assert torch.equal(network.as_map(torch.cat([torch.ones(1, 5, 4), cells.flatten(1, 2)], 1), image, (0, 5)), cells)
    square = torch.randn(1, 2, 2, 2)  # as many channels as rows and columns
    assert torch.equal(network.as_map(square, image[..., :32], last=True), square)
    assert torch.equal(network.as_map(square, image[..., :32]), square.permute(0, 2, 3, 1))
    for output in (cells[:, :1], torch.randn(1, 7, 4), torch.randn(1, 4), [cells]):
        with pytest.raises(UserError) as error:
            network.as_map(output, image)
        assert has(error.value, "objective.teacher x no feature map of 2x3 cells 32x48")


def test_a_language_model_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert has(one_line(str(tmp_path)), "not a model of images")


def test_names_of_timm_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert has(one_line("timm:resnet10t"), "timm:resnet10t")
