"""Grad-CAM: the definition, where it is drawn, and as an option of predict.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from data.transforms import center_crop, seen_region
from finetune.gradcam import draw, grad_cam
from finetune.predict import main
from finetune.tasks.numbers.inference import NumbersInference
from models.convnext import ConvNeXt
from models.weights import Weights, cpu_state, save, split_by_prefix
from tests.conftest import has, names
from tests.finetune.test_evaluate import call

CLASSES = ["left", "right"]


def spots(model: ConvNeXt) -> ConvNeXt:
    """A classifier of images in which a bright patch is evidence for class 1: random, but with a lively head."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture
def model() -> ConvNeXt:
    return spots(ConvNeXt(Encoder("convnextv2_atto", 3, 1, (1, 1, 1, 1), (8, 16, 16, 32)), 2))


def test_the_definition(model):
    """By a hook on the last stage, as the paper's code does it."""
    image, held = torch.rand(3, 3, 32, 24), {}
    handle = model.stages[3].register_forward_hook(lambda _, inputs, output: held.update(x=output))
    with torch.enable_grad():
        output = model(image)
        handle.remove()
        held["x"].retain_grad()
        output[:, 1].sum().backward()
    expected = (held["x"].grad.mean((1, 2), keepdim=True) * held["x"]).sum(3).clamp(min=0).detach()
    found, number = grad_cam(model, image, lambda output: torch.ones(len(output), dtype=torch.long))
    assert found.shape == (3, 4, 3) and number.tolist() == [1, 1, 1]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours * theirs.max(), theirs, rtol=1e-4, atol=1e-6)
    assert 0 < found.max() <= 1 and found.min() >= 0


def test_no_evidence_is_all_zero(model):
    """Not NaN: a head whose outputs do not depend on the picture."""
    with torch.no_grad():
        model.head.fc.weight.zero_()
    found, _ = grad_cam(model, torch.rand(1, 3, 16, 16), lambda output: output.argmax(1))
    assert found.eq(0).all()


@pytest.mark.parametrize("share", [1, 0.5, 0.875, 0.9999])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (40, 90)])
def test_the_region_that_the_model_sees(share, height, width):
    """Pixels outside of it do not change the crop, those inside do."""
    left, top, right, bottom = seen_region(height, width, (32, 32), share)
    seen = center_crop(torch.zeros(1, height, width), (32, 32), share)
    for y, x in ((0, 0), (height // 2, width // 2), (height // 2, 0), (0, width // 2)):
        image = torch.zeros(1, height, width)
        image[:, y, x] = 1
        inside = left - 4 < x < right + 4 and top - 4 < y < bottom + 4  # resizing looks beyond a pixel
        differs = not torch.equal(center_crop(image, (32, 32), share), seen)
        assert differs <= inside and (inside or not differs)
    assert share < 1 or (left, top, right, bottom) == (0, 0, width, height)
    assert (bottom - top) / (right - left) == pytest.approx(1 if share < 1 else height / width, rel=0.05)


def test_the_colour_is_where_the_evidence_is():
    evidence = torch.zeros(2, 2)
    evidence[0, 1] = 1
    grey = torch.full((1, 40, 60), 100, dtype=torch.uint8)
    drawn = draw(grey, evidence, (20, 0, 60, 40)).int()
    change = (drawn - 100).abs().sum(0)
    assert drawn.shape == (3, 40, 60) and change[:, :20].eq(0).all() and change[30:].max() < change[:10, 50:].min()


def weights(model: ConvNeXt, path, **about):
    head, encoder = split_by_prefix(cpu_state(model), "head.")
    image = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3, crop=1.0)
    save(path, Weights(model.arch, image, encoder, head=head, **about))
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save(path)
    return path


def test_of_a_classifier(model, picture, tmp_path, capsys):
    best = weights(model, tmp_path / "best.pt", classes=CLASSES)
    for name in ((), ("left",), ("right",)):
        folder = tmp_path / "-".join(["cam", *name])
        call(main, best, picture, picture, "--cam", folder, *(("--cam-of", *name) if name else ()))
        assert names(folder) == {"00001-in-cam.png", "00002-in-cam.png"}
        with Image.open(folder / "00001-in-cam.png") as drawn:
            assert drawn.width == 400 and drawn.height > 300
    shown = capsys.readouterr().out.splitlines()[0].split(": ")[1].split()[0]
    content = {path.name: (path / "00001-in-cam.png").read_bytes() for path in tmp_path.glob("cam*")}
    assert content["cam"] == content[f"cam-{shown}"] and content["cam-left"] != content["cam-right"]


def test_of_labels(model, picture, tmp_path):
    settings = {"task": "labels", "task_config": {"thresholds": [0.5, 0.5]}}
    best = weights(model, tmp_path / "best.pt", classes=CLASSES, **settings)
    call(main, best, picture, "--cam", tmp_path / "cam", "--cam-of", "right")
    assert names(tmp_path / "cam") == {"00001-in-cam.png"}


def test_of_several_numbers_one_must_be_named():
    inference = NumbersInference.__new__(NumbersInference)
    inference.names = ["age", "weight"]
    with pytest.raises(UserError, match=r"--cam-of: age, weight"):
        inference.explained(torch.zeros(2, 2), None)
    assert inference.explained(torch.zeros(2, 2), "weight").tolist() == [1, 1]
    inference.names = ["age"]
    assert inference.explained(torch.zeros(2, 1), None).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cam", "{tmp}/cam", "--cam-of", "lefd"], "--cam-of lefd nearest left"),
        (["--cam-of", "left"], "--cam-of left --cam FOLDER"),
        (["--cam", "{tmp}/cam", "--tta", "hflip"], "--cam --tta hflip"),
    ],
)
def test_bad_input(more, message, model, picture, tmp_path):
    best = weights(model, tmp_path / "best.pt", classes=CLASSES)
    with pytest.raises(UserError) as error:
        call(main, best, picture, *(word.format(tmp=tmp_path) for word in more))
    assert has(error.value, message) and not (tmp_path / "cam").exists()
