"""Passes of the kernels on a CPU: cpu.cpp, compiled once for each machine, called through ctypes.

Functions take contiguous tensors of fp32 or bf16; parameters and results that are not per token are fp32.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from configs.log import say
from configs.machine import cpu_info
from models.kernels.depthwise import Geometry

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
    "-Wno-psabi",
]  # fmt: skip
TILES = (8, 7, 4, 2, 1)  # sides that cpu.cpp is compiled for; a visible patch is a tile
INSTEAD = "PyTorch operations are used, which take about twice as long"


class Place(ctypes.Structure):
    """`Geometry` in cpu.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "height", "width", "s", "n")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("slot", "patch")]


class Norm(ctypes.Structure):
    """`Norm` in cpu.cpp."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float)]
    _fields_ += [("normed", ctypes.c_void_p), ("rstd", ctypes.c_void_p)]


class Grn(ctypes.Structure):
    """`Grn` in cpu.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("images", "tokens", "D", "over_batch")]
    _fields_ += [("gamma", ctypes.c_void_p), ("eps", ctypes.c_float)]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None with a printed reason. The variable CXX names another compiler than c++."""
    compiler = os.environ.get("CXX", "c++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        say(f"no C++ compiler ({compiler}): {INSTEAD} (Debian, Ubuntu: apt-get install g++)")
        return None
    cpu = cpu_info("flags", "Features") or platform.processor()  # what -march=native depends on
    key = hashlib.sha256(SOURCE.read_bytes() + version + " ".join([cpu, *FLAGS]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "convnext-fcmae-kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # one rank compiles
            path = folder / f"{key}.so"
            if not path.exists():
                _compile(compiler, path)
    except OSError as error:
        say(f"{folder}: {error.strerror.lower()}, so the CPU kernels cannot be kept there: {INSTEAD}")
        return None
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip().splitlines()
        say(f"{compiler} cannot compile the CPU kernels ({message[0] if message else 'no message'}): {INSTEAD}")
        return None
    return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    say("compiling the CPU kernels, once for this machine (about 20 s)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, check=True)
        built.replace(path)


def convolve(x: Tensor, taps: Tensor, geometry: Geometry, out: Tensor, norm: dict | None = None) -> None:
    """Convolve rows x with taps [49, C] into `out`; with `norm` also bias, LayerNorm and the values for backward."""
    bias, after = None, None
    if norm:
        pointers = {name: norm[name].data_ptr() for name in ("normed", "rstd")}
        pointers |= {name: norm[f"norm_{name}"].data_ptr() for name in ("weight", "bias")}
        bias, after = norm["bias"], ctypes.byref(Norm(eps=norm["eps"], **pointers))
    _call("depthwise", x, _is_bf16(x), taps, bias, after, out, _is_bf16(out), *_place(geometry), x.shape[1])


def grad_norm(grad: Tensor, normed: Tensor, rstd: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's backward: gradients of the convolution's output, and of bias, norm weight and norm bias [3, C]."""
    rows, channels = normed.shape
    grad_conv = torch.empty_like(normed, dtype=torch.float32)
    partial = torch.empty(max(1, min(64, rows // 32)), 3, channels)
    size = rows, channels, len(partial)
    _call("layer_norm_backward", grad, normed, _is_bf16(normed), rstd, norm_weight, grad_conv, partial, *size)
    return grad_conv, partial.sum(0)


def grad_taps(x: Tensor, grad_conv: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the taps [49, C]."""
    channels = x.shape[1]
    partial = torch.empty(max(8, 3072 // channels), 49, channels)
    _call("depthwise_taps", x, _is_bf16(x), grad_conv, partial, len(partial), *_place(geometry), channels)
    return partial.sum(0)


def forward(h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """GRN(gelu(h)) of h [images, tokens, D]; norm G [images, D] and its mean M [images, 1], for backward."""
    out, norm, mean = torch.empty_like(h), torch.empty(len(h), h.shape[2]), torch.empty(len(h), 1)
    grn = ctypes.byref(Grn(*h.shape, over_batch, gamma.data_ptr(), eps))
    _call("gelu_grn_forward", grn, h, _is_bf16(h), beta, out, norm, mean)
    return out, norm, mean


def backward(
    grad: Tensor, h: Tensor, gamma: Tensor, norm: Tensor, mean: Tensor, over_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gamma and beta."""
    out, grad_gamma, grad_beta = torch.empty_like(h), torch.empty_like(gamma), torch.empty_like(gamma)
    sums, ratio = torch.empty(len(h), 2, h.shape[2]), torch.empty_like(norm)
    grn = ctypes.byref(Grn(*h.shape, over_batch, gamma.data_ptr()))
    _call("gelu_grn_backward", grn, h, grad, _is_bf16(h), norm, mean, sums, ratio, out, grad_gamma, grad_beta)
    return out, grad_gamma, grad_beta


def _place(g: Geometry) -> tuple:
    """Arguments that describe the geometry: where tokens are, and the side of a tile."""
    place = Place(*g[:5], *(tensor.data_ptr() if g.s else None for tensor in (g.slot, g.patch)))
    rows, columns = g.height, g.width
    side = g.s or min(TILES, key=lambda s: -(-rows // s) * s * -(-columns // s) * (s + 6))  # the least work
    return ctypes.byref(place), side


def _is_bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _call(name: str, *arguments) -> None:
    """Call a function of cpu.cpp: tensors become pointers, whole numbers int64; the number of threads is added."""

    def convert(value):
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_int64(value) if isinstance(value, int) else value

    getattr(library(), name)(*map(convert, arguments), ctypes.c_int64(torch.get_num_threads()))
