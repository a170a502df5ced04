"""The published sparse convolution: MinkowskiEngine on the same parameters. Optional: launch/install_minkowski.sh.

For comparison with the official code and its checkpoints. It computes in fp32 and is slow: a gather, a product and a
scatter for each of the 49 taps. GPUs need a MinkowskiEngine that was built with CUDA.

Importing this module raises `UserError` if MinkowskiEngine is not installed.
"""

import collections.abc
import functools
import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call

from configs.errors import UserError, reason
from models.sparse.layouts import Dense, Layout, Masked, repeat_images
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
def _layer(kind: str, *channels: int, **options: int) -> nn.Module:
    """A layer of MinkowskiEngine; `functional_call` replaces its parameters by the model's."""
    with torch.random.fork_rng(devices=[]):  # its constructor draws random numbers
        return getattr(MinkowskiEngine, kind)(*channels, bias=True, dimension=2, **options)


class Minkowski(Layout):
    """The visible tokens as rows of a sparse tensor: x [N, C], N = B * n * s * s, in MinkowskiEngine's own order.

    Coordinates are (image, y, x) in tokens of the stem. A stage is identified by its number of rows, a quarter of the
    previous stage's.
    """

    def __init__(self, visible: Tensor, grn_scope: str = "image"):
        self.visible, self.grn_scope = visible, grn_scope
        self.manager = None  # MinkowskiEngine's store of coordinates
        self._keys: dict[int, object] = {}  # number of rows -> key of their coordinates in the store

    def _remember(self, tensor) -> Tensor:
        self.manager = tensor.coordinate_manager
        self._keys[len(tensor.F)] = tensor.coordinate_map_key
        return tensor.F

    def _sparse(self, x: Tensor):
        place = {"coordinate_map_key": self._keys[len(x)], "coordinate_manager": self.manager}
        return MinkowskiEngine.SparseTensor(x.float(), **place)

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """A dense convolution, as in the published code. The mask, not the values, decides which tokens exist."""
        if image.is_cuda and not MinkowskiEngine.is_cuda_available():
            raise UserError("MinkowskiEngine was built for the CPU: set run.device cpu, or model.backend packed")
        x = Dense().embed(repeat_images(image, self.visible), stem)
        visible = Masked(self.visible).at_stage(x)
        coordinates = visible.nonzero().int().contiguous()
        return self._remember(MinkowskiEngine.SparseTensor(x[visible].float(), coordinates=coordinates))

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        parameters = {"kernel": to_taps(conv.weight), "bias": conv.bias[None]}
        layer = _layer("MinkowskiConvolution", conv.in_channels, conv.out_channels, kernel_size=2, stride=2)
        return self._remember(functional_call(layer, parameters, self._sparse(x)))

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        parameters = {"kernel": to_taps(conv.weight).squeeze(1), "bias": conv.bias[None]}
        layer = _layer("MinkowskiChannelwiseConvolution", conv.in_channels, kernel_size=7)
        return functional_call(layer, parameters, self._sparse(x)).F

    def image_norm(self, x: Tensor) -> Tensor:
        """The norm of its image at each row, [N, C]; with `grn_scope` batch [1, C]."""
        if self.grn_scope == "batch":
            return torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=torch.float32)
        image = self.manager.get_coordinates(self._keys[len(x)])[:, 0].long().to(x.device)
        zeros = x.new_zeros(len(self.visible), x.shape[1], dtype=torch.float32)
        squares = zeros.index_add(0, image, x.float().square())
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()[image]  # at 0, sqrt has no gradient

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        key = min(self._keys.items())[1]  # the last stage has the fewest rows
        stride = key.get_tensor_stride()[0]
        image, row, column = self.manager.get_coordinates(key).long().to(x.device).T
        grid = fill.to(x.dtype).expand(*self.visible.shape, -1)
        return grid.index_put((image, row // stride, column // stride), x)
