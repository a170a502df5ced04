"""`--dry-run`: numbers computed by hand, memory compared with a real engine, both commands."""

import json
import weakref
from collections.abc import Callable

import pytest
import torch

from configs.errors import UserError
from configs.schema import Augment, Data, Encoder, FCMAESettings, Finetune, Optim, Pretrain, PretrainModel, Run
from finetune.layer_decay import layer_decay
from launch.training.dry_run import plan, schedule
from launch.training.memory import (
    MEASURED_BATCHES,
    RECOMPUTED,
    group_bytes,
    measure_activations,
    saved_bytes,
    state_bytes,
)
from launch.training.parameter_groups import parameter_groups
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from pretrain.objectives.fcmae import Objective
from tests.conftest import QUICK, ROOT, TINY, has, run
from tests.models.helpers import tiny

# measures the tensors of engines around a real model, after a step and after the first of two micro batches
COUNT = """
import gc, json, sys, warnings

warnings.simplefilter("ignore")
sys.path[:0] = [sys.argv[1]]
import torch
from configs.schema import FCMAESettings, Optim, PretrainModel, Run
from launch.training.engine import Engine, bucket_size
from launch.training.parameter_groups import parameter_groups
from launch.training.world import init_world, destroy_world
from models.fcmae import FCMAE


def tensor_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type != "meta"]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def train(engine):
    image, visible = torch.rand(1, 3, 64, 64), torch.tensor([[[True, False], [False, False]]])
    engine.step(engine(image, visible))


world = init_world(Run(device="cpu"))
gc.freeze()  # excludes present objects from searches
counts = {}
for stage in json.loads(sys.argv[2]):
    before = tensor_bytes()
    model = FCMAE(PretrainModel("convnextv2_atto", depths=(1, 1, 1, 1)), FCMAESettings())
    optim = Optim(name=sys.argv[3], batch_size=2 * world.ranks, micro_batch=1, zero_stage=stage)
    groups = parameter_groups(model, optim)
    parameters = sum(p.numel() for p in model.parameters())  # before ZeRO 3 partitions them
    engine = Engine(model, groups, optim, world)
    for _ in range(2):
        train(engine)
    step = tensor_bytes() - before
    train(engine)
    counts[stage] = {"step": step, "micro": tensor_bytes() - before, "bucket": bucket_size(parameters)}
    engine.close()
    del engine, model, groups
if world.first:
    print(json.dumps(counts))
destroy_world()
"""


def pretraining(model: PretrainModel | None = None, size: int = 32, **optim) -> tuple[Pretrain, FCMAE]:
    own, settings = (model, FCMAESettings()) if model else tiny()
    data, run = Data(size=size), Run(name="x", device="cpu")
    config = Pretrain(data=data, model=own, objective=settings, optim=Optim(**optim), run=run)
    return config, FCMAE(own, settings)


def measured(model: FCMAE, micro: int, low: bool = False) -> int:
    return measure_activations(model, [inputs(model, count) for count in MEASURED_BATCHES], low).bytes(micro)


def inputs(model: FCMAE, count: int, size: int = 32) -> tuple[torch.Tensor, ...]:
    """Noise images and masks: the arguments of the autoencoder."""
    objective = Objective(Pretrain(data=Data(size=size), model=model.config))
    image = torch.rand(count, model.config.channels, size, size)
    return objective.inputs(image, objective.example(count))


def noise(model: FCMAE) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """`inputs` as an argument of `plan`."""
    return lambda image: inputs(model, len(image))


def table(text: str, title: str) -> list[list[str]]:
    """Words of the lines of a table in the plan, header first."""
    lines = f"\n{text}".split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in lines]


def test_schedule():
    """45,000 images in batches of 512 are 87 steps, 456 images remain; lr 1.5e-4 x 2; warm-up 10 x 87."""
    optim = Optim(lr=1.5e-4, batch_size=512, micro_batch=4, epochs=200, warmup_epochs=10, min_lr=1e-6)
    assert schedule(optim, 45_000, 16) == [
        "batch   micro batch 4 x accumulation 8 x 16 ranks = 512",
        "lr      0.00015 x 512 / 256 = 0.0003 after warm-up, 2e-06 at the end",
        "images  45,000; each epoch drops 456, chosen anew",
        "steps   87 per epoch x 200 epochs = 17,400; the first 870 are warm-up",
    ]
    images = schedule(optim, 45_000, 16, repeats=4)[2]  # 87 x 512 / 4
    assert images == "images  45,000; each epoch has 4 crops of 11,136, chosen anew"


