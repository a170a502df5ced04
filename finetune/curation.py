"""Duplicates, outliers, balanced subsets and nearest images, from features.

Letters: N images, D width of their features. Features [N, D] are fp32, of length 1, and on one device. Similarity is
the cosine. All comparisons are exact, a block at a time, so memory grows with N only.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.training.feature_eval import BANK, QUERIES, nearest
from launch.training.watchdog import Progress

BLOCK = 1024  # images compared with the earlier ones at a time
ROUNDING = 1e-6  # of similarities: those of equal images may be this much below 1


def unit_rows(x: np.ndarray, device: torch.device) -> Tensor:
    """Features [N, D] with length 1, fp32."""
    rows = torch.from_numpy(x.astype(np.float32)).to(device)  # a copy: Arrow's memory is read-only
    return F.normalize(rows, out=rows)


def find_duplicates(x: Tensor, threshold: float, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of similarity `threshold` or more to an earlier image that is itself not left out.

    So each image left out has a near-duplicate among those that remain, and no two of these are near-duplicates.

    Returns:
        the images to leave out, the remaining image that each is most similar to, and their similarity; all [M]
    """
    threshold -= ROUNDING
    keep, found = torch.ones(len(x), dtype=torch.bool, device=x.device), []
    blocks = range(0, len(x), BLOCK)
    for start in progress(blocks, len(blocks), "duplicates"):
        rows = x[start : start + BLOCK]
        best, partner = _most_similar(rows, x[:start], keep[:start])
        within = (rows @ rows.T).tril(-1).cpu().numpy()
        for i in np.flatnonzero((best >= threshold) | (within >= threshold).any(1)).tolist():
            kept_before = np.where(keep[start : start + i].cpu().numpy(), within[i, :i], -1)
            if i and kept_before.max() > best[i]:
                best[i], partner[i] = kept_before.max(), start + kept_before.argmax()
            if best[i] >= threshold:
                keep[start + i] = False
                found.append((start + i, partner[i], best[i]))
    columns = list(zip(*found, strict=True)) or [(), (), ()]
    return np.array(columns[0], int), np.array(columns[1], int), np.array(columns[2], float)


def _most_similar(rows: Tensor, earlier: Tensor, keep: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Similarity [B] to the most similar of the earlier images that are kept, and its index [B]; -1 without one."""
    best, partner = rows.new_full((len(rows),), -1.0), torch.full((len(rows),), -1, device=rows.device)
    for start in range(0, len(earlier), BANK):
        part = slice(start, start + BANK)
        similarity, index = (rows @ earlier[part].T).masked_fill_(~keep[part], -1.0).max(1)
        partner = torch.where(similarity > best, index + start, partner)
        best = torch.maximum(best, similarity)
    return best.cpu().numpy(), partner.cpu().numpy()


def outlier_scores(x: Tensor, k: int, progress: Progress) -> np.ndarray:
    """Mean cosine distance [N], 0 to 2, of each image to its k nearest others. N must be above k."""
    every, scores = torch.arange(len(x), device=x.device), []
    blocks = range(0, len(x), QUERIES)
    for start in progress(blocks, len(blocks), "nearest images"):
        rows = slice(start, start + QUERIES)
        similarity, index = nearest(x[rows], x, every, k + 1)
        similarity[index == every[rows, None]] = -torch.inf  # the image itself; among many copies it may be absent
        scores.append(1 - similarity.topk(k, dim=1).values.mean(1))
    return torch.cat(scores).cpu().numpy()


def nearest_images(query: Tensor, x: Tensor, k: int, without: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k images nearest to features [D], the nearest first, and their similarities; `without` is not among them."""
    similarity, index = nearest(query[None], x, torch.arange(len(x), device=x.device), min(k + 1, len(x)))
    index, similarity = index[0].cpu().numpy(), similarity[0].cpu().numpy()
    others = index != without
    return index[others][:k], similarity[others][:k]


def balanced_subset(x: Tensor, images: int, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A subset that has the same number of images of each k-means cluster, as far as the clusters go (2405.15613).

    Returns:
        `images` indices in ascending order, the cluster of each, and its similarity to the mean of the cluster
    """
    from sklearn.cluster import MiniBatchKMeans  # slow to import

    x = x.cpu()
    kmeans = MiniBatchKMeans(clusters, random_state=seed, n_init="auto").fit(x.numpy())
    rng, members = np.random.default_rng(seed), [np.flatnonzero(kmeans.labels_ == i) for i in range(clusters)]
    shares = even_shares([len(own) for own in members], images)
    chosen = [rng.choice(own, share, replace=False) for own, share in zip(members, shares, strict=True)]
    index = np.sort(np.concatenate(chosen))
    label = kmeans.labels_[index]
    centres = F.normalize(torch.from_numpy(kmeans.cluster_centers_).to(x.dtype))
    return index, label, (x[index] * centres[label]).sum(1).numpy()


def even_shares(sizes: list[int], total: int) -> list[int]:
    """Divide `total` among groups as evenly as their sizes allow. It must not be above the sum of the sizes."""
    shares, left = [0] * len(sizes), total
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for done, i in enumerate(order):  # the smallest first: what it lacks goes to the others
        shares[i] = min(sizes[i], left // (len(sizes) - done))
        left -= shares[i]
    return shares
