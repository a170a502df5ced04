"""Passes of the kernels on a CPU: cpu.cpp, compiled once for this machine and called through ctypes."""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from models.kernels.depthwise import Geometry

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -Wno-psabi "
    "-fopenmp -fPIC -shared"
).split()
SIDES = (8, 7, 4, 2, 1)  # of tiles; a packed patch is a tile
CHUNK_ROWS = 256


class Grid(ctypes.Structure):
    """`Geometry` in cpu.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "height", "width", "s", "n")]
    _fields_ += [("slot", ctypes.c_void_p), ("patch", ctypes.c_void_p)]


class Norm(ctypes.Structure):
    """`Norm` in cpu.cpp."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float)]
    _fields_ += [("normed", ctypes.c_void_p), ("rstd", ctypes.c_void_p)]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, said on stderr, without a C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        print(f"no C++ compiler ({compiler}): the CPU kernels are off", file=sys.stderr)
        return None
    key = hashlib.sha256(SOURCE.read_bytes() + version + _cpu() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fcmae"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{key}.so"
    with FileLock(folder / "lock"):
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
                done = subprocess.run([compiler, *FLAGS, SOURCE, "-o", file.name], capture_output=True, text=True)
            if done.returncode:
                print(f"{compiler} cannot compile the CPU kernels: they are off", done.stderr, file=sys.stderr)
                return None
            os.replace(file.name, path)
    return ctypes.CDLL(path)


def _cpu() -> bytes:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return (flags[0] if flags else platform.processor()).encode()


def convolve(x: Tensor, taps: Tensor, geometry: Geometry, out: Tensor, norm: dict | None = None) -> None:
    """Convolve rows x with taps [49, C] into `out`; with `norm` also bias, LayerNorm and the values for backward."""
    saved, bias = None, None
    if norm:
        saved, bias = Norm(*(_pointer(norm[name]) for name in ("norm_weight", "norm_bias")), norm["eps"],
                     *(_pointer(norm[name]) for name in ("normed", "rstd"))), norm["bias"]
    _call("depthwise", x, _is_bf16(x), taps, bias, saved and ctypes.byref(saved), out, _is_bf16(out),
          *_place(geometry), x.shape[1])


def grad_norm(grad: Tensor, normed: Tensor, rstd: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's backward: gradients of the convolution's output (fp32), and of bias, norm weight and norm bias [3, C]."""
    rows, channels = normed.shape
    chunks = max(1, min(64, rows // 32))
    grad_conv = torch.empty_like(normed, dtype=torch.float32)
    partial = torch.empty(chunks, 3, channels)
    _call("layer_norm_backward", grad, normed, _is_bf16(normed), rstd, norm_weight, grad_conv, partial, rows, channels, chunks)
    return grad_conv, partial.sum(0)


def grad_taps(x: Tensor, grad_conv: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the taps [49, C]."""
    channels = x.shape[1]
    partial = torch.empty(max(8, 3072 // channels), 49, channels)
    _call("depthwise_taps", x, _is_bf16(x), grad_conv, partial, len(partial), *_place(geometry), channels)
    return partial.sum(0)


def sum_squares(h: Tensor) -> Tensor:
    """Sums of gelu(h)^2 over the tokens of each image: h [images, tokens, D] to [images, D]."""
    out = torch.empty(len(h), h.shape[2])
    _call("gelu_sums", h, None, _is_bf16(h), out, *h.shape)
    return out


def apply(h: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """gelu(h) * scale [images, D] + beta [D]."""
    out = torch.empty_like(h)
    _call("gelu_apply", h, None, _is_bf16(h), scale, beta, None, out, *h.shape)
    return out


def sum_products(h: Tensor, grad: Tensor) -> Tensor:
    """Sums of grad * gelu(h), and of grad, over the tokens of each image: [images, 2, D]."""
    out = torch.empty(len(h), 2, h.shape[2])
    _call("gelu_sums", h, grad, _is_bf16(h), out, *h.shape)
    return out


def gradient(h: Tensor, grad: Tensor, scale: Tensor, ratio: Tensor) -> Tensor:
    """(grad * scale + gelu(h) * ratio) * gelu'(h), scale and ratio [images, D]."""
    out = torch.empty_like(h)
    _call("gelu_apply", h, grad, _is_bf16(h), scale, None, ratio, out, *h.shape)
    return out


def _place(g: Geometry) -> tuple:
    """Arguments that describe the geometry: where tokens are, and the side of a tile."""
    side = g.s or min(SIDES, key=lambda side: -(-g.height // side) * side * -(-g.width // side) * (side + 6))
    return ctypes.byref(Grid(*g[:5], _pointer(g.slot), _pointer(g.patch))), side


def _is_bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _call(name: str, *arguments) -> None:
    """Call a function of cpu.cpp: tensors become pointers, integers int64; the number of threads is added."""
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) if isinstance(a, int) else a
        for a in arguments
    ]
    getattr(library(), name)(*converted, ctypes.c_int64(torch.get_num_threads()))
