"""The rules of a plan: sensible for few and many images, small and large ones, CPU and GPU; and as in the recipes."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from configs.command import parse
from configs.recipes import RECIPES, load_recipe
from configs.schema import Finetune, Pretrain
from finetune.tasks import TASKS
from launch.plans.choices import choose, fitting_batch
from launch.plans.facts import Facts
from pretrain.objectives import OBJECTIVES

OPTIONS = {"pretrain": (Pretrain, "", "", {"objective": OBJECTIVES}), "finetune": (Finetune, "", "", {"task": TASKS})}


def facts(images=1000, side=300, channels=3, deep=False, **splits):
    splits = splits or {"train": {0: images - images // 2, 1: images // 2}, "val": {0: 10, 1: 10}}
    counts = {name: Counter(labels) for name, labels in splits.items()}
    value = (0.5,) * channels
    return Facts("shards/x", counts, next(iter(counts)), 500, (side, side, side), channels, deep, value, value)


def plan(found, device="cpu", ranks=1):
    return choose(found, device, ranks, "x", Path("x.yaml"))


def values(found, device="cpu", ranks=1):
    choices = plan(found, device, ranks)
    return choices.common.values() | choices.pretrain.values()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("side", [4, 8, 28, 32, 48, 64, 96, 128, 160, 500, 4000])
@pytest.mark.parametrize("images", [1, 3, 20, 1000, 50_000, 2_000_000])
def test_every_plan_is_a_recipe_of_both_stages(device, side, images, tmp_path):
    choices, found = plan(facts(images, side, train={0: images, 1: 1}, val={0: 1}), device), {}
    for stage, entries in (("pretrain", choices.pretrain), ("finetune", choices.finetune)):
        keys = choices.common.values() | entries.values()
        nested = {}
        for key, value in keys.items():
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(nested))
        found[stage] = parse(*OPTIONS[stage], ["--config", str(tmp_path / "r.yaml")])
        assert found[stage].optim.batch_size <= max(2, images + 1)
    config = found["pretrain"]
    objective = OBJECTIVES[config.objective.name].Objective(config)
    # the size is a multiple of the patch, patches are hidden, and a batch has all crops of its images
    objective.check_batch(config.optim.batch_size)
    assert config.optim.warmup_epochs < config.optim.epochs and config.run.save_every <= config.optim.epochs


def test_small_images_as_in_the_guide():
    for side, (size, stride) in {28: (32, 1), 48: (48, 1), 64: (64, 2), 96: (96, 2), 128: (128, 4)}.items():
        found = values(facts(side=side), "cuda")
        assert (found["data.size"], found["model.stem_stride"]) == (size, stride)
    assert values(facts(side=500), "cuda")["data.size"] == 224 and values(facts(side=500), "cpu")["data.size"] == 160


@pytest.mark.parametrize(
    ("device", "base", "channels"),
    [("cpu", "cifar10-small-lejepa", 3), ("cpu", "cifar10-small-muon", 1), ("cuda", "cifar10", 3)],
)
def test_it_agrees_with_the_recipe_for_such_images(device, base, channels):
    found = values(facts(45_000, 32, channels), device)
    recipe = load_recipe(RECIPES / f"pretrain/{base}.yaml", "pretrain")
    same = recipe.keys() - {"data.path", "data.mean", "data.std", "data.workers", "optim.precision", "run.name"}
    same -= {"model.channels", "optim.warmup_epochs", "run.log_every"}
    same -= {key for key in recipe if key.startswith("probe.")}
    default = {"data.crop_scale": [0.2, 1.0]}
    assert {key: found.get(key, default.get(key)) for key in same} == {key: recipe[key] for key in same}


def test_few_images_small_batch_many_epochs():
    few, some, many = (values(facts(n), "cuda") for n in (1200, 50_000, 1_300_000))
    assert (few["optim.batch_size"], few["optim.epochs"]) == (128, 2000)  # docs/guide/own-images.md
    assert few["optim.epochs"] > some["optim.epochs"] > many["optim.epochs"] == 100
    assert few["model.name"] == some["model.name"] == "convnextv2_atto" and many["model.name"] == "convnextv2_pico"
    assert (many["optim.batch_size"], many["data.size"]) == (1024, 160)  # configs/pretrain/one-gpu.yaml
    assert values(facts(1_300_000), "cpu")["model.name"] == "convnextv2_atto"


@pytest.mark.parametrize(
    ("images", "channels", "deep", "device", "compared"),
    [
        (367, 3, False, "cpu", True), (255, 3, False, "cpu", False), (5000, 1, False, "cpu", False),
        (5000, 3, True, "cpu", False), (5000, 3, False, "cuda", False),
    ],
)  # fmt: skip
def test_crops_are_compared_where_that_was_measured_to_pay(images, channels, deep, device, compared):
    found = values(facts(images, channels=channels, deep=deep), device)
    assert (found.get("objective.name") == "lejepa", found.get("optim.name") == "muon") == (compared, device == "cpu")
    if device == "cpu" and not compared:
        assert found["optim.lr"] == load_recipe(RECIPES / "pretrain/cifar10-small-muon.yaml", "pretrain")["optim.lr"]
    if compared:
        assert (found["optim.batch_size"], found["data.repeats"]) == (120, 4)
        assert found["optim.lr"] * 120 / 256 == pytest.approx(5e-3, rel=0.04)  # that of the recipe, rounded
    more = values(facts(images, channels=channels, deep=deep), device, ranks=3)
    assert more["optim.batch_size"] % (3 * more.get("data.repeats", 1)) == 0


def test_batches_divide_by_the_ranks():
    assert [fitting_batch(n, 128, 1) for n in (1, 20, 205, 1200, 9000)] == [1, 16, 16, 128, 128]
    assert fitting_batch(9000, 128, 3) == 126 and fitting_batch(20, 128, 6) == 12


def test_the_other_values_of_fine_tuning_are_those_of_the_recipe():
    found = plan(facts(10_000), "cuda").finetune.values()
    recipe = load_recipe(RECIPES / "finetune/photos.yaml", "finetune")
    own = {"data.path", "data.size", "model.like", "run.name"}
    assert {key: found[key] for key in recipe.keys() - own} == {key: recipe[key] for key in recipe.keys() - own}


@pytest.mark.parametrize(("channels", "deep", "kept"), [(3, False, True), (3, True, False), (1, False, False)])
def test_policies_only_for_colours_of_8_bits(channels, deep, kept):
    found = plan(facts(channels=channels, deep=deep), "cuda").finetune.values()
    assert bool(found["augment.auto_augment"]) == kept


def test_without_labels_there_is_no_block():
    choices = plan(facts(train={None: 100}))
    assert choices.finetune is None and "labels" in choices.problem and "probe.every" not in choices.pretrain.values()


def test_without_val_the_best_epoch_is_chosen_on_test():
    choices = plan(facts(train={0: 50, 1: 50}, test={0: 9}))
    value, why = choices.finetune.keys["eval_split"]
    assert value == "test" and "too good" in why


def test_the_largest_split_is_named():
    assert values(facts(unlabeled={None: 500}, train={0: 5, 1: 5}))["data.split"] == "unlabeled"
