"""What a collection contains: counts, types, sizes, refusals, duplicates, a few pictures.

Counts and duplicates are of all images; everything that needs decoding is of a sample. Imports torch.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from configs.errors import UserError
from data.boxes import colour_of
from data.decode import decode
from data.exif import orientation
from data.planning import PrepareOptions
from data.reading import KEPT, ImageError, Notes, sniff
from data.reencode import reencode_all
from data.sources import Item
from data.writing import box_target

SAMPLE = 1000  # images that are decoded
MOST_COMPARED = 300_000  # images in which duplicates are searched
HEAD = 1 << 16  # bytes that are compared first
PICTURES, TILE = 32, 112  # pictures that are kept, their side in pixels
PAGES = 4  # of a file


@dataclass
class Survey:
    """What was found; `sampled` images were decoded, the others only listed."""

    splits: dict[str, Counter] = field(default_factory=dict)  # images of each class, None = without a label
    sampled: int = 0
    types: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)  # (channels, kind of values)
    sides: list[tuple[int, int]] = field(default_factory=list)  # height, width
    rotated: int = 0
    refused: list[tuple[str, ImageError]] = field(default_factory=list)
    duplicates: list[list[tuple[str, Item]]] | None = field(default_factory=list)  # of equal files; None = not searched
    pictures: list[Image.Image] = field(default_factory=list)

    def as_plain(self) -> dict:
        """For index.json."""
        heights, widths = zip(*self.sides, strict=True) if self.sides else ((0,), (0,))
        groups = self.duplicates or []
        return {
            "sampled": self.sampled,
            "types": dict(self.types),
            "pixels": {f"{channels} x {kind}": count for (channels, kind), count in self.pixels.items()},
            "height": value_range(heights),
            "width": value_range(widths),
            "rotated": self.rotated,
            "refused": dict(Counter(error.kind for _, error in self.refused)),
            "duplicates": None if self.duplicates is None else sum(len(group) - 1 for group in groups),
            "in_several_splits": sum(len({split for split, _ in group}) > 1 for group in groups),
        }


def survey(options: PrepareOptions, splits: dict[str, list[Item]]) -> Survey:
    """Look at a collection. Nothing is written."""
    found = Survey({split: Counter(item.label for item in items) for split, items in splits.items()})
    every = [(split, item) for split, items in sorted(splits.items()) for item in items]
    chosen = _spread(np.arange(len(every)), SAMPLE)
    shown = set(_spread(chosen, PICTURES).tolist())
    with ThreadPoolExecutor(options.workers) as pool:
        for looks in pool.map(lambda i: _look(every[i][1], options, i in shown), chosen):
            _add(found, looks)
        found.duplicates = _duplicates(every, pool) if len(every) <= MOST_COMPARED else None
    return found


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the numbers, evenly spread."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int))]


def _look(item: Item, options: PrepareOptions, show: bool) -> list[tuple]:
    """(name, type, EXIF orientation, (C, H, W, kind of values) or why not, picture or None) of each image of a file."""
    try:
        data = item.image_bytes()
    except (UserError, OSError) as error:
        return [(item.name, "", 1, ImageError(str(error)), None)]
    kind, turn, looks = sniff(data), 1, []
    if kind in KEPT and not options.no_exif:
        turn = orientation(data)
    for name, image in islice(reencode_all(data, item.name, options.resize, options.quality, options, Notes()), PAGES):
        tile, boxes = None, []
        if not isinstance(image, ImageError):
            try:
                boxes = box_target(item, image, options, Notes()).get("boxes", [])
            except ImageError as error:
                image = error
        if not isinstance(image, ImageError):
            image = decode(image[1], max_pixels=options.max_pixels)
            tile = _tile(image, boxes) if show and not looks else None
            image = (*image.shape, "8 bits" if image.dtype.itemsize == 1 else "more than 8 bits")
        looks.append((name, kind, turn, image, tile))
    return looks


def _add(found: Survey, looks: list[tuple]) -> None:
    for name, kind, turn, image, tile in looks:
        found.sampled += 1
        found.types[kind or "unknown"] += 1
        found.rotated += turn != 1
        if isinstance(image, ImageError):
            found.refused.append((name, image))
            continue
        channels, height, width, bits = image
        found.pixels[channels, bits] += 1
        found.sides.append((height, width))
        if tile is not None:
            found.pictures.append(tile)


def _tile(image: Tensor, boxes: list[dict]) -> Image.Image:
    """The centre of an image, TILE pixels wide and high; more than 8 bits are shown from the lowest to the highest.

    Without torch: processes that are forked later could not use its threads.
    """
    pixels = image.numpy().transpose(1, 2, 0)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = (255 * (pixels - low) / max(high - low, 1e-9)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    if boxes:
        draw, line = ImageDraw.Draw(picture), max(1, round(min(picture.size) / TILE))
        for entry in boxes:
            x, y, w, h = entry["box"]
            draw.rectangle((x, y, x + w, y + h), outline=colour_of(entry["class"]), width=line)
    return ImageOps.fit(picture, (TILE, TILE))


def _duplicates(every: Sequence[tuple[str, Item]], pool: ThreadPoolExecutor) -> list[list[tuple[str, Item]]]:
    """Groups of images with equal bytes: by size, then by the first bytes, then by all."""
    groups = _grouped(every, [item.byte_size for _, item in every])
    members = [member for group in groups for member in group]
    groups = _grouped(members, pool.map(_head_digest, [item for _, item in members]))
    members = [member for group in groups for member in group]
    return _grouped(members, pool.map(_digest, [item for _, item in members]))


def _grouped(members: Sequence[tuple[str, Item]], keys: Iterable) -> list[list[tuple[str, Item]]]:
    groups = defaultdict(list)
    for member, key in zip(members, keys, strict=True):
        groups[key].append(member)
    return [group for key, group in groups.items() if len(group) > 1 and key is not None]


def _head_digest(item: Item) -> tuple | None:
    head = item.head(HEAD)
    return (item.byte_size, hashlib.sha256(head).digest()) if head else None


def _digest(item: Item) -> bytes | None:
    try:
        return hashlib.sha256(item.image_bytes()).digest()
    except (UserError, OSError):
        return None


def value_range(values: Sequence[int]) -> list[int]:
    """Lowest, middle and highest of some values."""
    return [int(value) for value in np.quantile(values, (0, 0.5, 1))]
