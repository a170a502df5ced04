"""The published sparse convolution: MinkowskiEngine on the same parameters. Optional: launch/install_minkowski.sh.

For comparison with the official code and its checkpoints. It computes in fp32 and is slow: a gather, a product and a
scatter for each of the 49 taps. GPUs need a MinkowskiEngine that was built with CUDA.

Importing this module raises `UserError` if MinkowskiEngine is not installed.
"""

import collections
import collections.abc
import functools
import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call

from configs.errors import UserError, reason
from models.sparse.layouts import Dense, Layout, Masked
from models.sparse.taps import to_taps

for _name in ("Sequence", "Mapping", "Iterable"):  # MinkowskiEngine 0.5.4 expects them where Python < 3.10 had them
    setattr(collections, _name, getattr(collections.abc, _name))
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "built for the CPU only"
        import MinkowskiEngine
except ImportError as error:
    raise UserError(
        f"model.backend is minkowski, but MinkowskiEngine cannot be imported ({reason(error)}): build it with "
        "`bash launch/install_minkowski.sh`, or use model.backend packed, which computes the same"
    ) from None


@functools.cache
def _convolution(in_channels: int, out_channels: int) -> nn.Module:
    """A 2x2 convolution of stride 2; `functional_call` replaces its parameters by the model's."""
    with torch.random.fork_rng(devices=[]):  # its constructor draws random numbers
        return MinkowskiEngine.MinkowskiConvolution(
            in_channels, out_channels, kernel_size=2, stride=2, bias=True, dimension=2
        )


@functools.cache
def _depthwise(channels: int) -> nn.Module:
    """A 7x7 depthwise convolution; parameters as above."""
    with torch.random.fork_rng(devices=[]):
        return MinkowskiEngine.MinkowskiChannelwiseConvolution(channels, kernel_size=7, bias=True, dimension=2)


class Minkowski(Layout):
    """The visible tokens as rows of a sparse tensor: x [N, C], N = B * n * s * s, in MinkowskiEngine's own order.

    Coordinates are (image, y, x) in tokens of the stem. A stage is identified by its number of rows, a quarter of the
    previous stage's.
    """

    def __init__(self, visible: Tensor, grn_scope: str = "image"):
        self.visible = visible
        self.grn_scope = grn_scope
        self.manager = None  # MinkowskiEngine's store of coordinates
        self._keys: dict[int, object] = {}  # number of rows -> key of their coordinates in the store

    def _remember(self, tensor) -> Tensor:
        self.manager = tensor.coordinate_manager
        self._keys[len(tensor.F)] = tensor.coordinate_map_key
        return tensor.F

    def _sparse(self, x: Tensor):
        return MinkowskiEngine.SparseTensor(
            x.float(), coordinate_map_key=self._keys[len(x)], coordinate_manager=self.manager
        )

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """A dense convolution, as in the published code. The mask, not the values, decides which tokens exist."""
        if image.is_cuda and not MinkowskiEngine.is_cuda_available():
            raise UserError("MinkowskiEngine was built for the CPU: set run.device cpu, or model.backend packed")
        x = Dense().embed(image, stem)
        visible = Masked(self.visible).at_stage(x)
        coordinates = visible.nonzero().int().contiguous()
        return self._remember(MinkowskiEngine.SparseTensor(x[visible].float(), coordinates=coordinates))

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        out_channels, in_channels = conv.weight.shape[:2]
        parameters = {"kernel": to_taps(conv.weight), "bias": conv.bias[None]}
        return self._remember(functional_call(_convolution(in_channels, out_channels), parameters, self._sparse(x)))

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        parameters = {"kernel": to_taps(conv.weight).squeeze(1), "bias": conv.bias[None]}
        return functional_call(_depthwise(len(conv.weight)), parameters, self._sparse(x)).F

    def image_norm(self, x: Tensor) -> Tensor:
        """The norm of its image at each row, [N, C]; with `grn_scope` batch [1, C]."""
        if self.grn_scope == "batch":
            return torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=torch.float32)
        image = self.manager.get_coordinates(self._keys[len(x)])[:, 0].long().to(x.device)
        squares = x.new_zeros(len(self.visible), x.shape[1], dtype=torch.float32)
        squares = squares.index_add(0, image, x.float().square())
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()[image]  # at 0, sqrt has no gradient

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        key = min(self._keys.items())[1]  # the last stage has the fewest rows
        stride = key.get_tensor_stride()[0]
        image, row, column = self.manager.get_coordinates(key).long().to(x.device).T
        grid = fill.to(x.dtype).expand(*self.visible.shape, -1)
        return grid.index_put((image, row // stride, column // stride), x)
