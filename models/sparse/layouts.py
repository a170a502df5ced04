"""Layouts: where the tokens of a batch lie in memory, and the few operations that depend on it.

A ConvNeXt is local to a token except for four things: the stem and the downsampling (local to a patch), the depthwise
convolution (sees neighbours) and GRN's norm (sees the whole image). A layout owns these four; blocks own the rest, and
the same block code and weights serve every layout. A fifth layout, models/sparse/minkowski.py, is optional.

    Dense    x [B, H, W, C]      every token of the image                   fine-tuning, decoder
    Masked   x [B, H, W, C]      the same and a mask; the plain reference   tests
    Packed   x [B, n, s, s, C]   the n visible patches, s x s tokens each   pretraining
    Zeroed   x [B, H, W, C]      hidden pixels are zero, else as Dense      the control without sparse convolution

Letters: B images, H W token rows and columns, C channels, g patch grid (gy x gx), n visible patches of an image,
s tokens along a patch's side (8, 4, 2, 1 in the four stages), P pixels along it. Channels are last everywhere.
`visible` [B, gy, gx] is True where the encoder sees the patch; every image has the same number n of them.
`grn_scope` is what GRN's norm is over: "image", as in the paper, or "batch", as the official sparse code computes it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.sparse import depthwise


def patchify(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """View images [B, C, H, W] as patches [B, gy, gx, P, P, C] (no copy)."""
    gy, gx = grid
    return image.unflatten(3, (gx, -1)).unflatten(2, (gy, -1)).permute(0, 2, 4, 3, 5, 1)


def unpatchify(patches: Tensor) -> Tensor:
    """Put patches [B, gy, gx, P, P, C] together to images [B, C, H, W]."""
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def split_patches(visible: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices in the grid, ascending, of each image's visible patches [B, n] and of its hidden ones [B, gy * gx - n].

    `n` is given so that no GPU has to be asked for it. Raises RuntimeError if an image has another number.
    """
    flat = visible.flatten(1)
    torch._assert_async((flat.sum(1) == n).all(), "images differ in their number of visible patches")
    order = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order[:, :n], order[:, n:]


