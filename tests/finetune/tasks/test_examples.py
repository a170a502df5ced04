"""The page of examples: groups of images with two lines each."""

from types import SimpleNamespace

import numpy as np

from configs.errors import UserError
from data.sheets import read_sheet
from finetune.contact_sheet import CELL
from finetune.tasks.examples import ROW, spread, write_examples
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
    worst, best = read_sheet(tmp_path / "x.png").groups  # no empty group
    assert (worst.title, best.title, len(worst.cells)) == ("Worst", "Best", ROW)
    assert worst.cells[0].lines == ("is a", "predicted b") and max(worst.cells[0].picture.size) == CELL
    assert np.asarray(worst.cells[0].picture).std() > 10
    assert best.cells[0].picture.size == (1, 1)  # the damaged image is blank


def test_samples_are_spread_over_all():
    assert spread(range(100)) == [0, 16, 33, 50, 66, 83] and spread([3, 4]) == [3, 4] and spread([]) == []