def test_warm_up_of_part_of_an_epoch_and_longer_than_the_run():
    assert schedule(Optim(batch_size=10, epochs=4, warmup_epochs=0.25), 100, 1)[-1].endswith(
        "the first 3 are warm-up"
    )  # 2.5
    assert schedule(Optim(batch_size=10, epochs=1, warmup_epochs=2), 100, 1)[-1] == (
        "steps   10 per epoch x 1 epoch = 10; the first 10 are warm-up"
    )


@pytest.mark.parametrize(
    ("optim", "ranks", "says"),
    [
        ({"batch_size": 64, "micro_batch": 7}, 3, r"optim\.batch_size 64 "),
        ({"batch_size": 64}, 65, r"optim\.batch_size 64 .*65 ranks"),
        ({"batch_size": 101}, 101, r"100 images .*101 ranks"),
    ],
)
def test_impossible_batches(optim, ranks, says):
    config, model = pretraining(**optim)
    with pytest.raises(UserError, match=says):
        plan(config, model, parameter_groups(model, Optim()), 100, ranks)


def test_frozen_parameters_are_shown_as_such():
    config, model = pretraining(batch_size=64)
    model.encoder.requires_grad_(False)
    text = plan(config, model, parameter_groups(model, config.optim), 100, 1, noise(model), every=True)
    _, *rows = table(text, "parameters")
    assert {"frozen" in row for row in rows if row[-1].startswith("encoder.")} == {True}
    assert not any("frozen" in row for row in rows if not row[-1].startswith("encoder."))


def test_plan_of_a_pretraining():
    config, model = pretraining(batch_size=64, micro_batch=8, zero_stage=2, weight_decay=0.1)
    text = plan(config, model, parameter_groups(model, Optim(weight_decay=0.1)), 100, 4, noise(model))
    parameters = sum(p.numel() for p in model.parameters())
    flat = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert has(text, "4 ranks nothing started written")
    assert "convnextv2_atto, 0.1M parameters, images of 32x32" in text
    _, *groups = table(text, "parameter groups")
    assert [[f"{flat:,}", "AdamW", "0"], [f"{parameters - flat:,}", "AdamW", "0.1"]] == [row[1:4] for row in groups]
    assert groups[0][-2:] == ["mask_token,", "pred.bias"]
    assert "\nparameters\n" not in text and has(text, f"--parameters {len(list(model.parameters()))} parameters")
    text = plan(config, model, parameter_groups(model, Optim(weight_decay=0.1)), 100, 4, noise(model), every=True)
    header, *rows = table(text, "parameters")
    assert header == ["shape", "optimizer", "decay", "lr", "scale", "lr", "parameter"]
    assert len(rows) == len(list(model.parameters()))
    decay = {row[-1]: row[-4] for row in rows}
    assert decay["pred.weight"] == "0.1" and decay["mask_token"] == decay["pred.bias"] == "0"
    header, *rows = table(text, "memory per rank, GiB")
    assert header == ["ZeRO", "weights", "gradients", "master", "AdamW", "buffers", "activations", "sum"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"] and ["this" in row for row in rows] == [
        False,
        False,
        True,
        False,
    ]
    assert all(len(line) <= 120 for line in text.splitlines()) and "\x1b" not in text


def test_plan_of_fewer_images_than_a_batch_and_of_an_automatic_micro_batch(capsys):
    config, model = pretraining(batch_size=512, micro_batch="auto")
    text = plan(config, model, parameter_groups(model, Optim()), 265, 4, noise(model))
    assert has(capsys.readouterr().out, "265 optim.batch_size 512 using 264")
    assert "micro batch 66 x accumulation 1 x 4 ranks = 264" in text and "each epoch drops 1," in text
    free = next(line for line in text.splitlines() if line.startswith("free"))
    assert float(free.split()[1]) > 0 and has(free, "CPU micro batches of 66")