def take_patches(patches: Tensor, index: Tensor) -> Tensor:
    """Those of each image's patches [B, gy, gx, ...] that `index` [B, k] names: [B, k, ...]."""
    columns = patches.shape[2]
    return patches[torch.arange(len(index), device=index.device)[:, None], index // columns, index % columns]


def local_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose stride is its kernel size, on images [..., H, W, C] with any leading dimensions."""
    y = F.conv2d(x.flatten(0, -4).permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:-3])


def channel_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `dims`, kept with length 1; fp32. On a CPU much faster than torch.linalg.vector_norm."""
    squares = x.float().square().sum(dims, keepdim=True)
    return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # at 0, sqrt has no gradient


class Layout:
    """What all layouts share: the two passages of a block that have kernels, in plain code."""

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        """7x7 depthwise convolution, then LayerNorm."""
        return norm(self.depthwise(x, conv))

    def gelu_grn(self, x: Tensor, grn: nn.Module) -> Tensor:
        """GELU, then GRN."""
        return grn(F.gelu(x), self)


class Dense(Layout):
    """All tokens of an image, row by row: x [B, H, W, C]."""

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """Stem: images [B, C, H, W] to tokens."""
        return local_conv(image.permute(0, 2, 3, 1), stem)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """2x2 convolution with stride 2: half the rows and columns."""
        return local_conv(x, conv)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """7x7 depthwise convolution."""
        return depthwise.dense(x, conv)

    def image_norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of each channel over an image's tokens, fp32, shaped to broadcast against x."""
        return channel_norm(x, (1, 2))

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        if not kernels.fused(x):
            return super().depthwise_norm(x, conv, norm)
        from models.kernels.depthwise import Geometry, depthwise_norm  # imports Triton

        geometry = Geometry(len(x), x.shape[1], x.shape[2], s=0, n=0, slot=None, patch=None)
        return depthwise_norm(x.flatten(0, 2), conv, norm, geometry).view_as(x)

    def gelu_grn(self, x: Tensor, grn: nn.Module) -> Tensor:
        if not kernels.fused(x):
            return super().gelu_grn(x, grn)
        from models.kernels.gelu_grn import gelu_grn

        return gelu_grn(x, grn.weight, grn.bias, grn.eps)


class Masked(Layout):
    """All positions and a mask, x [B, H, W, C]: what a submanifold sparse convolution computes, in plain dense code.

    Hidden positions hold numbers nobody reads: each operation that looks beyond one token zeroes them first.
    """

    def __init__(self, visible: Tensor, grn_scope: str = "image"):
        self.visible = visible
        self.norm_dims = (0, 1, 2) if grn_scope == "batch" else (1, 2)

    embed, downsample = Dense.embed, Dense.downsample

    def at_stage(self, x: Tensor) -> Tensor:
        """`visible` at the resolution of x: [B, H, W]."""
        scale_y, scale_x = x.shape[1] // self.visible.shape[1], x.shape[2] // self.visible.shape[2]
        return self.visible.repeat_interleave(scale_y, 1).repeat_interleave(scale_x, 2)

    def zero_hidden(self, x: Tensor) -> Tensor:
        """x with zeros at hidden positions, whatever stood there (NaN too)."""
        return x.masked_fill(~self.at_stage(x)[..., None], 0)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """7x7 depthwise convolution; hidden positions count as zero."""
        return depthwise.plain(self.zero_hidden(x), conv)

    def image_norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of each channel over the visible tokens of an image, or of the batch; fp32, to broadcast."""
        return channel_norm(self.zero_hidden(x), self.norm_dims)

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        """Last stage's tokens on the patch grid [B, gy, gx, C], with `fill` [C] at hidden patches."""
        return torch.where(self.visible[..., None], x, fill.to(x.dtype))


class Zeroed(Dense):
    """Ordinary convolutions on an image whose hidden patches are zero: what sparse convolution is there to avoid.

    Biases, and features that spread from visible patches, fill the hidden positions and take part in every convolution
    and in GRN's norm: the encoder meets masks that fine-tuning never shows it (table 2 of the paper; section 3.1).
    """

    def __init__(self, visible: Tensor):
        self.visible = visible

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """Stem: images [B, C, H, W] to tokens; hidden pixels count as zero."""
        patches = patchify(image, tuple(self.visible.shape[1:]))
        return super().embed(unpatchify(patches.masked_fill(~self.visible[..., None, None, None], 0)), stem)

    to_grid = Masked.to_grid


class Packed(Layout):
    """The visible patches only: x [B, n, s, s, C].

    Submanifold sparse convolution as ordinary dense code: every operation but the depthwise convolution is local to a
    patch. That one gathers for each patch a window with a margin from its neighbours, and convolves the windows.
    """

    def __init__(self, visible: Tensor, n: int, grn_scope: str = "image"):
        self.grid = tuple(visible.shape[1:])
        self.over_batch = grn_scope == "batch"
        self.patch, _ = split_patches(visible, n)
        self._windows: dict[int, Tensor] = {}
        self._slots: tuple[Tensor, Tensor] | None = None

    def windows(self, s: int) -> Tensor:
        """Row in x [B * n * s * s, C] of each token of each patch's window [B * n, s + 6, s + 6]; its length = none."""
        if s not in self._windows:
            (gy, gx), (batch, n), (slot, _) = self.grid, self.patch.shape, self.slots()
            offset = torch.arange(-depthwise.MARGIN, s + depthwise.MARGIN, device=slot.device)
            y = (self.patch // gx * s)[..., None, None] + offset[:, None]
            x = (self.patch % gx * s)[..., None, None] + offset
            inside = (y >= 0) & (y < gy * s) & (x >= 0) & (x < gx * s)
            patch = (y // s).clamp(0, gy - 1) * gx + (x // s).clamp(0, gx - 1)
            k = slot.flatten(1).gather(1, patch.flatten(1)).view_as(patch).long()
            first = torch.arange(batch, device=slot.device)[:, None, None, None] * n
            row = ((first + k) * s + y % s) * s + x % s
            self._windows[s] = torch.where(inside & (k >= 0), row, batch * n * s * s).flatten(0, 1)
        return self._windows[s]

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        """Stem: images [B, C, H, W] to tokens [B, n, 8, 8, C1]; hidden pixels are not read."""
        return local_conv(take_patches(patchify(image, self.grid), self.patch), stem)

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """2x2 convolution with stride 2: s becomes s / 2."""
        return local_conv(x, conv)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """7x7 depthwise convolution; hidden patches and the outside count as zero."""
        return depthwise.windows(x.flatten(0, 1), conv, self.windows(x.shape[2])).view_as(x)

    def image_norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of each channel over the visible tokens of an image, or of the batch; fp32, to broadcast."""
        return channel_norm(x, (0, 1, 2, 3) if self.over_batch else (1, 2, 3))

    def slots(self) -> tuple[Tensor, Tensor]:
        """Number of a patch among its image's visible ones, or -1, [B, gy, gx]; the inverse [B, n]."""
        if self._slots is None:
            batch, n = self.patch.shape
            slot = torch.full((batch, self.grid[0] * self.grid[1]), -1, dtype=torch.int32, device=self.patch.device)
            slot.scatter_(1, self.patch, torch.arange(n, dtype=torch.int32, device=slot.device).expand(batch, n))
            self._slots = slot.view(batch, *self.grid), self.patch.int()
        return self._slots

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        if not kernels.fused(x):
            return super().depthwise_norm(x, conv, norm)
        from models.kernels.depthwise import Geometry, depthwise_norm  # imports Triton

        (batch, n, s, *_), (gy, gx), (slot, patch) = x.shape, self.grid, self.slots()
        geometry = Geometry(batch, gy * s, gx * s, s, n, slot, patch)
        return depthwise_norm(x.flatten(0, 3), conv, norm, geometry).view_as(x)

    def gelu_grn(self, x: Tensor, grn: nn.Module) -> Tensor:
        if not kernels.fused(x):
            return super().gelu_grn(x, grn)
        from models.kernels.gelu_grn import gelu_grn

        return gelu_grn(x, grn.weight, grn.bias, grn.eps, self.over_batch)

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        """Last stage's tokens on the patch grid [B, gy, gx, C], with `fill` [C] at hidden patches."""
        grid = fill.to(x.dtype).expand(len(x), self.grid[0] * self.grid[1], -1)
        index = self.patch[..., None].expand(-1, -1, x.shape[-1])
        return grid.scatter(1, index, x.flatten(1, 3)).unflatten(1, self.grid)


def layout_of(backend: str, visible: Tensor, n: int, grn_scope: str = "image") -> Layout:
    """The layout of `model.backend` for masks [B, gy, gx] with n visible patches, for any objective that masks."""
    if backend == "packed":
        return Packed(visible, n, grn_scope)
    if backend == "masked":
        return Masked(visible, grn_scope)
    if backend == "zeroed":
        return Zeroed(visible)
    from models.sparse.minkowski import Minkowski  # optional: imported only where it was asked for

    return Minkowski(visible, grn_scope)
