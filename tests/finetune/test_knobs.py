"""The effect of every fine-tuning setting."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.schema import Augment, Data, Encoder, Finetune, FinetuneModel, Optim
from finetune.finetuning import Finetuning
from finetune.tasks.classification import Settings
from finetune.tasks.classification.task import ClassifierTask
from launch.training.world import World
from models.opening import open_weights
from models.sizes import resolve
from tests.conftest import has, run
from tests.finetune.test_main import summary, words

ARCH = resolve(Encoder("convnextv2_atto", channels=1, stem_stride=1, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)))
CLASSES = [str(i) for i in range(10)]


def task_of(config: Finetune) -> ClassifierTask:
    """The task with ten classes; splits are not read."""
    split = SimpleNamespace(classes=CLASSES, labels=lambda: np.arange(10), name="train")
    return ClassifierTask(config, split, split)


def seen(augment: Augment, task: Settings | None = None, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [8, 1, 8, 8] and targets [8, 10] that model and criterion receive; the input image i is constant i + 1."""
    world, got = World(0, 1, torch.device("cpu")), []
    engine = lambda image: got.append(image) or torch.zeros(len(image), 10)  # noqa: E731
    config = Finetune(data=Data(size=8), augment=augment, task=task or Settings())
    made = task_of(config)
    stage = Finetuning(config, made, engine, world, None, None, ARCH, "", ((0.0,), (1.0,)))
    criterion = made.criterion
    made.criterion = lambda logits, target: got.append(target) or criterion(logits, target)
    image = torch.arange(1.0, 9).view(8, 1, 1, 1).expand(8, 1, 8, 8)
    stage.loss({"image": image, "label": torch.arange(8)}, step, 0)
    return got[0], got[1]


def test_without_augmentation_nothing_changes():
    image, target = seen(Augment())
    assert (image == torch.arange(1.0, 9).view(8, 1, 1, 1)).all() and torch.equal(target, torch.arange(8))


@pytest.mark.parametrize(
    ("mode", "holds"),
    [
        ("const", lambda erased: (erased == 0).all()),
        ("rand", lambda erased: len(erased.unique()) == 1 and (erased != 0).all()),
        ("pixel", lambda erased: len(erased.unique()) == erased.numel()),
    ],
)
def test_erasing(mode, holds):
    areas = []
    for step in range(10):
        image, _ = seen(Augment(erase=1.0, erase_mode=mode), step=step)
        for i, one in enumerate(image):
            erased = one[one != i + 1]
            assert holds(erased)
            areas.append(erased.numel())
    assert min(areas) > 0
    some = [seen(Augment(erase=0.25), step=step)[0].flatten(1).std(1) > 0 for step in range(40)]
    assert 0.15 < torch.stack(some).float().mean() < 0.35


def test_several_areas_are_erased():
    colours = []
    for step in range(10):
        image, _ = seen(Augment(erase=1.0, erase_mode="rand", erase_count=4), step=step)
        colours += [len(one[one != i + 1].unique()) for i, one in enumerate(image)]
    assert set(colours) == {1, 2, 3, 4}


def mixed(**settings) -> list[str]:
    """Kind of mixing of each of 30 batches: none, mixup (images blended) or cutmix (parts replaced)."""
    found = []
    for step in range(30):
        image, target = seen(Augment(), Settings(mixup=1.0, cutmix=1.0, **settings), step)
        blended = image.flatten(1).std(1) < 1e-4
        pure = target.max(1).values > 0.9
        found.append("nothing" if pure.all() else "mixup" if blended.all() else "cutmix")
    return found


def test_mixing_probabilities():
    both = mixed()
    assert 5 < both.count("mixup") < 25 and 5 < both.count("cutmix") < 25
    assert mixed(mix_switch=0.0).count("cutmix") == 0 and mixed(mix_switch=1.0).count("mixup") == 0
    assert mixed(mix_prob=0.0) == ["nothing"] * 30 and 5 < mixed(mix_prob=0.5).count("nothing") < 25