def test_plan_of_a_finetuning_with_layer_decay_and_ema():
    """Depths (1, 1, 2, 1) are five layers below the head's; the stem has the first block's scale."""
    arch = Encoder("convnextv2_atto", 3, 1, (1, 1, 2, 1), (8, 16, 32, 64))
    optim = Optim(lr=1e-3, batch_size=64)
    config = Finetune(data=Data(size=32), optim=optim, augment=Augment(ema=0.9), run=Run(name="x", device="cpu"))
    model = ConvNeXt(arch, classes=10)
    groups = parameter_groups(model, Optim(), layer_decay(0.8, arch.depths, "single"))
    text = plan(config, model, groups, 100, 1)
    rows = table(text, "parameter groups")[1:]
    assert sorted({float(row[4]) for row in rows}) == pytest.approx([0.8**k for k in (5, 4, 3, 2, 1, 0)], rel=1e-3)
    assert [rows[0][i] for i in (0, 3, 4, 5, 6)] == ["4", "0.05", "0.3277", "8.19e-05", "stem.0.weight,"]
    assert rows[-1] == ["1", "640", "AdamW", "0.05", "1", "2.50e-04", "head.fc.weight"]  # one tensor, one name
    assert "EMA" in table(text, "memory per rank, GiB")[0]


