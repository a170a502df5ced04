"""kNN and linear evaluation during pretraining: scores, unchanged training, bad input."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.command import parse
from configs.errors import UserError
from configs.schema import Data, FCMAESettings, Optim, Pretrain, PretrainModel, Probe, Run
from launch.training.images import Images
from launch.training.world import World
from models.fcmae import FCMAE
from models.opening import open_weights
from pretrain.objectives import OBJECTIVES
from pretrain.online_eval import OnlineEval, probe_splits
from tests.conftest import has, losses, run, run_ranks
from tests.pretrain import test_main


def words(digits, runs, name, *more):
    return test_main.words(digits, runs, name, "--optim.precision", "fp32", *more, epochs=3)


def recorded(folder) -> dict[int, dict]:
    """Scores in a run's log, by step."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["knn"] for entry in entries if "knn" in entry}


def after(weights, digits, out, *more) -> dict:
    """Scores of finetune/probe.py for a run's final weights, as the run records them."""
    more = ["--no-linear", "--workers", "0", "--device", "cpu", "--batch", "240", "--out", out, *more]
    run("python", "finetune/probe.py", weights, digits, *more)
    found = json.loads(out.read_text())["knn"]
    return {f"{top}_k{k}": score for k, stored in found.items() for top, score in stored.items()}


@pytest.fixture(scope="module")
def probed(digits, tmp_path_factory):
    runs = tmp_path_factory.mktemp("probed")
    return runs / "with", run("python", "pretrain/main.py", *words(digits, runs, "with", "--probe.every", "2")).stdout


def test_scores_are_recorded(probed, digits, tmp_path):
    folder, text = probed
    found = recorded(folder)
    assert found.keys() == {0, 12, 18}  # the weights at first, epoch 2, and the last
    assert found[18] == after(folder / "fcmae.pt", digits, tmp_path / "after.json")
    assert found[18].keys() == {f"{top}_k{k}" for top in ("top1", "top5") for k in (10, 20, 100, 200)}
    assert 0.2 < found[18]["top1_k20"] < found[18]["top5_k20"] <= 1
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("knn/top1_k20")] == [0, 12, 18]
    before, after_it = text.split("step 1/18")
    assert has(before, "kNN 355 1,442") and has(after_it, f"kNN {found[18]['top1_k10']:.2%}")


def test_linear_classifier(digits, tmp_path):
    """Equal to finetune/probe.py's for the final weights; the summary lists all evaluations."""
    more = ["--probe.every", "3", "--probe.linear_epochs", "4", "--run.log_every", "100"]
    text = run("python", "pretrain/main.py", *words(digits, tmp_path, "x", *more)).stdout
    found = json.loads((tmp_path / "x/summary.json").read_text())
    assert found["linear"].keys() == found["knn"].keys() == {"0", "3"}
    out = tmp_path / "after.json"
    command = ["--workers", "0", "--device", "cpu", "--batch", "240", "--epochs", "4", "--out", out]
    run("python", "finetune/probe.py", tmp_path / "x/fcmae.pt", digits, *command)
    linear = json.loads(out.read_text())["linear"]
    assert found["linear"]["3"] == {key: linear[key] for key in ("top1", "top5", "lr")}
    assert has(text, f"linear {linear['top1']:.2%} {linear['lr']:g}")
    assert found["loss"].keys() == {"1", "2", "3"}  # one line an epoch


def test_training_is_unchanged(probed, digits, tmp_path):
    run("python", "pretrain/main.py", *words(digits, tmp_path, "without"))
    assert losses(tmp_path / "without") == losses(probed[0]) and recorded(tmp_path / "without") == {}
    one, other = (open_weights(folder / "fcmae.pt").weights for folder in (tmp_path / "without", probed[0]))
    for part in ("encoder", "decoder"):
        assert all(torch.equal(tensor, getattr(other, part)[name]) for name, tensor in getattr(one, part).items())


@pytest.mark.slow
def test_on_two_ranks_with_divided_weights(digits, tmp_path):
    """The probe's shards are not those of the training; a part of each split."""
    run("python", "data/prepare.py", "digits", tmp_path / "bare", "--no-labels")
    more = ["--probe.every", "1", "--probe.path", digits, "--probe.images", "300", "--optim.zero_stage", "3"]
    command = words(tmp_path / "bare", tmp_path, "two", *more, "--probe.crop", "1")
    run_ranks(2, "pretrain/main.py", *command)
    found = recorded(tmp_path / "two")
    assert len(found) == 4
    offline = after(tmp_path / "two/fcmae.pt", digits, tmp_path / "after.json", "--images", "300", "--crop", "1")
    assert list(found.values())[-1] == offline


def test_steps_are_watched_and_the_model_stays_in_training(digits):
    places = []

    def progress(steps, count, what):
        for i, step in enumerate(steps, 1):
            places.append(f"{what}, {i} of {count}")
            yield step

    small = PretrainModel(channels=1, stem_stride=1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    data, optim, asked = Data(path=str(digits), size=24, workers=0), Optim(batch_size=16), Probe(every=1, images=40)
    config = Pretrain(model=small, data=data, optim=optim, probe=asked)
    model = FCMAE(small, FCMAESettings(decoder_dim=8)).train()
    engine = SimpleNamespace(model=model, precision="fp32", whole_weights=nullcontext)
    world = World(0, 1, torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        before = torch.get_rng_state()
        online = OnlineEval(config, probe_splits(config, Images(config.run, None, False)), ((0.0,), (1.0,)), world)
        report = online.evaluate(engine, 1, progress)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    steps = [f"{split} {i} 3" for split in ("train", "val") for i in (1, 2, 3)]
    assert all(has(place, words) for place, words in zip(places, [*steps, "1"], strict=True))
    assert report.scores["knn"].keys() == {"top1_k10", "top5_k10", "top1_k20", "top5_k20"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_split": "test"}, "index.json test train val"),
        ({"path": "nowhere"}, "nowhere"),
        ({"images": 9}, "train probe.images 9 10"),
    ],
)
def test_bad_input(keys, message, digits):
    config = Pretrain(data=Data(path=str(digits)), probe=Probe(every=5, **keys))
    with pytest.raises(UserError) as error:
        probe_splits(config, Images(config.run, None, False))
    assert has(error.value, f"{message} probe.path probe.every")
    assert probe_splits(Pretrain(data=Data(path="nowhere")), Images(Run(), None, False)) is None


def test_images_without_labels(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "bare")
    index = json.loads((tmp_path / "bare/index.json").read_bytes())
    (tmp_path / "bare/index.json").write_text(json.dumps(index | {"classes": None}))
    with pytest.raises(UserError, match=r"probe\.every.*bare.*train.*labels"):
        config = Pretrain(data=Data(path=str(digits)), probe=Probe(every=1, path=str(tmp_path / "bare")))
        probe_splits(config, Images(config.run, None, False))


def test_an_error_comes_before_anything_is_written(digits, tmp_path):
    done = run(
        "python", "pretrain/main.py", *words(digits, tmp_path, "x", "--probe.every", "1", "--probe.path", "no"), code=2
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and has(line, "probe.every no") and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("images", 0), ("crop", 0), ("eval_split", "train")])
def test_keys(key, value):
    with pytest.raises(UserError, match=rf"probe\.{key} is {value}"):
        parse(Pretrain, "pretrain/digits.yaml", "", {"objective": OBJECTIVES}, [f"--probe.{key}={value}"])
