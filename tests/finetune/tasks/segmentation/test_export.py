"""Export of segmentation models: every format, other sizes and batches, equal outputs."""

import json

import onnxruntime
import pytest
import torch
from PIL import Image

from data.transforms import normalize
from finetune.export import main
from tests.conftest import has
from tests.finetune.tasks.segmentation.helpers import NAMES, config, scene, weights_file


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(scene(0)[0]).save(path)
    return path


@pytest.mark.parametrize("head", ["fpn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_onnx_with_other_sizes_and_batches(head, image, tmp_path):
    """The file is used outside of the project: other batches, heights and widths, names and sizes inside."""
    model = weights_file(tmp_path / "x.pt", config(head, auxiliary=True))
    main([str(tmp_path / "x.pt"), str(tmp_path / "x.onnx"), "--to", "onnx", "--images", str(image)])
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    about = json.loads(session.get_modelmeta().custom_metadata_map["convnext-fcmae.json"])
    assert about["classes"] == NAMES and has(about["input"]["image"], "height multiple")
    for shape in ((1, 3, 40, 56), (3, 3, 64, 24)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = model(normalize(images, torch.full((3,), 0.5), torch.full((3,), 0.2)))
        (found,) = session.run(None, {"image": images.numpy()})
        assert found.shape == (shape[0], len(NAMES), *shape[2:])
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "words",
    [
        ("torch-export", "x.pt2"),
        pytest.param(("torchscript", "y.pt"), marks=pytest.mark.slow),
        pytest.param(("onnx", "x.onnx", "--fp16"), marks=pytest.mark.slow),
    ],
)
def test_other_formats(words, image, tmp_path, capsys):
    """`export` itself compares outputs, also with larger images."""
    weights_file(tmp_path / "x.pt", config("upernet"))
    to, name, *more = words
    main([str(tmp_path / "x.pt"), str(tmp_path / name), "--to", to, "--images", str(image), *more])
    assert "1x3x80x112" in capsys.readouterr().out


def test_timm_has_no_such_head(image, tmp_path, refused):
    weights_file(tmp_path / "x.pt", config())
    words = [tmp_path / "x.pt", tmp_path / "x.safetensors", "--to", "safetensors", "--images", image]
    assert has(refused(main, *words), "timm --features")