def test_memory_of_the_stages_by_hand():
    """1,000 and 10 parameters on 4 ranks: parts of 250 and, padded to an even number, 4."""
    found = [{name: count / 4 for name, count in state_bytes([1000, 10], 4, stage).items()} for stage in range(4)]
    keys = ["weights", "gradients", "master", "AdamW", "buffers"]
    assert [[each[key] for key in keys] for each in found] == [
        [1010, 1010, 0, 2020, 1010],
        [1016, 1010, 254, 508, 1010],
        [1016, 254, 254, 508, 2020],
        [254, 254, 254, 508, 3030],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_a_higher_stage_divides_more(ranks):
    stages = [state_bytes([128 * 10**6, 128], ranks, stage) for stage in range(4)]
    for name, first in (("AdamW", 1), ("gradients", 2), ("weights", 3)):
        whole = stages[0][name]
        assert [each[name] for each in stages] == [whole] * first + [whole // ranks] * (4 - first)


def test_plan_with_muon():
    """The table of groups names the optimizer; Muon's state is once the matrices, and whole parameters on each rank."""
    config, model = pretraining(batch_size=64, name="muon")
    groups = parameter_groups(model, config.optim)
    text = plan(config, model, groups, 100, 4, noise(model), every=True)
    sizes = {"Muon": 0, "AdamW": 0}
    for row in table(text, "parameter groups")[1:]:
        sizes[row[2]] += int(row[1].replace(",", ""))
    kinds = {row[-1]: row[1] for row in table(text, "parameters")[1:]}
    assert kinds["decoder.0.mlp.fc1.weight"] == "Muon" and kinds["pred.weight"] == kinds["mask_token"] == "AdamW"
    header, *rows = table(text, "memory per rank, GiB")
    assert header == ["ZeRO", "weights", "gradients", "optimizer", "buffers", "activations", "sum"]
    assert [row[0] for row in rows] == ["0", "1"] and "this" in rows[1]
    whole = sizes["Muon"] + 2 * sizes["AdamW"]
    assert group_bytes(groups, 1, 1)["optimizer"] == group_bytes(groups, 4, 0)["optimizer"] == 4 * whole
    largest = max(p.numel() for p in model.parameters())
    assert whole <= group_bytes(groups, 4, 1)["optimizer"] <= whole + 4 * 2 * largest


@pytest.mark.parametrize(
    ("name", "ranks", "stages"),
    [("adamw", 1, [0, 1]), ("adamw", 2, [0, 1, 2, 3]), pytest.param("muon", 2, [0, 1], marks=pytest.mark.slow)],
)
def test_memory_as_counted_in_an_engine(name, ranks, stages, tmp_path):
    """Tensors of a real engine with five million parameters, between two steps and between two micro batches."""
    (tmp_path / "count.py").write_text(COUNT)
    launcher = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    done = run(*launcher, tmp_path / "count.py", ROOT, json.dumps(stages), name)
    counted = json.loads(done.stdout.splitlines()[-1])
    model = FCMAE(PretrainModel("convnextv2_atto", depths=(1, 1, 1, 1)), FCMAESettings())
    groups = parameter_groups(model, Optim(name=name))
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    for stage in stages:
        count, expected = counted[str(stage)], group_bytes(groups, ranks, stage)
        assert count["bucket"] == sum(sizes)
        between_steps = sum(expected.get(part, 0) for part in ("weights", "master", "AdamW", "optimizer"))
        if stage == 3:  # gradients and bucket stay; small parameters are whole on each rank
            assert count["step"] == pytest.approx(between_steps + expected["gradients"] + 4 * sum(sizes), rel=0.02)
            assert count["micro"] == count["step"]
            continue
        assert count["step"] == pytest.approx(between_steps, rel=1e-3)
        gradients = expected["gradients"] + (
            expected["buffers"] if stage == 1 and name == "adamw" else 0
        )  # stage 2 has the bucket in a pass only
        # of a parameter that lies on two ranks, both have the whole gradient
        assert count["micro"] - count["step"] == pytest.approx(gradients, rel=0.35 if stage == 2 else 1e-3)


def test_activations_are_linear_in_the_micro_batch():
    model = FCMAE(*tiny())
    for low in (False, True):
        assert measured(model, 16, low) == pytest.approx(saved_bytes(model, inputs(model, 16), low)[0], rel=1e-3)
    few, some, many = (measured(model, count) for count in (10, 20, 30))
    assert many - some == pytest.approx(some - few, rel=1e-3) and few < some
    assert measured(model, 64, low=True) < measured(model, 64)


def test_recomputing_keeps_less_but_what_is_recomputed_at_once():
    plain, kept, stored = FCMAE(*tiny()), {}, {}
    for mode in ("none", *RECOMPUTED):
        model = FCMAE(*tiny(recompute=mode))
        stored[mode], _ = saved_bytes(model, inputs(model, 4), False)
        kept[mode] = measured(model, 4)
        assert model.encoder.recompute == mode
    assert kept["block"] < kept["mlp"] < kept["none"] == stored["none"] and stored["block"] < stored["mlp"]
    for mode, piece in RECOMPUTED.items():  # the first stage has most tokens
        first = [module for module in plain.encoder.stages[0].modules() if isinstance(module, piece)]
        assert kept[mode] - stored[mode] == saved_bytes(plain, inputs(plain, 4), False, first)[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["none", "mlp", "block"])
def test_activations_as_a_gpu_allocates_them(mode):
    _, model = pretraining(PretrainModel("convnextv2_atto", recompute=mode), size=224)
    model.cuda()
    probes = [inputs(model, count, 224) for count in (*MEASURED_BATCHES, 32)]
    batch = [tensor.cuda() for tensor in probes.pop()]
    with torch.autocast("cuda", torch.bfloat16):
        model(*batch)  # kernels are compiled
        before = torch.cuda.memory_allocated()
        loss = model(*batch)
    stored, _ = saved_bytes(model, batch, True)
    assert torch.cuda.memory_allocated() - before == pytest.approx(stored, rel=0.1) and loss.isfinite()
    assert stored <= measure_activations(model, probes, True).bytes(32)


def test_counts_what_autograd_keeps():
    """A linear layer saves its input, [4, 5] fp32, and GELU its own, [4, 6]; parameters and duplicates do not count."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.Identity())
    assert saved_bytes(model, [torch.rand(4, 5)], False) == (4 * (4 * 5 + 4 * 6), 0)
    assert saved_bytes(model, [torch.rand(4, 5)], False, [model[1], model[2]])[1] == 4 * 4 * 6


def test_a_measurement_leaves_nothing_behind():
    """A sigmoid saves its own output: a reference cycle, if it were kept as it is."""
    model, outputs = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Sigmoid()), []
    model[1].register_forward_hook(lambda _, inputs, output: outputs.append(weakref.ref(output)))
    assert saved_bytes(model, [torch.rand(4, 5)], False)[0] > 0
    assert outputs[0]() is None


def words(digits, folder, *more):
    return ["--data.path", digits, "--run.folder", folder, "--run.name", "x", *QUICK, *more]


def test_dry_run_of_a_pretraining(digits, tmp_path):
    """1,442 digits in batches of 240 are 6 steps, 2 images remain."""
    arguments = words(digits, tmp_path, "--dry-run", "4", "--optim.micro_batch", "20", *TINY)
    done = run("python", "pretrain/main.py", *arguments)
    assert "micro batch 20 x accumulation 3 x 4 ranks = 240" in done.stdout
    assert "images  1,442; each epoch drops 2," in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_finetuning_on_this_machine(digits, tmp_path):
    shape = ["--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--layer_decay", "0.8"]
    done = run("python", "finetune/main.py", "--dry-run", *words(digits, tmp_path, *shape))
    ranks = torch.cuda.device_count() or 1
    assert f" x {ranks} rank" in done.stdout and "0.4096" in done.stdout  # .8 ** 4, of the stem
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_batch_that_does_not_divide(digits, tmp_path):
    done = run("python", "pretrain/main.py", *words(digits, tmp_path, "--dry-run", "7", *TINY), code=2)
    assert done.stderr.startswith("error: optim.batch_size 240 ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
