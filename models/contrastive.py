"""Contrastive learning beside FCMAE: the crops of an image are told from those of other images.

NT-Xent, SimCLR's loss (arXiv 2002.05709, section 2.1), is added to FCMAE's loss of pixels, as CMAE (2207.13532) does
with a transformer. The encoder sees the visible patches of each crop, once for both losses. Letters: B images, V crops
of each, n of gy x gx patches visible, D features of an embedding.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import FCMAESettings, PretrainModel
from models.fcmae import FCMAE
from models.sparse.layouts import Layout


class Contrastive(FCMAE):
    """FCMAE, and a projector of the mean visible token to the embeddings that are compared.

    Args:
        views: crops of an image, times masks of a crop: V
        width: of the projector's two hidden layers
        dim: of embeddings, D
        temperature: of the softmax over crops
        pixel_weight: of FCMAE's loss, which is added
    Attributes:
        scores: of the last forward pass, scalars on the device, see `forward`
    """

    def __init__(
        self, config: PretrainModel, settings: FCMAESettings, views: int, width: int, dim: int, temperature: float,
        pixel_weight: float,
    ):  # fmt: skip
        super().__init__(config, settings)
        self.views, self.temperature, self.pixel_weight = views, temperature, pixel_weight
        sizes = (self.encoder.arch.dims[-1], width, width)
        norm = partial(nn.BatchNorm1d, track_running_stats=False)  # over the micro batch in evaluation too
        hidden = [(nn.Linear(a, b), norm(b), nn.GELU()) for a, b in pairwise(sizes)]
        self.projector = nn.Sequential(*(layer for layers in hidden for layer in layers), nn.Linear(width, dim))
        self.scores: dict[str, Tensor] = {}

    def embed(self, image: Tensor, visible: Tensor) -> Tensor:
        """Embeddings [B * V, D] of crops [B * V, C, H, W] with masks [B * V, gy, gx]; fp32, of length 1."""
        tokens, layout, shown, _ = self.encode(image, visible)
        return self.project(tokens, layout, shown.shape[1])

    def project(self, tokens: Tensor, layout: Layout, n: int) -> Tensor:
        """Embeddings [B * V, D] of the mean of the n visible patches' tokens, which have the layout's shape."""
        with torch.autocast(tokens.device.type, enabled=False):
            grid = layout.to_grid(tokens.float(), tokens.new_zeros(tokens.shape[-1], dtype=torch.float32))
            return F.normalize(self.projector(grid.sum((1, 2)) / n), dim=1)

    def forward(self, image: Tensor, visible: Tensor) -> Tensor:
        """Loss [], fp32, of crops [B * V, C, H, W], those of an image in sequence, with masks [B * V, gy, gx].

        Sets `scores`: the losses, and `matched`, the share of crops that another one of their image is most alike.
        """
        tokens, layout, shown, hidden = self.encode(image, visible)
        similarity = similarities(self.project(tokens, layout, shown.shape[1]))
        contrastive = nt_xent(similarity / self.temperature, self.views)
        pixel = self.pixel_loss(image, self.decode(tokens, layout, hidden))
        scores = {"contrastive_loss": contrastive, "pixel_loss": pixel, "matched": matched(similarity, self.views)}
        self.scores = {name: score.detach() for name, score in scores.items()}
        return contrastive + self.pixel_weight * pixel


def similarities(x: Tensor) -> Tensor:
    """Cosines [B * V, B * V] of embeddings of length 1; -inf of each with itself."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ x.mT).fill_diagonal_(-torch.inf)


def nt_xent(logits: Tensor, views: int) -> Tensor:
    """Cross-entropy [] of picking another crop of the same image among all crops of the batch.

    Logits [B * V, B * V] are those of `similarities`; with more than two crops, the mean over the others of an image
    (2004.11362, equation 2, with the image as the class).
    """
    same = logits.unflatten(0, (-1, views)).unflatten(2, (-1, views)).diagonal(dim1=0, dim2=2)  # [V, V, B]
    others = ~torch.eye(views, dtype=torch.bool, device=logits.device)
    return logits.logsumexp(1).mean() - same[others].mean()


def matched(similarity: Tensor, views: int) -> Tensor:
    """Share [] of crops whose most alike other crop is of the same image: 1 / (B * V - 1) times V - 1 by chance."""
    nearest = similarity.argmax(1) // views
    image = torch.arange(len(similarity), device=similarity.device) // views
    return (nearest == image).float().mean()
