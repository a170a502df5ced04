"""What follows a pretraining."""

import pytest

from configs.recipes import RECIPES
from configs.schema import Pretrain
from launch.plans import following
from launch.plans.following import after_pretraining, finetuning_recipe
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("pretraining", "finetuning"),
    [
        ("cifar10", "cifar10"),
        ("cifar10-small-lejepa", "cifar10-small"),
        ("cifar10-small-teacher", "cifar10-small"),
        ("imagenet/base", "imagenet/base-1k"),
        ("one-gpu", "photos"),
    ],
)
@pytest.mark.parametrize("here", [ROOT, ROOT / "docs"])
def test_the_recipe_that_follows(pretraining, finetuning, here, monkeypatch):
    monkeypatch.chdir(here)
    found = finetuning_recipe(RECIPES / f"pretrain/{pretraining}.yaml")
    assert found.resolve() == RECIPES / f"finetune/{finetuning}.yaml" and not found.is_absolute()


def test_every_recipe_has_one_that_exists():
    assert all(finetuning_recipe(path).exists() for path in (RECIPES / "pretrain").rglob("*.yaml"))


def test_a_recipe_of_ones_own(tmp_path):
    assert finetuning_recipe(tmp_path / "pretrain/cifar10.yaml").resolve() == RECIPES / "finetune/photos.yaml"


def test_boxes_without_a_second_split(tmp_path, monkeypatch):
    """What is missing is the split, not labels."""
    monkeypatch.setattr(following, "count_labels", lambda path: {"train": {None: 5}})
    monkeypatch.setattr(following, "target_kind", lambda path: "boxes")
    problem, command = after_pretraining(tmp_path / "fcmae.pt", Pretrain(), RECIPES / "pretrain/bccd.yaml", None)
    assert "second split" in problem and "--val-fraction 0.1" in problem and "finetune/embed.py" in command