def test_granularity_of_mixing():
    """Weight of its own class for each image of a batch."""
    for mode, different in (("batch", 1), ("pair", 4), ("elem", 8)):
        settings = {"mixup": 1.0, "mix_mode": mode, "smoothing": 0.0}
        own = [seen(Augment(), Settings(**settings), step)[1][torch.arange(8), torch.arange(8)] for step in range(5)]
        assert {len(kept.mul(1e4).round().unique()) for kept in own} == {different}


def test_smoothing():
    _, target = seen(Augment(), Settings(mixup=1.0, mix_prob=0.0, smoothing=0.2))
    assert torch.allclose(target[0], torch.tensor([0.82, *[0.02] * 9]))


def test_a_frozen_encoder_neither_drops_paths_nor_learns():
    config = Finetune(task=Settings(), model=FinetuneModel(freeze_encoder=True, drop_path=0.5, recompute="block"))
    model = task_of(config).build(ARCH)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias",
    }  # fmt: skip
    image = torch.rand(2, 1, 16, 16)
    assert torch.equal(model.train()(image), model.eval()(image)) and model.recompute == "none"
    thawed = task_of(replace(config, model=FinetuneModel(drop_path=0.5))).build(ARCH)
    assert all(p.requires_grad for p in thawed.parameters())
    assert thawed.stages[3].blocks[0].drop_path.drop_prob == 0.5


def test_the_learning_rate_schedule():
    optim = Optim(lr=1e-3, warmup_lr=1e-4, min_lr=1e-5, batch_size=512, epochs=10, warmup_epochs=2)
    assert optim.lr_at(0, 100) == pytest.approx(2e-4) and optim.lr_at(100, 100) == pytest.approx(2 * 5.5e-4)
    assert optim.lr_at(200, 100) == pytest.approx(2e-3) and optim.lr_at(1000, 100) == pytest.approx(2e-5)


def test_frozen_encoder_for_three_steps(digits, pretrained, tmp_path):
    """--model.freeze_encoder, --run.max_steps, --task.label_share, .balance, --data.repeats, fp16: three steps."""
    more = ["--init", pretrained / "fcmae.pt", "--model.freeze_encoder", "true", "--run.max_steps", "3"]
    more += ["--data.size", "32", "--task.head_init", "0"]  # a larger image than in pretraining
    more += [
        "--task.label_share",
        "0.5",
        "--task.balance",
        "1",
        "--data.repeats",
        "2",
        "--optim.precision",
        "fp16",
        "--augment.ema",
        "0.5",
    ]
    done = run("python", "finetune/main.py", *words(digits, tmp_path, "x", *more, epochs=5))
    assert has(done.stdout, "721 355")  # half of 1,442
    init, best = open_weights(pretrained / "fcmae.pt").weights, open_weights(tmp_path / "x/best.pt").weights
    assert all(torch.equal(best.encoder[name], tensor) for name, tensor in init.encoder.items())
    assert best.preprocessing.size == (32, 32) and init.preprocessing.size == (24, 24)
    assert 0 < best.head["head.fc.weight"].abs().max() < 0.02  # three steps from zero; a step is 4e-3 at most
    lines = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3] and summary(tmp_path / "x")["epoch"] == 1
    assert summary(tmp_path / "x")["config"]["task"]["label_share"] == 0.5


def test_early_stop_and_evaluation_interval(digits, tmp_path):
    """Without learning, accuracy never exceeds that of the first evaluation."""
    more = ["--init", "none", "--model.name", "convnextv2_atto", "--model.channels", "1", "--model.stem_stride", "1"]
    more += ["--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--optim.lr", "1e-30"]
    more += ["--run.eval_every", "2", "--run.patience", "2"]
    command = words(digits, tmp_path, "x", *more, epochs=20)
    done = run("python", "finetune/main.py", *command)
    assert has(done.stdout, "run.patience")
    lines = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_raw" in line] == [12, 24]  # six steps an epoch
    assert max(line["step"] for line in lines) == 24
    again = run("python", "finetune/main.py", *command)
    assert has(again.stdout, "resuming top-1") and "step 25" not in again.stdout
