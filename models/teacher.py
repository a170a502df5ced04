"""A frozen teacher: features of whole images, on a student's grid of patches.

Letters: B images, C channels, H W pixels, gy x gx the student's grid, h x w the teacher's; D and E are the widths of
the teacher's features of a patch and of an image.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError, counted, reason
from models.networks import Network, open_network
from models.weights import check_finite

Size = tuple[int, int]
DIGEST = 16  # hexadecimal digits


class Features(NamedTuple):
    """What a teacher extracts from images, fp32."""

    patches: Tensor  # [B, gy, gx, D], the mean over each of the student's patches
    pooled: Tensor  # [B, E], of the whole image: the teacher's class token or the mean, as its classifier uses


class Teacher(nn.Module):
    """A frozen network in evaluation mode.

    It gets images that are normalised for the student, and normalises and resizes them for itself. By default its
    images have about the size of the student's, and each of the student's patches has a whole number of its cells.

    Args:
        source: weight file, model folder, hub name or `timm:NAME`; see `models.networks.open_network`
        grid: the student's rows and columns of patches
        size: height and width of the student's images, pixels
        statistics: mean and standard deviation per channel that the student's images are normalised with
        wanted: height and width of the teacher's images; None = the default
    Attributes:
        size: height and width of the teacher's images
        widths: D and E
        digest: short hash of its weights, mean and std
    Raises:
        UserError: the source is unreadable or has NaN, other channels than the student, or no feature map; or it cannot
            take images of this size
    """

    def __init__(
        self, source: str, grid: Size, size: Size, statistics: tuple[tuple, tuple], wanted: Size | None = None
    ):
        super().__init__()
        self.source, self.grid = source, grid
        with torch.random.fork_rng([]):  # the student's initial weights do not depend on the teacher
            network = open_network(source)
        check_finite(source, network.state_dict())
        self.digest = _digest(network)
        mean, std = (torch.tensor(values) for values in statistics)
        if network.channels != len(mean):
            raise UserError(
                f"objective.teacher {source} takes images of {counted(network.channels, 'channel')}, model.channels is "
                f"{len(mean)}: use a teacher for such images"
            )
        own_mean, own_std = torch.tensor(network.mean), torch.tensor(network.std)
        self.register_buffer("scale", (std / own_std)[:, None, None])
        self.register_buffer("shift", ((mean - own_mean) / own_std)[:, None, None])
        self.size = _input_size(network.stride, grid, size, wanted)
        network.set_size(self.size)
        self.network = network.float().requires_grad_(False).eval()
        self.widths = self._probe(len(mean))

    def train(self, mode: bool = True) -> "Teacher":
        """It is always evaluated."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Features of images [B, C, H, W] that are normalised for the student."""
        image = image.float()
        if tuple(image.shape[2:]) != self.size:
            image = F.interpolate(image, self.size, mode="bicubic", antialias=True)
        cells, pooled = self.network(image * self.scale + self.shift)
        return Features(to_grid(cells.float(), self.grid), pooled.float())

    @property
    def bytes(self) -> int:
        """Memory of its weights."""
        return sum(x.numel() * x.element_size() for x in self.state_dict().values())

    def _probe(self, channels: int) -> tuple[int, int]:
        """Widths of its features of a random image. Raises `UserError` where there are none."""
        image = torch.randn(1, channels, *self.size, generator=torch.Generator().manual_seed(0))
        try:
            features = self(image)
        except (RuntimeError, ValueError, AssertionError) as error:  # of timm or transformers
            height, width = self.size
            raise UserError(
                f"objective.teacher {self.source} cannot take images of {height}x{width} pixels ({reason(error)}): set "
                "objective.teacher_size to the size that it was trained with"
            ) from error
        if not all(x.isfinite().all() for x in features):
            raise UserError(f"objective.teacher {self.source} gives features that are not finite: use another file")
        return tuple(x.shape[-1] for x in features)


def to_grid(cells: Tensor, grid: Size) -> Tensor:
    """Resample features [B, h, w, D] to a grid [B, gy, gx, D].

    A coarser grid has means over areas, exact where it divides h and w; a finer one is interpolated linearly.
    """
    if tuple(cells.shape[1:3]) == grid:
        return cells
    maps = cells.permute(0, 3, 1, 2)
    if cells.shape[1] >= grid[0] and cells.shape[2] >= grid[1]:
        return F.adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def _input_size(stride: int, grid: Size, size: Size, wanted: Size | None) -> Size:
    """Height and width of the teacher's images, multiples of its stride."""
    if wanted is None:
        cells = max(1, round(size[0] / grid[0] / stride))  # along the side of the student's patch
        return grid[0] * cells * stride, grid[1] * cells * stride
    if wanted[0] % stride or wanted[1] % stride:
        near = "x".join(str(max(1, round(side / stride)) * stride) for side in wanted)
        raise UserError(
            f"objective.teacher_size {wanted[0]}x{wanted[1]} is not a multiple of the teacher's patch, {stride} "
            f"pixels: use {near}, or null"
        )
    return wanted


def _digest(network: Network) -> str:
    found = hashlib.sha256(repr((network.mean, network.std)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:DIGEST]
