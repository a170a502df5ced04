"""Muon in a real engine: updates are those of plain torch optimizers, with and without ZeRO, on one and two ranks."""

import io
import os
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.schema import Encoder, Optim
from finetune.layer_decay import layer_decay
from launch.training.engine import Engine
from launch.training.muon import MuonAdamW, owners
from launch.training.parameter_groups import parameter_groups
from launch.training.precision import LossScale
from launch.training.world import World
from models.convnext import ConvNeXt, Mlp
from models.fcmae import FCMAE
from models.lejepa import LeJEPA
from tests.models.helpers import tiny
from tests.processes import on_ranks

CPU = torch.device("cpu")
ARCH = Encoder("convnextv2_atto", 3, 2, (1, 1, 2, 1), (8, 16, 16, 24))
RATES = (1e-2, 2e-2, 3e-2, 3e-2, 1e-2)
OVERFLOW = 2  # the step whose images have infinite gradients
RULES = {"stem.*": 0.2, "*.fc1.weight": 0.3}
COMMON = {"name": "muon", "batch_size": 8, "micro_batch": 4, "clip_grad": 0.1, "decay_rules": RULES}


class Loss(torch.nn.Module):
    """A classifier's loss on images of classes 0 to 3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = ConvNeXt(ARCH, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(image).float(), torch.arange(len(image)) % 4)


def batches() -> list[torch.Tensor]:
    """The global batch of each step."""
    random = torch.Generator().manual_seed(0)
    images = [torch.randn(8, 3, 16, 16, generator=random) for _ in RATES]
    images[OVERFLOW][0] = torch.inf
    return images


def grouped(model: Loss, optim: Optim) -> list[dict]:
    decay = layer_decay(0.5, ARCH.depths, "single")
    return parameter_groups(model.model, optim, decay)


def plain(optim: Optim) -> dict[str, torch.Tensor]:
    """Weights after a loop of torch.optim.Muon and torch.optim.AdamW on a model without any wrapper.

    The gradient is the mean over two halves of the batch, which is exact, as they have the same size.
    """
    model = Loss()
    matrices = {f"{name}.{layer}.weight" for name, module in model.model.named_modules() if isinstance(module, Mlp)
                for layer in ("fc1", "fc2")}  # fmt: skip
    matrices |= {f"stages.{stage}.downsample.1.weight" for stage in (1, 2, 3)}
    name_of = {parameter: name for name, parameter in model.model.named_parameters()}
    own, twins = {"muon": [], "adamw": []}, {}
    for group in grouped(model, optim):
        for p in group["params"]:
            kind = "muon" if name_of[p] in matrices else "adamw"
            twins[p] = torch.nn.Parameter(p.detach().clone().flatten(1) if kind == "muon" else p.detach().clone())
            own[kind].append({"params": [twins[p]], "weight_decay": group["weight_decay"], "scale": group["lr_scale"]})
    options = {"lr": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.Muon(own["muon"], **options)]
    optimizers += [torch.optim.AdamW(own["adamw"], lr=0.0, betas=optim.betas, fused=True)]
    for image, rate in zip(batches(), RATES, strict=True):
        for half in image.chunk(2):
            (model(half) / 2).backward()
        grads = [p.grad for p in twins]
        norm = torch.nn.utils.get_total_norm(grads)
        if torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(list(twins), optim.clip_grad, norm)
            for parameter, twin in twins.items():
                twin.grad = parameter.grad.reshape(twin.shape)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                optimizer.step()
            with torch.no_grad():
                for parameter, twin in twins.items():
                    parameter.copy_(twin.view_as(parameter))
        model.zero_grad()
    return model.model.state_dict()


def plain_updates(rank: int, ranks: int) -> bytes:
    """Weights of `plain`, serialised: in a process as new as those of `updates`, so that products round alike."""
    file = io.BytesIO()
    torch.save(plain(Optim(**COMMON)), file)
    return file.getvalue()


def make(rank: int, ranks: int, optim: Optim) -> Engine:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    model = Loss()
    return Engine(model, grouped(model, optim), optim, World(rank, ranks, CPU))


def train(engine: Engine, rank: int, ranks: int, steps: range) -> list[bool]:
    """Train for some of the steps; whether each was applied."""
    found = []
    for number in steps:
        engine.set_lr(RATES[number])
        parts = batches()[number].chunk(2)[rank::ranks]
        found.append([engine.step(engine(part)) for part in parts][-1])
    return found


def whole_state(engine: Engine, rank: int) -> dict | None:
    """The state of all ranks, on the first one."""
    engine.optimizer.gather_state()
    return engine.optimizer.state_dict()["state"] if rank == 0 else None


def updates(rank: int, ranks: int, folder: Path) -> bytes:
    """In a rank: weights for both ZeRO stages, trained at once and with a checkpoint in the middle; serialised."""
    found = {}
    for stage in (0, 1):
        optim = Optim(**COMMON, zero_stage=stage)
        first, second = make(rank, ranks, optim), make(rank, ranks, optim)
        assert train(first, rank, ranks, range(4)) == [True, True, False, True]
        first.save(folder / f"{ranks}-{stage}", "engine", {"step": 4})
        torch.distributed.barrier()
        train(first, rank, ranks, range(4, 5))
        found[stage, "whole"] = first.model.model.state_dict()
        assert second.load(folder / f"{ranks}-{stage}", "engine") == {"step": 4}
        train(second, rank, ranks, range(4, 5))
        found[stage, "resumed"] = second.model.model.state_dict()
        own = sum(x.numel() for state in second.optimizer.state.values() for x in state.values() if x.ndim)
        found[stage, "elements"] = own
        moved = folder / f"2-{stage}"  # of two ranks, which come first
        third = make(rank, ranks, optim)
        third.load(moved, "engine")
        found[stage, "state"] = whole_state(third, rank)
        for engine in (first, second, third):
            engine.close()
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, list[dict]]:
    """What `updates` returns, of each rank, by the number of ranks."""
    folder = tmp_path_factory.mktemp("muon")
    found = {ranks: on_ranks(ranks, updates, folder, ranks, folder) for ranks in (2, 1)}
    return {ranks: [torch.load(io.BytesIO(each)) for each in parts] for ranks, parts in found.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_are_those_of_plain_optimizers(ranks, trained, tmp_path):
    """Bitwise, after five steps with other learning rates and clipped gradients, one of them skipped."""
    (expected,) = (torch.load(io.BytesIO(each)) for each in on_ranks(1, plain_updates, tmp_path, 1))
    assert not same(expected, Loss().model.state_dict())
    for found in trained[ranks]:
        assert same(found[0, "whole"], expected) and same(found[1, "whole"], expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_same(ranks, trained):
    for found in trained[ranks]:
        assert same(found[0, "resumed"], found[0, "whole"]) and same(found[1, "resumed"], found[0, "whole"])


def test_one_rank_loads_what_two_have_saved(trained):
    for stage in (0, 1):
        two, one = trained[2][0][stage, "state"], trained[1][0][stage, "state"]
        assert two.keys() == one.keys() and all(same(state, one[i]) for i, state in two.items())
        assert all(state for state in one.values())


def test_ranks_share_the_state(trained):
    """Each has its part with ZeRO 1, and what the estimate says."""
    groups = grouped(Loss(), Optim(**COMMON))
    whole = sum(p.numel() * (1 if g["optimizer"] == "muon" else 2) for g in groups for p in g["params"])
    assert trained[1][0][1, "elements"] == trained[2][0][0, "elements"] == whole
    parts = [found[1, "elements"] for found in trained[2]]
    assert sum(parts) == whole and max(parts) < 0.55 * whole


def test_owners_balance_and_do_not_depend_on_the_rank():
    model = FCMAE(*tiny())
    groups = parameter_groups(model, Optim(name="muon"))
    owner = owners(groups, 3)
    assert set(owner) == set(model.parameters()) and set(owner.values()) == {0, 1, 2}
    assert owners(groups, 3) == owner and set(owners(groups, 1).values()) == {0}


def test_which_parameters_get_muon():
    model = FCMAE(*tiny())
    kind = {p: group["optimizer"] for group in parameter_groups(model, Optim(name="muon")) for p in group["params"]}
    muon = {name for name, parameter in model.named_parameters() if kind[parameter] == "muon"}
    assert {"decoder.0.mlp.fc1.weight", "encoder.stages.1.downsample.1.weight"} < muon
    others = {"pred.weight", "proj.weight", "mask_token", "encoder.stem.0.weight"}
    others |= {"encoder.stages.0.blocks.0.conv_dw.weight", "encoder.stages.0.blocks.0.mlp.grn.weight"}
    assert not muon & others and others < {name for name, _ in model.named_parameters()}
    assert len(muon) == 2 * 6 + 3  # five blocks of the encoder and one of the decoder, three downsamplings


def test_hidden_layers_of_a_projector_get_muon():
    model = LeJEPA(*tiny(), views=2, width=8, dim=4, weight=0.05, pixel_weight=1)
    groups = parameter_groups(model, Optim(name="muon"))
    muon = {p for group in groups if group["optimizer"] == "muon" for p in group["params"]}
    layers = [layer for layer in model.projector if isinstance(layer, torch.nn.Linear)]
    assert [layer.weight in muon for layer in layers] == [True, True, False]  # the last one has the embeddings


def test_what_is_refused():
    for stage in (2, 3):
        with pytest.raises(UserError, match=rf"optim\.zero_stage is {stage}: .*0 or 1.*muon"):
            Optim(name="muon", zero_stage=stage)
    model = ConvNeXt(ARCH, 4)
    for parameter in model.stages.parameters():
        parameter.requires_grad = False
    with pytest.raises(UserError, match=r"optim\.name is muon.*adamw"):
        parameter_groups(model, Optim(name="muon"))


def test_part_of_a_state_is_not_saved_as_the_whole():
    optimizer = MuonAdamW(grouped(Loss(), Optim(**COMMON)), (0.9, 0.95), 0, 2)
    with pytest.raises(RuntimeError, match="gather_state"):
        optimizer.state_dict()


def scaled(rank: int) -> list:
    """In a rank: fp16 steps with loss scaling, one of which overflows."""
    found = []
    for stage in (0, 1):
        LossScale.GROWTH = 2
        engine = make(rank, 1, Optim(**COMMON, zero_stage=stage, precision="fp16"))
        before = engine.loss_scale
        found.append([train(engine, 0, 1, range(5)), engine.loss_scale != before, engine.grad_norm])
        engine.close()
    return found


def test_loss_scaling(trained, tmp_path):
    [(zero, one)] = on_ranks(1, scaled, tmp_path)
    assert zero == one and zero[0][OVERFLOW] is False and zero[1] and 0 < zero[2] < 100
