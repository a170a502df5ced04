"""LeJEPA: embeddings of the crops of an image agree, and all are distributed like an isotropic Gaussian.

arXiv 2511.08544: the prediction loss (section 5) pulls the crops of an image together, and SIGReg (section 4), a test
of normality along random directions, keeps embeddings from collapsing. Here the encoder sees the visible patches of a
crop, as in FCMAE, and a decoder predicts the pixels of the others. Letters: B images, V crops of each, n of gy x gx
patches visible, D features of an embedding, K directions.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import FCMAESettings, PretrainModel
from models.fcmae import FCMAE
from models.sparse.layouts import Layout

POINTS, LARGEST = 17, 3.0  # of the characteristic functions' argument: from 0, as they are symmetric


class LeJEPA(FCMAE):
    """FCMAE, and a projector of the mean visible token to the embeddings that are compared.

    Args:
        views: crops of an image, times masks of a crop: V
        width: of the projector's two hidden layers
        dim: of embeddings, D
        weight: of SIGReg in LeJEPA's loss, lambda; 1 - weight is that of the agreement
        pixel_weight: of FCMAE's loss, which is added
    Attributes:
        scores: `agreement`, `sigreg` and `pixel_loss` of the last forward pass, scalars on the device
    """

    def __init__(
        self, config: PretrainModel, settings: FCMAESettings, views: int, width: int, dim: int, weight: float,
        pixel_weight: float,
    ):  # fmt: skip
        super().__init__(config, settings)
        self.views, self.weight, self.pixel_weight = views, weight, pixel_weight
        sizes = (self.encoder.arch.dims[-1], width, width)
        norm = partial(nn.BatchNorm1d, track_running_stats=False)  # over the micro batch in evaluation too
        hidden = [(nn.Linear(a, b), norm(b), nn.GELU()) for a, b in pairwise(sizes)]
        self.projector = nn.Sequential(*(layer for layers in hidden for layer in layers), nn.Linear(width, dim))
        self.scores: dict[str, Tensor] = {}

    def embed(self, image: Tensor, visible: Tensor) -> Tensor:
        """Embeddings [B * V, D], fp32, of crops [B * V, C, H, W] with masks [B * V, gy, gx]."""
        tokens, layout, shown, _ = self.encode(image, visible)
        return self.project(tokens, layout, shown.shape[1])

    def project(self, tokens: Tensor, layout: Layout, n: int) -> Tensor:
        """Embeddings [B * V, D], fp32, of the mean of the n visible patches' tokens, which have the layout's shape."""
        with torch.autocast(tokens.device.type, enabled=False):  # SIGReg compares distributions: no rounding to bf16
            grid = layout.to_grid(tokens.float(), tokens.new_zeros(tokens.shape[-1]))
            return self.projector(grid.sum((1, 2)) / n)

    def forward(self, image: Tensor, visible: Tensor, directions: Tensor) -> Tensor:
        """Loss [], fp32, of crops [B * V, C, H, W], those of an image in sequence.

        Masks `visible` are [B * V, gy, gx]; directions [D, K] have length 1.
        """
        tokens, layout, shown, hidden = self.encode(image, visible)
        views = self.project(tokens, layout, shown.shape[1]).unflatten(0, (-1, self.views))
        agreement = (views - views.mean(1, keepdim=True)).square().mean()
        gaussian = torch.stack([sigreg(view, directions) for view in views.unbind(1)]).mean()
        pixel = self.pixel_loss(image, self.decode(tokens, layout, hidden))
        scores = {"agreement": agreement, "sigreg": gaussian, "pixel_loss": pixel}
        self.scores = {name: score.detach() for name, score in scores.items()}
        return (1 - self.weight) * agreement + self.weight * gaussian + self.pixel_weight * pixel


def sigreg(x: Tensor, directions: Tensor) -> Tensor:
    """Sketched isotropic Gaussian regularisation [] of embeddings [B, D] (2511.08544, section 4.2).

    Along each direction, the Epps-Pulley statistic: B times the integral of the squared distance between the
    characteristic functions of the projected embeddings and of N(0, 1), weighted by the latter. Mean over directions.
    """
    t = torch.linspace(0, LARGEST, POINTS, device=x.device)
    normal = torch.exp(-t.square() / 2)
    angle = (x @ directions)[..., None] * t  # [B, K, points]
    distance = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    return 2 * len(x) * torch.trapezoid(distance * normal, t).mean()  # twice: the half below 0 is the same


def draw_directions(dim: int, count: int, seed: int) -> Tensor:
    """Random directions [dim, count], of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(dim, count, generator=generator), dim=0)
