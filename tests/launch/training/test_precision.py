"""fp16 and bf16 in a real engine, in all ZeRO stages: gradients and clipping as in fp32, overflow skipped."""

import json

import pytest

from tests.conftest import ROOT, run

# five steps of a classifier, the third with an image that overflows; prints the optimizer's state after them
TRAIN = """
import json, sys, warnings

warnings.simplefilter("ignore")
sys.path[:0] = [sys.argv[1]]
import torch
from configs.schema import Encoder, Optim, Run
from launch.training.engine import Engine
from launch.training.parameter_groups import parameter_groups
from launch.training.precision import LossScale
from launch.training.world import init_world, destroy_world
from models.convnext import ConvNeXt


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = ConvNeXt(Encoder("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)), 4)

    def forward(self, image):
        logits = self.model(image)
        self.kind = str(logits.dtype)
        return torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(image)) % 4)


world = init_world(Run(device="cpu"))
LossScale.GROWTH = 2
image = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
found = {}
stage = int(sys.argv[2])
for kind in ("fp32", "bf16", "fp16"):
    model, optim = Loss(), Optim(batch_size=8, micro_batch=4, precision=kind, zero_stage=stage, clip_grad=1.0)
    engine = Engine(model, parameter_groups(model, optim), optim, world)
    engine.set_lr(1e-3)
    steps = []
    for number in range(5):
        for part in image.chunk(2):
            applied = engine.step(engine(part * (1e30 if number == 2 else 1)))
        states = engine.optimizer.state.values()
        moments = torch.cat([state["exp_avg"].flatten() for state in states]).norm()
        weights = float(sum(p.double().abs().sum() for p in model.parameters())) if stage < 3 else None
        about = {"weights": weights, "norm": engine.grad_norm, "moments": float(moments), "scale": engine.loss_scale}
        steps.append({"applied": applied} | about)
    found[kind] = {"dtype": model.kind, "steps": steps}
    engine.close()
if world.first:
    print(json.dumps(found))
destroy_world()
"""


@pytest.mark.parametrize(
    "stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_low_precision_learns_as_fp32_does(stage):
    found = json.loads(run("python", "-c", TRAIN, ROOT, stage).stdout.splitlines()[-1])
    assert {kind: about["dtype"] for kind, about in found.items()} == {
        "fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16",
    }  # fmt: skip
    for kind, tolerance in (("bf16", 0.05), ("fp16", 0.005)):
        for exact, low in zip(found["fp32"]["steps"], found[kind]["steps"], strict=True):
            assert low["applied"] == exact["applied"]
            if exact["applied"]:
                assert low["norm"] == pytest.approx(exact["norm"], rel=tolerance) and exact["norm"] > 1  # clipped
            assert low["moments"] == pytest.approx(exact["moments"], rel=tolerance)
    for about in found.values():
        assert [step["applied"] for step in about["steps"]] == [True, True, False, True, True]
        if stage < 3:  # with ZeRO 3 no rank has all weights
            before, skipped, after = (about["steps"][i]["weights"] for i in (1, 2, 3))
            assert before == skipped != after
    assert [step["scale"] / 2**16 for step in found["fp16"]["steps"]] == [1, 2, 1, 1, 2]
    assert [step["scale"] for step in found["bf16"]["steps"]] == [None] * 5
