"""docs/recipes.md shows every recipe, and its counts are the published ones."""

import re

import pytest

from bench import recipes_page
from configs.command import RECIPES


@pytest.fixture(scope="module")
def page() -> str:
    return recipes_page.page()


def test_the_page_shows_the_recipes(page):
    """docs/recipes.md is what bench/recipes_page.py makes of configs/."""
    assert recipes_page.PAGE.read_text() == page
    start = (
        "| [finetune/imagenet/base-22k-1k-384](../configs/finetune/imagenet/base-22k-1k-384.yaml) | convnextv2_base "
    )
    assert start + "| 88.7 | 45.1 | 384 | 1 | 30 | 87.7 |" in page
    assert "| convnextv2_large | 198.0 | 34.4 | 224 | - | 800 | 85.6 when fine-tuned |" in page


def test_every_recipe_is_there_once(page):
    linked = re.findall(r"\(\.\./configs/(\S+)\)", page)
    assert sorted(linked) == sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize(
    ("model", "side", "parameters", "macs"),
    [
        ("convnextv2_atto", 224, 3.7, 0.55),  # 2301.00808, tables 14 and 15
        ("convnextv2_nano", 384, 15.6, 7.21),
        ("convnextv2_tiny", 224, 28.6, 4.47),
        ("convnextv2_base", 384, 89, 45.2),
        ("convnextv2_huge", 224, 660, 115),
        ("convnextv2_huge", 512, 660, 600.8),
        ("convnext_small", 384, 50, 25.5),  # 2201.03545, table 1
        ("convnext_xlarge", 384, 350, 179.0),
    ],
)
def test_counts_are_the_published(model, side, parameters, macs):
    counted = recipes_page.cost(model, 1000, side)
    assert counted[0] / 1e6 == pytest.approx(parameters, rel=0.006)
    assert counted[1] / 1e9 == pytest.approx(macs, rel=0.006)
