"""What a collection contains: counts, types, sizes, refusals, duplicates, a few pictures.

Counts and duplicates are of all images; everything that needs decoding is of a sample. Imports torch.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from configs.errors import UserError
from data.boxes import box_target, colour_of
from data.cache import RemoteUserError
from data.decode import decode
from data.exif import orientation
from data.grid import Sizes, count_tiles
from data.masks import decode_mask, overlay, read_classes, with_masks, with_tile_masks
from data.planning import PrepareOptions
from data.reading import HEAD_BYTES, KEPT, NODATA, UNREADABLE, VALUES, ImageError, Notes, sniff
from data.reencode import Encoded, reencode_all
from data.sources import Item
from data.tiles import DROPPED, Tile, cut, find_range

SAMPLE = 1000  # images that are decoded
MOST_COMPARED = 300_000  # images in which duplicates are searched
HEAD = 1 << 16  # bytes that are compared first
PICTURES, TILE = 32, 112  # pictures that are kept, their side in pixels
PAGES = 4  # of a file


@dataclass
class Survey:
    """What was found among `sampled` images, which were decoded, and equal files among all."""

    sampled: int = 0
    types: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)  # (channels, kind of values)
    sides: list[tuple[int, int]] = field(default_factory=list)  # height, width
    rotated: int = 0
    highest: float = 0  # value of more than 8 bits, from 0 to 1; unless the user has given their range
    mask_classes: list[str] = field(default_factory=list)
    mask_pixels: np.ndarray | None = None  # [classes + 1], the last without a class
    refused: list[tuple[str, ImageError]] = field(default_factory=list)
    duplicates: list[list[tuple[str, Item]]] | None = field(default_factory=list)  # of equal files; None = not searched
    pictures: list[Image.Image] = field(default_factory=list)
    tiles: tuple[int, int] | None = None  # number with background, side in pixels
    background: int = 0  # tiles among those that were looked at
    originals: list[tuple[int, int]] = field(default_factory=list)  # height, width of the images that are cut

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
            **({} if self.mask_pixels is None else {"mask_pixels": self.mask_pixels.tolist()}),
            "refused": dict(Counter(error.kind for _, error in self.refused)),
            "duplicates": None if self.duplicates is None else sum(len(group) - 1 for group in groups),
            "in_several_splits": sum(len({split for split, _ in group}) > 1 for group in groups),
        } | ({"tiles": self.tiles[0]} if self.tiles else {})


def survey(options: PrepareOptions, splits: dict[str, list[Item]], sizes: Sizes | None = None) -> Survey:
    """Look at a collection. Nothing is written. `sizes` are those of images that are cut into tiles."""
    found = Survey()
    if options.masks:
        found.mask_classes = read_classes(options.mask_classes, options.ignore).names
        found.mask_pixels = np.zeros(len(found.mask_classes) + 1, np.int64)
    every = [(split, item) for split, items in sorted(splits.items()) for item in items]
    chosen = _spread(np.arange(len(every)), SAMPLE)
    shown = set(_spread(chosen, PICTURES).tolist())
    look = partial(_look, options=options)
    if sizes is not None:
        found.originals = [size for sizes_of_file in sizes.values() for size in sizes_of_file]
        found.tiles = count_tiles(found.originals, options.tile, options.overlap), options.tile
        tiles = max(PAGES, -(-PICTURES // max(1, len(chosen))))  # of each image
        look = partial(_look_at_tiles, options=options, sizes=sizes, most=tiles)
    with ThreadPoolExecutor(options.workers) as pool:
        for looks, background in pool.map(lambda i: look(every[i][1], show=i in shown), chosen):
            _add(found, looks)
            found.background += background
        found.highest *= options.value_range is None
        del found.pictures[PICTURES:]
        remote = any(item.remote for _, item in every)  # each comparison would be a request
        found.duplicates = _duplicates(every, pool) if len(every) <= MOST_COMPARED and not remote else None
    return found


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the numbers, evenly spread."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int))]


def _look(item: Item, options: PrepareOptions, show: bool) -> tuple[list[tuple], int]:
    """(name, type, EXIF turn, (C, H, W, kind of values, highest value) or why not, picture or None, pixels of each
    class or None) of each image of a file.

    The second value is the number of background tiles.
    """
    try:
        data = item.image_bytes(options.max_file_bytes)
    except ImageError as error:
        return [(item.name, "", 1, error, None, None)], 0
    except OSError as error:
        return [(item.name, "", 1, ImageError(error.strerror.lower(), UNREADABLE), None, None)], 0
    kind, turn, looks = sniff(data), 1, []
    if kind in KEPT and not options.no_exif:
        turn = orientation(data)
    images = reencode_all(data, item.name, options.resize, options.quality, options, Notes())
    for name, image, mask in islice(with_masks(images, data, item, options), PAGES):
        looks.append((name, kind, turn, *_decoded(item, image, {}, mask, options, show and not looks)))
    return looks, 0


def _look_at_tiles(item: Item, options: PrepareOptions, show: bool, sizes: Sizes, most: int) -> tuple[list[tuple], int]:
    """`_look` at some tiles of a file, evenly spread."""
    count = max(1, count_tiles(sizes[item], options.tile, options.overlap))
    positions, notes = _spread(np.arange(count), most).tolist(), Notes()
    try:
        tiles = list(cut(item, positions, options, notes))
        if any(isinstance(t.image, ImageError) and t.image.kind in (VALUES, NODATA) for t in tiles):
            tiles = [Tile(item.name, find_range(item, options), {})]
        kind = sniff(item.head(HEAD_BYTES))
    except RemoteUserError:  # the image is not damaged, but cannot be fetched
        raise
    except (UserError, OSError) as error:
        tiles, kind = [Tile(item.name, error if isinstance(error, ImageError) else ImageError(str(error)), {})], ""
    masked = with_tile_masks(tiles, item, options)
    looks = [(name, kind, 1, *_decoded(item, image, place, mask, options, show)) for name, image, place, mask in masked]
    return looks, notes[DROPPED]


def _decoded(
    item: Item, image: Encoded | ImageError, place: dict, mask: bytes | None, options: PrepareOptions, show: bool
) -> tuple:
    """(C, H, W, kind of values, highest value) or why not, picture or None, pixels of each class of a mask or None."""
    try:
        if isinstance(image, ImageError):
            raise image
        boxes = box_target(item, image, place, options, Notes()).get("boxes", [])
    except ImageError as error:
        return error, None, None
    pixels, classes, counts = decode(image[1], max_pixels=options.max_pixels), None, None
    if mask is not None:
        classes, count = decode_mask(mask), len(read_classes(options.mask_classes, options.ignore).names)
        counts = np.bincount(np.minimum(classes, count).ravel(), minlength=count + 1)
    values = ("8 bits", 0) if pixels.dtype.itemsize == 1 else ("more than 8 bits", float(pixels.max()))
    return (*pixels.shape, *values), _tile(pixels, classes, counts, boxes) if show else None, counts


def _add(found: Survey, looks: list[tuple]) -> None:
    for name, kind, turn, image, tile, counts in looks:
        found.sampled += 1
        found.types[kind or "unknown"] += 1
        found.rotated += turn != 1
        if isinstance(image, ImageError):
            found.refused.append((name, image))
            continue
        channels, height, width, bits, highest = image
        found.highest = max(found.highest, highest)
        found.pixels[channels, bits] += 1
        found.sides.append((height, width))
        if counts is not None:
            found.mask_pixels += counts
        if tile is not None:
            found.pictures.append(tile)


def _tile(image: Tensor, mask: np.ndarray | None, counts: np.ndarray | None, boxes: list[dict]) -> Image.Image:
    """The centre of an image, TILE pixels wide and high, in the colours of its mask and with its boxes; more than 8
    bits are shown from the lowest to the highest.

    Without torch: processes that are forked later could not use its threads.
    """
    pixels = image.numpy().transpose(1, 2, 0)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = (255 * (pixels - low) / max(high - low, 1e-9)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    if mask is not None:
        picture = Image.fromarray(overlay(np.asarray(picture), mask, len(counts) - 1))
    draw, line = ImageDraw.Draw(picture), max(1, round(min(picture.size) / TILE))
    for x, y, w, h, name in ((*entry["box"], entry["class"]) for entry in boxes):
        draw.rectangle((x, y, x + w, y + h), outline=colour_of(name), width=line)
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
