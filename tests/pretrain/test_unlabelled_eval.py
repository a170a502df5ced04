"""Evaluation without labels: values, ranks, splits, unchanged training, resuming, the report."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, FCMAEChoice, Optim, Pretrain, PretrainModel, Probe
from data.decode import decode
from data.sampler import EvalBatches
from data.shards import open_split
from data.transforms import normalize, sample_rng
from launch.reports.content import results
from launch.training.images import Images
from launch.training.world import World
from pretrain.objectives.fcmae import Objective
from pretrain.unlabelled_eval import UnlabelledEval, arranged, unlabelled_split
from tests.conftest import has, losses, run, run_ranks
from tests.pretrain import test_main
from tests.processes import on_ranks

SMALL = PretrainModel(channels=1, stem_stride=1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), grn_scope="batch")
CPU = torch.device("cpu")


def words(digits, runs, name, *more):
    return test_main.words(digits, runs, name, "--probe.unlabelled_every", "1", *more)


def recorded(folder) -> dict[int, dict]:
    """The values in a run's log, by step."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["unlabelled"] for entry in entries if "unlabelled" in entry}


def settings(digits, ranks: int = 1, **probe) -> Pretrain:
    data, optim = Data(path=str(digits), size=24, workers=0), Optim(batch_size=16, micro_batch=8 // ranks)
    asked = Probe(**{"unlabelled_every": 1, "unlabelled_images": 37} | probe)
    return Pretrain(model=SMALL, data=data, optim=optim, probe=asked, objective=FCMAEChoice("fcmae", decoder_dim=8))


def evaluated(rank: int, ranks: int, config: Pretrain) -> dict[str, float]:
    """In a rank: the values of a model with random weights."""
    images, objective = Images(config.run, None, False), Objective(config)
    split = unlabelled_split(config, images, open_split(config.data))
    torch.manual_seed(0)
    model = objective.build().train()
    engine = SimpleNamespace(model=model, precision="fp32", whole_weights=nullcontext, autocast=nullcontext)
    evaluation = UnlabelledEval(config, objective, split, ((0.1,), (0.5,)), World(rank, ranks, CPU))
    before = torch.get_rng_state()
    report = evaluation.evaluate(engine, 3, lambda steps, count, what: steps)
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in model.modules())
    assert evaluation.history == {3: report.scores["unlabelled"]}
    return report.scores["unlabelled"]


@pytest.mark.parametrize(("images", "batch", "ranks"), [(37, 8, 1), (37, 8, 2), (37, 4, 3), (8, 8, 4)])
def test_batches_do_not_depend_on_the_number_of_ranks(images, batch, ranks):
    order = arranged(range(images), batch, ranks)
    parts = [[[sample for _, sample, _ in ids] for ids in EvalBatches(order, batch, r, ranks)] for r in range(ranks)]
    found = [ids for together in zip(*parts, strict=True) for ids in together]  # in turns
    expected = [[*range(i, min(i + batch, images))] for i in range(0, images, batch)]
    assert [[sample for sample in ids if sample >= 0] for ids in found if max(ids) >= 0] == expected


def test_one_rank_and_two_have_the_same_values(digits, tmp_path):
    """Also with GRN over the batch: 37 images are no whole number of batches of 4."""
    [one] = on_ranks(1, evaluated, tmp_path, 1, settings(digits, ranks=2))
    first, second = on_ranks(2, evaluated, tmp_path, 2, settings(digits, ranks=2))
    assert first == second and first == pytest.approx(one, rel=1e-9)
    assert one.keys() == {"loss", "rankme", "alpha"} and one["loss"] > 0 and 1 < one["rankme"] < 8


def test_the_loss_is_the_mean_over_fixed_crops_and_masks(digits, tmp_path):
    config = settings(digits, unlabelled_images=5)
    [found] = on_ranks(1, evaluated, tmp_path, 1, config)
    objective, split = Objective(config), open_split(config.data, "val")
    torch.manual_seed(0)
    model, images, masks = objective.build().eval(), [], []
    for sample in np.arange(5) * len(split) // 5:
        image = decode(split.read(int(sample))[0], 1)
        entries = objective.transform()(image, -1, sample_rng(0, 0, int(sample)))
        images.append(normalize(entries["image"][None], torch.tensor([0.1]), torch.tensor([0.5]))[0])
        masks.append(entries["visible"])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(model(torch.stack(images), torch.stack(masks))), rel=1e-5)


def test_which_images(digits):
    images, training = Images(Pretrain().run, None, False), open_split(Data(path=str(digits)))
    config = settings(digits)
    assert unlabelled_split(config, images, training).name == "val"
    assert unlabelled_split(settings(digits, eval_split="test"), images, training) is training
    assert unlabelled_split(settings(digits, path=str(digits)), images, training).name == "val"
    assert unlabelled_split(settings(digits, unlabelled_every=0), images, training) is None
    for wrong in ({"path": str(digits), "eval_split": "test"}, {"path": "nowhere"}):
        with pytest.raises(UserError, match=r"^probe\.unlabelled_every is 1, but .*probe\.path"):
            unlabelled_split(settings(digits, **wrong), images, training)


def test_a_run_without_labels_resumes_as_if_undisturbed(digits, tmp_path):
    bare = tmp_path / "bare"
    run("python", "data/prepare.py", "--no-plan", "digits", bare, "--no-labels")
    more = ["--probe.unlabelled_images", "100"]
    text = run("python", "pretrain/main.py", *words(bare, tmp_path, "whole", *more)).stdout
    run("python", "pretrain/main.py", *words(bare, tmp_path, "cut", *more, "--run.max_steps", "6"))
    run("python", "pretrain/main.py", *words(bare, tmp_path, "cut", *more))
    found, summary = recorded(tmp_path / "whole"), json.loads((tmp_path / "whole/summary.json").read_text())
    assert found.keys() == {0, 6, 12} and found == recorded(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert found[12]["loss"] < found[0]["loss"] and 1 < found[12]["rankme"] < 16
    assert summary["unlabelled"] == {str(step // 6): values for step, values in found.items()}
    assert summary["verdict"] == "too early to tell" and has(text, f"RankMe {found[12]['rankme']:.4g} 100 val")
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert has(results(tmp_path / "whole", lines)["without labels"], f"early {found[12]['loss']:.4g}")
    assert "alpha-ReQ" in (tmp_path / "whole/report.html").read_text()


def test_training_is_unchanged(digits, pretrained, tmp_path):
    """As the shared run, which evaluates nothing."""
    run("python", "pretrain/main.py", *words(digits, tmp_path, "with"))
    assert losses(tmp_path / "with") == losses(pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_on_two_ranks(stage, digits, tmp_path):
    for ranks in (1, 2):
        command = words(digits, tmp_path, f"on-{ranks}", "--optim.micro_batch", "120", "--optim.zero_stage", stage)
        run_ranks(ranks, "pretrain/main.py", *command)
    one, two = recorded(tmp_path / "on-1"), recorded(tmp_path / "on-2")
    assert one[0] == pytest.approx(two[0], rel=1e-9) and one[12] == pytest.approx(two[12], rel=1e-2)
