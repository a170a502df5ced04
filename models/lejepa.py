"""LeJEPA: embeddings of the crops of an image agree, and all are distributed like an isotropic Gaussian.

arXiv 2511.08544: the prediction loss (section 5) pulls the crops of an image together, and SIGReg (section 4), a test
of normality along random directions, keeps embeddings from collapsing. Letters: B images, V crops of each, D features
of an embedding, K directions.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import PretrainModel
from models.convnext import ConvNeXt, init_weights
from models.sparse.layouts import Dense

POINTS, LARGEST = 17, 3.0  # of the characteristic functions' argument: from 0, as they are symmetric
EPS = 1e-6


class LeJEPA(nn.Module):
    """A dense encoder, and a projector of its mean token to the embeddings that are compared.

    Args:
        views: crops of an image, V
        width: of the projector's two hidden layers
        dim: of embeddings, D
        weight: of SIGReg in the loss, lambda; 1 - weight is that of the agreement
    Attributes:
        scores: `agreement` and `sigreg` of the last forward pass, scalars on the device
    """

    def __init__(self, config: PretrainModel, views: int, width: int, dim: int, weight: float):
        super().__init__()
        self.encoder = ConvNeXt(config, recompute=config.recompute)
        self.views, self.weight = views, weight
        sizes = (self.encoder.arch.dims[-1], width, width)
        hidden = [(nn.Linear(a, b), nn.LayerNorm(b, EPS), nn.GELU()) for a, b in pairwise(sizes)]
        self.projector = nn.Sequential(*(layer for layers in hidden for layer in layers), nn.Linear(width, dim))
        self.projector.apply(init_weights)
        self.scores: dict[str, Tensor] = {}

    def embed(self, image: Tensor) -> Tensor:
        """Embeddings [B * V, D], fp32, of normalised crops [B * V, C, H, W]."""
        tokens = self.encoder.forward_features(image, Dense())
        return self.projector(tokens.float().mean((1, 2))).float()

    def forward(self, image: Tensor, directions: Tensor) -> Tensor:
        """Loss [], fp32, of crops [B * V, C, H, W], those of an image in sequence; directions [D, K] have length 1."""
        views = self.embed(image).unflatten(0, (-1, self.views))
        agreement = (views - views.mean(1, keepdim=True)).square().mean()
        gaussian = torch.stack([sigreg(view, directions) for view in views.unbind(1)]).mean()
        self.scores = {"agreement": agreement.detach(), "sigreg": gaussian.detach()}
        return (1 - self.weight) * agreement + self.weight * gaussian


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
