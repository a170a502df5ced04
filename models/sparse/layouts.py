"""Layouts: how the tokens of a batch are stored, and the operations that depend on it.

A ConvNeXt works on each token alone, except in four operations: stem and downsampling (local to a patch), depthwise
convolution (neighbours) and GRN's norm (the whole image). A layout implements these four, so the same blocks and
weights work with every layout. A fifth layout, models/sparse/minkowski.py, is optional.

    Dense    x [B, H, W, C]      all tokens                                 fine-tuning, decoder
    Masked   x [B, H, W, C]      all tokens and a mask; plain reference     tests
    Packed   x [B, n, s, s, C]   n visible patches of s x s tokens          pretraining
    Zeroed   x [B, H, W, C]      hidden pixels zero, otherwise as Dense     control without sparse convolution

Letters: B images, H W token rows and columns, C channels, gy x gx patch grid, n visible patches per image, s tokens
along a patch's side (8, 4, 2, 1 by stage), P pixels along it. Channels are last.
`visible` [B, gy, gx] is True where the encoder sees the patch; n is the same for every image. An image may have M
masks, `visible` is then [B * M, gy, gx] and x has B * M rows, those of the first image first.
`grn_scope` is the scope of GRN's norm: "image", as in the paper, or "batch", as in the official sparse code.
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
    """Assemble patches [B, gy, gx, P, P, C] into images [B, C, H, W]."""
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def split_patches(visible: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ascending grid indices of each image's visible patches [B, n] and hidden patches [B, gy * gx - n].

    `n` is passed to avoid a host sync. Raises RuntimeError if an image has another number of visible patches.
    """
    flat = visible.flatten(1)
    torch._assert_async((flat.sum(1) == n).all(), "images differ in their number of visible patches")
    order = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order[:, :n], order[:, n:]


