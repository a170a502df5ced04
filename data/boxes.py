"""Boxes of objects in an image, and their outlines: moved along with its pixels. Free of torch.

A target is what KEY.json holds: {"height", "width": of the image, "boxes": [{"class", "box": [x, y, width, height],
"crowd", "segmentation": polygons or RLE as in COCO; the last two only where they matter}]}. Functions return copies.
"""

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.exif import FLIPS, orientation, swaps, upright
from data.masks import image_size
from data.reading import BOXES, ImageError, Notes

if TYPE_CHECKING:
    from data.planning import PrepareOptions
    from data.sources import Item

Target = dict[str, Any]
Points = Callable[[np.ndarray], np.ndarray]  # [N, 2] (x, y) to their new places
Pixels = Callable[[np.ndarray], np.ndarray]  # a mask [H, W] to the new one
TILE_SHARE = 0.2  # of a box's area: a box with less of it in a tile is left out there
MAX_REACH = 1.5  # of an outline from the middle of its image, in sides
ROUNDING = 0.5  # pixels: a box that reaches less far beyond its image was rounded


def resized(target: Target, height: int, width: int) -> Target:
    """The target of an image that was resized."""
    scale = np.array([width / target["width"], height / target["height"]])

    def pixels(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))

    return _moved(target, height, width, lambda points: points * scale, pixels)


def mirrored(target: Target, axes: str = "h") -> Target:
    """The target of an image that was flipped: "h" = left and right, "v" = top and bottom, "vh" = both."""
    size = np.array([target["width"], target["height"]])
    flip = np.array(["h" in axes, "v" in axes])

    def pixels(mask: np.ndarray) -> np.ndarray:
        return mask[:: -1 if flip[1] else 1, :: -1 if flip[0] else 1]

    return _moved(target, target["height"], target["width"], lambda x: np.where(flip, size - x, x), pixels)


def turned(target: Target, orientation: int) -> Target:
    """The target of an image that was turned upright by its EXIF orientation."""
    if swaps(orientation):
        height, width = target["width"], target["height"]
        target = _moved(target, height, width, lambda points: points[:, ::-1], lambda mask: upright(mask, 5))
    return mirrored(target, FLIPS[orientation]) if FLIPS[orientation] else target


def cut(target: Target, top: int, left: int, height: int, width: int, min_share: float = 0.0) -> Target:
    """The target of a part of an image, which may reach beyond it, such as a crop or a tile.

    Boxes are clipped. Those without area, or with less than `min_share` of it left, are left out. Polygons may reach
    beyond the part.
    """
    old_height, old_width = target["height"], target["width"]

    def pixels(mask: np.ndarray) -> np.ndarray:
        part = np.zeros((height, width), mask.dtype)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, old_height), min(left + width, old_width)
        if y0 < y1 and x0 < x1:
            part[y0 - top : y1 - top, x0 - left : x1 - left] = mask[y0:y1, x0:x1]
        return part

    boxes = []
    for entry in target["boxes"]:  # huge images have many boxes, of which a tile has few
        x, y, w, h = entry["box"]
        box = clipped([x - left, y - top, w, h], height, width)
        if min(box[2:]) > 0 and box[2] * box[3] >= min_share * w * h:
            boxes.append(entry)
    moved = _moved({**target, "boxes": boxes}, height, width, lambda points: points - (left, top), pixels)
    return {**moved, "boxes": [{**entry, "box": clipped(entry["box"], height, width)} for entry in moved["boxes"]]}


def clipped(box: list[float], height: float, width: float) -> list[float]:
    """A box [x, y, width, height] within an image; one that is outside gets no width or height."""
    x, y, w, h = box
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    return [x0, y0, max(0, x1 - x0), max(0, y1 - y0)]


def beyond(box: list[float], height: float, width: float) -> float:
    """How far a box reaches beyond its image, pixels."""
    x, y, w, h = box
    return max(-x, -y, x + w - width, y + h - height, 0)


def usable(box: list[float]) -> bool:
    """Whether a box has an area."""
    return all(map(math.isfinite, box)) and min(box[2:]) > 0


