"""Confusion matrix, reliability diagram, annotated images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from configs.style import FIGURE, WIDTH
from data.sheets import read_sheet
from finetune.tasks import pictures as shared
from finetune.tasks.classification import pictures
from finetune.tasks.classification.scores import Predictions
from tests.conftest import has
from tests.data.helpers import picture


@pytest.fixture
def figures(monkeypatch):
    """Figures that were written."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: found.append(figure) or save(figure, *a, **k))
    return found


def predictions(label, first):
    confidence = np.full(len(label), 0.5, np.float32)
    return Predictions(np.arange(len(label)), np.array(label), np.array(first)[:, None], confidence, confidence)


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def test_cells_are_shares_of_the_row(figures, tmp_path):
    """Names may contain formulas, and letters that the font lacks."""
    found = predictions([0, 0, 0, 0, 2, 2], [0, 0, 0, 2, 2, 2])
    pictures.confusion_picture(tmp_path / "x.png", found, ["$a_", "unused", "猫 $\\x$"])
    (axes,) = figures[0].axes
    assert labels(axes.yaxis) == labels(axes.xaxis) == ["$a_", "猫 $\\x$"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "2"]  # counts
    assert has(axes.get_title("left"), "6 images 2 classes")
    Image.open(tmp_path / "x.png").verify()


def test_the_most_confused_of_many_classes(figures, tmp_path):
    """200 classes; class i < 20 is predicted as class 100 + i, class 7 most often."""
    label = np.concatenate([np.arange(200), np.arange(20), [7, 7]])
    first = np.concatenate([np.arange(200), np.arange(20) + 100, [107, 107]])
    pictures.confusion_picture(tmp_path / "x.png", predictions(label, first), [str(i) for i in range(200)])
    (axes,) = figures[0].axes
    shown = [int(name) for name in labels(axes.yaxis)]
    assert has(axes.get_title("left"), "222 images 20 200")
    assert len(shown) == 20 and shown == sorted(shown) and {7, 107} <= set(shown)
    assert all(100 + i in shown for i in shown if i < 100)
    row, column = shown.index(7), shown.index(107)
    assert axes.images[0].get_array()[row, column] == 0.75


def test_many_classes_without_an_error(figures, tmp_path):
    pictures.confusion_picture(tmp_path / "x.png", predictions(range(200), range(200)), [str(i) for i in range(200)])
    assert labels(figures[0].axes[0].yaxis) == [str(i) for i in range(20)]


def test_reliability_diagram(figures, tmp_path):
    pictures.calibration_picture(tmp_path / "x.png", predictions([0, 0, 1, 1], [0, 0, 0, 0]).calibration())
    above, below = figures[0].axes
    assert [(bar.get_x(), bar.get_height()) for bar in above.patches] == [(pytest.approx(7 / 15), 0.5)]
    assert [bar.get_height() for bar in below.patches] == [4] and [text.get_text() for text in below.texts] == ["4"]
    assert above.get_title("left").startswith("4 images") and above.get_title("left").endswith("0.00 %")
    Image.open(tmp_path / "x.png").verify()


@pytest.mark.parametrize("classes", [1, 3, 20, 40])
def test_letters_of_a_confusion_matrix_do_not_shrink(classes, tmp_path):
    """Its size on the page grows with the classes, at 96 pixels an inch, so its letters keep theirs."""
    label = np.arange(classes)
    pictures.confusion_picture(tmp_path / "x.png", predictions(label, label), [f"class {i}" for i in label])
    with Image.open(tmp_path / "x.png") as picture:
        inches = picture.width / picture.info["dpi"][0]
        assert picture.info["Description"] == FIGURE and max(picture.size) <= shared.MAX_PIXELS + 1
    assert inches == pytest.approx(max(WIDTH, (0.36 if classes <= 30 else 0.2) * classes), abs=2)


def test_examples_are_mistakes_other_wrong_ones_and_right_ones(tmp_path):
    label, first = np.zeros(40, int), np.repeat([1, 0], 20)
    confidence = np.linspace(0.99, 0.2, 40).astype(np.float32)
    found = Predictions(np.arange(40), label, first[:, None], confidence, 1 - confidence)
    pictures.write_pictures(tmp_path, found, ["cat", "dog"], SimpleNamespace(read=lambda i: (picture(i), 0)))
    sure, wrong, right = read_sheet(tmp_path / "examples.png").groups
    assert sure.title.endswith("of 20") and has(wrong.title, "20 40") and has(right.title, "20 40")
    assert [cell.lines for cell in sure.cells][:2] == [
        ("is cat", "predicted dog 99 %"),
        ("is cat", "predicted dog 97 %"),
    ]
    assert all("dog" in cell.lines[1] for cell in wrong.cells) and all("cat" in cell.lines[1] for cell in right.cells)


@pytest.mark.parametrize(("shape", "zoom"), [((1, 8, 8), 32), ((3, 300, 400), 1), ((4, 100, 60), 3), ((5, 9, 300), 1)])
def test_the_picture_is_whole_and_the_text_below_it(shape, zoom):
    image = torch.randint(1, 255, shape, dtype=torch.uint8)
    pixels = np.asarray(shared.annotate(image, ["cat 99.0 %", "a name that is far too long for this " * 3 + "0.1 %"]))
    height, width = shape[1] * zoom, shape[2] * zoom
    left = (pixels.shape[1] - width) // 2
    expected = (image[:3] if shape[0] >= 3 else image.expand(3, -1, -1)).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[:height, left : left + width][::zoom, ::zoom], expected)
    band = pixels[height:]
    letters = np.argwhere(band.min(2) < 128)
    assert len(letters) and (band[[0, -1]] == 255).all() and (band[:, [0, -1]] == 255).all()  # none touches an edge
    assert np.ptp(letters[:, 0]) > 2 * shared.MIN_LETTERS


def test_letters_grow_with_the_picture():
    heights = [
        shared.annotate(torch.zeros(3, 10, side, dtype=torch.uint8), ["H"]).height - 10 for side in (400, 1600, 6400)
    ]
    assert heights[1] > 2 * heights[0] and heights[2] == pytest.approx(4 * heights[1], rel=0.05)
