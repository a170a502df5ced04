"""The page of examples: groups of images with two lines each."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from configs.errors import UserError
from finetune.contact_sheet import CELL, GAP, LETTERS
from finetune.tasks.examples import ROW, write_examples
from tests.data.helpers import picture


def read(sample):
    if sample == 9:
        raise UserError("damaged")
    return picture(sample), 0


def test_groups_of_images(tmp_path):
    groups = {
        "Worst": [(i, "is a", "predicted b") for i in range(20)],
        "None": [],
        "Best": [(9, "is c", "predicted c")],
    }
    write_examples(tmp_path / "x.png", SimpleNamespace(read=read), groups)
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    line = LETTERS + 4
    rows, title = CELL + 2 * line + GAP, 2 * line
    assert pixels.shape == (
        2 * (rows + title) + GAP,
        ROW * (CELL + GAP) + GAP,
    )  # one row a group, none for an empty one
    first, text = pixels[GAP + title : GAP + title + CELL], pixels[GAP + title + CELL + 2 : GAP + title + rows]
    assert (first[:, :GAP] == 255).all() and (first[:, GAP : GAP + CELL] < 255).any()
    assert (text < 128).any() and (pixels[GAP : GAP + title] < 128).any()
    assert (pixels[GAP + title + rows + title :][: CELL // 3, GAP:] == 255).all()  # the damaged image is blank