def outline_problem(outline: Any, height: int, width: int, reach: float = MAX_REACH) -> str | None:
    """What is wrong with an object's polygons or RLE in an image of this size; None if they can be drawn.

    pycocotools checks nothing: it crashes, or takes all memory, for some of what is refused here. Polygons may reach as
    many sides from the middle of the image as `reach`.
    """
    if isinstance(outline, dict):
        size, counts = outline.get("size"), outline.get("counts")
        if size != [height, width]:
            return "is a mask of another size"
        runs = _runs(counts) if isinstance(counts, str) else counts
        whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        return None if whole and sum(runs) == height * width else "is a mask whose counts do not add up to its pixels"
    if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
        return "is neither a list of polygons nor a mask"
    for polygon in outline:
        if len(polygon) < 6 or len(polygon) % 2:
            return "has a polygon that is not at least three points x, y"
        try:
            points = np.array(polygon, float).reshape(-1, 2) / (width, height)
        except (TypeError, ValueError):
            return "has a polygon with other values than numbers"
        if not np.isfinite(points).all():
            return "has a polygon with a value that is not finite"
        if np.abs(points - 0.5).max() > reach:
            return "reaches far beyond its image"
    return None


def _runs(counts: str) -> list[int]:
    """Run lengths of a compressed RLE: 5 bits a character; from the third on, differences to that two before."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode(errors="replace"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else []


def box_target(
    item: "Item", image: tuple[str, bytes], place: dict, options: "PrepareOptions", notes: Notes
) -> Target | dict:
    """The boxes of an encoded image, {} without; `place` is that of a tile in its image, or empty.

    A tile has the boxes of which `TILE_SHARE` is in it. Raises `ImageError` if boxes are of an image of another shape.
    """
    target = item.targets or {}
    if not {"boxes", "height", "width"} <= target.keys():  # a table's own boxes are kept as they are
        return {}
    if not target["height"]:
        raise ImageError("its size was not found: write width and height into the file of boxes", BOXES)
    size = image_size(*image)
    height, width = (place["height"], place["width"]) if place else size
    fits = options.no_exif or _same_shape((target["height"], target["width"]), (height, width))
    target, turn = fitted(target, height, width, 1 if fits else orientation(item.image_bytes()))
    notes["{:,} images have boxes of the stored picture: turned upright with it"] += turn
    return cut(target, place["y"], place["x"], *size, TILE_SHARE) if place else target


def fitted(target: Target, height: int, width: int, orientation: int) -> tuple[Target, bool]:
    """The target of a shard's image of this size, and whether it was turned from the stored to the upright picture.

    The annotated size says which of the two the boxes are of; where both have it, they are of the upright one. An
    annotated size of 1 x 1 means shares of the sides.

    Raises:
        ImageError: the image has another shape than the annotation says
    """
    old = target["height"], target["width"]
    turn = not _same_shape(old, (height, width)) and swaps(orientation) and _same_shape(old, (width, height))
    if turn:
        target = turned(target, orientation)
    elif old != (1, 1) and not _same_shape(old, (height, width)):
        raise ImageError(f"is annotated as {old[1]}x{old[0]}, but has the shape of {width}x{height} pixels", BOXES)
    if (target["height"], target["width"]) == (height, width):
        return target, turn
    return resized(target, height, width), turn


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are those of one image at two scales, up to rounding."""
    scales = other[0] / one[0], other[1] / one[1]
    return any(abs(side * scale - new) <= ROUNDING for side, scale, new in zip(one, scales[::-1], other, strict=True))


def _moved(target: Target, height: int, width: int, points: Points, pixels: Pixels) -> Target:
    boxes = []
    for entry in target["boxes"]:
        x, y, w, h = entry["box"]
        (x0, y0), (x1, y1) = points(np.array([[x, y], [x + w, y + h]], float)).tolist()
        new = {**entry, "box": [min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)]}
        if isinstance(outline := entry.get("segmentation"), dict):
            new["segmentation"] = encode_mask(pixels(decode_mask(outline, target["height"], target["width"])))
        elif outline:
            new["segmentation"] = [points(np.reshape(p, (-1, 2)).astype(float)).ravel().tolist() for p in outline]
        boxes.append(new)
    return {"height": height, "width": width, "boxes": boxes}


def colour_of(name: str) -> str:
    """A colour for a class, always the same."""
    return f"hsl({zlib.crc32(name.encode(errors='surrogateescape')) * 137 % 360}, 95%, 45%)"


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """The pixels of an object, uint8 [H, W], from polygons or RLE as in COCO. Raises `ValueError` for RLE of another
    size."""
    from pycocotools import mask  # few collections have masks

    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a mask of {segmentation['size']} in an image of {[height, width]}")
    packed = segmentation["counts"]
    rle = mask.frPyObjects(segmentation, height, width) if isinstance(packed, list) else segmentation
    return mask.decode(rle)


def encode_mask(pixels: np.ndarray) -> dict:
    """Pixels [H, W] as COCO's compressed RLE, with text for JSON."""
    from pycocotools import mask

    rle = mask.encode(np.asfortranarray(pixels, np.uint8))
    return {"size": list(pixels.shape), "counts": rle["counts"].decode("ascii")}
