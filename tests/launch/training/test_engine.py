"""Start-up, parameter groups, precision, errors by rank."""

import pytest
import torch

from configs.errors import UserError, run_main
from configs.schema import Optim
from launch.training.parameter_groups import parameter_groups
from launch.training.precision import precision
from models.fcmae import FCMAE
from tests.conftest import ROOT, run
from tests.models.helpers import tiny

START = """
import sys

sys.path[:0] = [sys.argv[1]]
import torch
from configs.schema import Optim, Run
from launch.training.engine import Engine
from launch.training.parameter_groups import parameter_groups
from launch.training.world import destroy_world, init_world

world = init_world(Run(device="cpu"))
model, optim = torch.nn.Linear(1, 1), Optim(batch_size=1)
engine = Engine(model, parameter_groups(model, optim), optim, world)
engine.step(engine(torch.ones(1, 1)).sum())
print("inductor imported:", "torch._inductor.compile_fx" in sys.modules)
destroy_world()
"""


def test_start_up_imports_no_compiler():
    """It takes more than a second, and nothing is compiled."""
    assert "inductor imported: False" in run("python", "-c", START, ROOT).stdout


def test_the_mask_token_grn_and_biases_have_no_decay():
    model = FCMAE(*tiny())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Optim())
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = name == "mask_token" or "grn" in name or name.endswith("bias") or "norm" in name
            free = free or name.endswith(("stem.1.weight", "downsample.0.weight"))
            assert (group["weight_decay"] == 0) == free, name


def test_decay_rules():
    model = FCMAE(*tiny())
    rules = {"encoder.*": 0.2, "*.grn.*": 0.01, "encoder.stem.*": 0}
    groups = parameter_groups(model, Optim(decay_rules=rules), lambda name: 0.5 if "decoder" in name else 1.0)
    found = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    decay = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(decay)
    assert decay["encoder.stem.0.weight"] == (0, 1) and decay["encoder.stages.0.blocks.0.norm.bias"] == (0.2, 1)
    assert (
        decay["encoder.stages.1.blocks.0.mlp.grn.weight"]
        == decay["encoder.stages.0.blocks.0.mlp.grn.bias"]
        == (0.01, 1)
    )
    assert decay["pred.weight"] == (0.05, 1) and decay["decoder.0.mlp.fc1.bias"] == (0, 0.5)
    with pytest.raises(UserError, match=r"stages\.9\.\* .*--dry-run"):
        parameter_groups(model, Optim(decay_rules={"stages.9.*": 1}))


def test_frozen_parameters_are_in_no_group():
    model = FCMAE(*tiny())
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, Optim())
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("encoder.")}


def test_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert precision(Optim(), cpu) == "fp32"
    assert precision(Optim(precision="bf16"), cpu) == "bf16"
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert precision(Optim(), cuda) == expected
    with pytest.raises(UserError, match="no bf16"):
        precision(Optim(precision="bf16"), cuda)


@pytest.mark.parametrize(("rank", "says"), [("0", "error: x"), ("1", "error: [rank 1] x")])
def test_an_error_of_one_rank_names_it(rank, says, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("configs.errors.LAUNCHER_SECONDS", 0)

    def fail():
        raise UserError("x")

    with pytest.raises(SystemExit) as stop:
        run_main(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == says
