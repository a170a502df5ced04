"""The kernels compile for GPUs (without one): the compiler is stricter than the interpreter."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.kernels import triton_depthwise as depthwise
from models.kernels import triton_gelu_grn as gelu_grn
from models.kernels.depthwise import Geometry

capability, channels, s = map(int, sys.argv[1:])
target = GPUTarget("cuda", capability, 32)


def build(kernel, pointers, constants, warps):
    types = {name: pointers.get(name, "fp32" if name == "eps" else "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    assert triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


width, warps = depthwise._block(channels)
place = Geometry(2, 7 * (s or 8), 7 * (s or 8), s, 19 if s else 0, None, None)
strip, _ = depthwise.strips_of(place, channels)
where = {"S": strip, "DENSE": not s}
names = ("x", "weight", "bias", "norm_weight", "norm_bias", "rstd", "partial")
floats = dict.fromkeys(names, "*fp32") | dict.fromkeys(("out", "normed", "grad_conv", "grad", "h"), "*bf16")
floats |= {"slot": "*i32", "patch": "*i32"}
per = max(1, min(8 // strip, 2048 // width))
for norm in (True, False):
    build(depthwise._forward, floats, where | {"NORM": norm, "PER": per, "CB": width}, warps)
build(depthwise._weight_backward, floats, where | {"CB": min(128, width)}, 1)
build(depthwise._norm_backward, floats, {"CHUNK": 16, "R": 1, "CB": width}, 4)
floats |= dict.fromkeys(("scale", "beta", "ratio"), "*fp32")
for kernel in (gelu_grn._sum_squares, gelu_grn._apply, gelu_grn._sum_products, gelu_grn._gradient):
    constants = {"R": gelu_grn.ROWS, "CB": gelu_grn.COLUMNS}
    build(kernel, floats, constants | ({"CHUNK": gelu_grn.CHUNK} if "CHUNK" in kernel.arg_names else {}), 4)
"""
STAGES = [(96, 8), (192, 4), (384, 2), (768, 1), (96, 0), (768, 0)]  # tiny, packed and dense
WIDEST = [(352, 8), (704, 4), (1408, 2), (2816, 1), (2816, 0), (40, 8), (320, 1)]  # huge; atto's ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "channels", "s"),
    [(90, *stage) for stage in STAGES + WIDEST] + [(capability, 96, 8) for capability in (80, 100)],
)
def test_compiles(capability, channels, s, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(capability), str(channels), str(s)],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