def take_patches(patches: Tensor, index: Tensor) -> Tensor:
    """Select patches [B, gy, gx, ...] by grid index [B, k]: [B, k, ...]. An index [B * M, k] is M for each image."""
    columns, masks = patches.shape[2], len(index) // len(patches)
    rows = torch.arange(len(index), device=index.device) // masks
    return patches[rows[:, None], index // columns, index % columns]


def repeat_images(image: Tensor, visible: Tensor) -> Tensor:
    """Images [B, C, H, W] once for each mask [B * M, gy, gx]; `Packed` needs no such copies."""
    return image if len(image) == len(visible) else image.repeat_interleave(len(visible) // len(image), 0)


def local_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve images [..., H, W, C] with a kernel of the size of its stride.

    On a CPU as one matrix product: oneDNN's convolution takes up to three times as long, most of it backward.
    """
    if not kernels.on_cpu(x):
        y = F.conv2d(x.flatten(0, -4).permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride)
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:-3])
    k = conv.stride[0]
    x = x[..., : x.shape[-3] // k * k, : x.shape[-2] // k * k, :]
    squares = x.unflatten(-2, (-1, k)).unflatten(-4, (-1, k)).transpose(-4, -3).flatten(-3)  # [..., k * k * C]
    return F.linear(squares, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def channel_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `dims` (kept, length 1), fp32. On a CPU much faster than torch.linalg.vector_norm."""
    squares = x.float().square().sum(dims, keepdim=True)
    return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # at 0, sqrt has no gradient


class Layout:
    """Operations of a ConvNeXt that depend on where tokens are. Subclasses implement all but `downsample`:

    embed        stem: images [B, C, H, W] to tokens x, of each mask
    depthwise    7x7 depthwise convolution; hidden tokens and those outside the image count as zero
    image_norm   Euclidean norm of each channel over an image's visible tokens, fp32, broadcastable to x; with
                 `grn_scope` batch over those of the batch
    to_grid      last stage's tokens on the patch grid [B, gy, gx, C], with `fill` [C] at hidden patches; not in Dense
    geometry     fields of `models.kernels.depthwise.Geometry` for x; None in layouts without kernels
    """

    geometry = None
    over_batch = False  # whether `image_norm` is over the batch

    def downsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """2x2 convolution with stride 2: halves H and W, or s."""
        return local_conv(x, conv)

    def depthwise_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        """7x7 depthwise convolution, then LayerNorm; one kernel where there are kernels."""
        if self.geometry is None or not kernels.fused(x):
            return norm(self.depthwise(x, conv))
        from models.kernels.depthwise import Geometry, depthwise_norm

        return depthwise_norm(x.flatten(0, -2), conv, norm, Geometry(*self.geometry(x))).view_as(x)

    def gelu_grn(self, x: Tensor, grn: nn.Module) -> Tensor:
        """GELU, then GRN; fused where there are kernels."""
        if self.geometry is None or not kernels.fused(x):
            return grn(F.gelu(x), self)
        from models.kernels.gelu_grn import gelu_grn

        return gelu_grn(x, grn.weight, grn.bias, grn.eps, self.over_batch)


class Dense(Layout):
    """All tokens of an image, row by row: x [B, H, W, C]."""

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        return local_conv(image.permute(0, 2, 3, 1), stem)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return depthwise.dense(x, conv)

    def image_norm(self, x: Tensor) -> Tensor:
        return channel_norm(x, (1, 2))

    def geometry(self, x: Tensor) -> tuple:
        return len(x), x.shape[1], x.shape[2], 0, 0, None, None


class Masked(Layout):
    """All positions and a mask, x [B, H, W, C]: submanifold sparse convolution in plain dense code.

    Operations that look beyond one token zero hidden positions first; elsewhere their values are never read.
    """

    def __init__(self, visible: Tensor, grn_scope: str = "image"):
        self.visible = visible
        self.norm_dims = (0, 1, 2) if grn_scope == "batch" else (1, 2)

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        return Dense.embed(self, repeat_images(image, self.visible), stem)

    def at_stage(self, x: Tensor) -> Tensor:
        """`visible` at the resolution of x: [B, H, W]."""
        scale_y, scale_x = x.shape[1] // self.visible.shape[1], x.shape[2] // self.visible.shape[2]
        return self.visible.repeat_interleave(scale_y, 1).repeat_interleave(scale_x, 2)

    def zero_hidden(self, x: Tensor) -> Tensor:
        """x with zeros at hidden positions, whatever their values (also NaN)."""
        return x.masked_fill(~self.at_stage(x)[..., None], 0)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return depthwise.plain(self.zero_hidden(x), conv)

    def image_norm(self, x: Tensor) -> Tensor:
        return channel_norm(self.zero_hidden(x), self.norm_dims)

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
        return torch.where(self.visible[..., None], x, fill.to(x.dtype))


class Zeroed(Dense):
    """Ordinary convolutions on an image whose hidden patches are zero: the control for sparse convolution.

    Biases and features that spread from visible patches fill the hidden positions and enter every convolution and
    GRN's norm, so the encoder depends on masks that are absent in fine-tuning (2301.00808, section 3.1 and table 2).
    """

    def __init__(self, visible: Tensor):
        self.visible = visible

    def embed(self, image: Tensor, stem: nn.Conv2d) -> Tensor:
        patches = patchify(repeat_images(image, self.visible), tuple(self.visible.shape[1:]))
        return super().embed(unpatchify(patches.masked_fill(~self.visible[..., None, None, None], 0)), stem)

    to_grid = Masked.to_grid


class Packed(Layout):
    """The visible patches only: x [B, n, s, s, C].

    Submanifold sparse convolution as dense code: all operations but the depthwise convolution are local to a patch.
    That one gathers a window with a margin from the neighbours of each patch, and convolves the windows.
    """

    def __init__(self, visible: Tensor, n: int, grn_scope: str = "image"):
        self.grid = tuple(visible.shape[1:])
        self.over_batch = grn_scope == "batch"
        self.patch, _ = split_patches(visible, n)
        self._windows: dict[int, Tensor] = {}
        self._slots: tuple[Tensor, Tensor] | None = None

    def windows(self, s: int) -> Tensor:
        """`index` of `depthwise.windows`: [B * n, s + 6, s + 6]."""
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
        return local_conv(take_patches(patchify(image, self.grid), self.patch), stem)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return depthwise.windows(x.flatten(0, 1), conv, self.windows(x.shape[2])).view_as(x)

    def image_norm(self, x: Tensor) -> Tensor:
        return channel_norm(x, (0, 1, 2, 3) if self.over_batch else (1, 2, 3))

    def slots(self) -> tuple[Tensor, Tensor]:
        """Index of each patch among its image's visible ones [B, gy, gx], -1 = hidden; and the inverse [B, n]."""
        if self._slots is None:
            batch, n = self.patch.shape
            slot = torch.full((batch, self.grid[0] * self.grid[1]), -1, dtype=torch.int32, device=self.patch.device)
            slot.scatter_(1, self.patch, torch.arange(n, dtype=torch.int32, device=slot.device).expand(batch, n))
            self._slots = slot.view(batch, *self.grid), self.patch.int()
        return self._slots

    def geometry(self, x: Tensor) -> tuple:
        (batch, n, s, *_), (gy, gx) = x.shape, self.grid
        return batch, gy * s, gx * s, s, n, *self.slots()

    def to_grid(self, x: Tensor, fill: Tensor) -> Tensor:
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
