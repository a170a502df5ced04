"""The published sparse convolution: MinkowskiEngine on the same parameters. Optional; `launch/install_minkowski.sh`.

For parity with the official code and its checkpoints, on CPU, and on GPU where MinkowskiEngine was built with CUDA. It
computes in fp32 and is slow: one gather, product and scatter for each of the 49 taps.

Importing this module raises `UserError` if MinkowskiEngine is not installed.
"""

import collections
import collections.abc
import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call

from configs.errors import UserError
from models.sparse.layouts import Dense, Masked

for _name in ("Sequence", "Mapping", "Iterable"):  # MinkowskiEngine 0.5.4 looks for them where Python < 3.10 had them
    setattr(collections, _name, getattr(collections.abc, _name))
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was built for the CPU only
        import MinkowskiEngine
except ImportError as error:
    raise UserError(
        f"model.backend is minkowski, but MinkowskiEngine cannot be imported ({error}): "
        "build it with `bash launch/install_minkowski.sh`"
    ) from None


class Minkowski:
    """The visible tokens as rows of a sparse tensor: x [N, C], N = B * n * s * s, in MinkowskiEngine's own order.

    Coordinates are (image, y, x) in tokens of the stem. A stage is recognised by its number of rows, which differs from
    stage to stage by a factor of 4.
    """

    def __init__(self, visible: Tensor):
        self.visible = visible
        self.manager = None
        self._keys: dict[int, object] = {}  # rows -> MinkowskiEngine's name of the coordinates

    def _remember(self, tensor) -> Tensor:
        self.manager = tensor.coordinate_manager
        self._keys[len(tensor.F)] = tensor.coordinate_map_key
        return tensor.F

    def _sparse(self, x: Tensor):
        return MinkowskiEngine.SparseTensor(
            x.float(), coordinate_map_key=self._keys[len(x)], coordinate_manager=self.manager
        )

    def _image(self, x: Tensor) -> Tensor:
        """Number of the image that each row belongs to."""
        return self.manager.get_coordinates(self._keys[len(x)])[:, 0].long().to(x.device)

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """Stem: images [B, C, H, W] to visible tokens; a dense convolution, as in the published code."""
        x = Dense().embed(image, stem)
        seen = Masked(self.visible).at_stage(x)
        coordinates = seen.nonzero().int().contiguous()
        return self._remember(MinkowskiEngine.SparseTensor(x[seen].float(), coordinates=coordinates))

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """2x2 convolution with stride 2."""
        out_channels, in_channels = conv.weight.shape[:2]
        module = MinkowskiEngine.MinkowskiConvolution(
            in_channels, out_channels, kernel_size=2, stride=2, bias=True, dimension=2
        )
        # MinkowskiEngine counts the taps with the first axis, y, running fastest: (x, y, in, out)
        kernel = conv.weight.permute(3, 2, 1, 0).reshape(4, in_channels, out_channels)
        return self._remember(functional_call(module, {"kernel": kernel, "bias": conv.bias[None]}, self._sparse(x)))

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """7x7 depthwise convolution; positions without a row count as zero."""
        channels = len(conv.weight)
        module = MinkowskiEngine.MinkowskiChannelwiseConvolution(channels, kernel_size=7, bias=True, dimension=2)
        kernel = conv.weight[:, 0].permute(2, 1, 0).reshape(-1, channels)
        return functional_call(module, {"kernel": kernel, "bias": conv.bias[None]}, self._sparse(x)).F

    def image_norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of each channel over the rows of an image, at each of its rows: [N, C]."""
        image = self._image(x)
        squares = x.new_zeros(len(self.visible), x.shape[1], dtype=torch.float32).index_add(
            0, image, x.float().square()
        )
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()[image]

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        """Last stage's tokens on the patch grid [B, gy, gx, C], with `fill` [C] at hidden patches."""
        key = min(self._keys.items())[1]  # x may have been projected since; the last stage has the fewest rows
        stride = key.get_tensor_stride()[0]
        image, row, column = self.manager.get_coordinates(key).long().to(x.device).T
        grid = fill.to(x.dtype).expand(*self.visible.shape, -1)
        return grid.index_put((image, row // stride, column // stride), x)
