"""The preview of a collection: lines on one screen, and a contact sheet. Imports torch."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import counted, printable
from configs.files import write_atomic
from configs.log import say
from data.survey import MOST_COMPARED, TILE, Survey, value_range

DARK = 0.25  # share of the range of values below which images may be of 12 bits in 16
MAX_CLASSES = 20  # of masks in a line
SHOWN, COLUMNS, GAP = 5, 8, 4  # entries in a line; pictures in a row; pixels between them


def describe(found: Survey, images: int) -> list[str]:
    """Lines of a preview of a collection of so many images; warnings begin with `warning:`."""
    lines = [_tiles_line(found)] if found.tiles else []
    if not found.sampled:
        return lines
    every = found.tiles[0] if found.tiles else images
    of = f"of {found.sampled:,} looked at" if found.sampled < every else "all"
    lines.append(f"types     {_counts(found.types)} ({of})")
    if found.sides:
        pixels = Counter({f"{_channels(channels)}, {bits}": n for (channels, bits), n in found.pixels.items()})
        heights, widths = zip(*found.sides, strict=True)
        lines += [f"pixels    {_counts(pixels)}", f"size      height {_sizes(heights)}, width {_sizes(widths)}"]
    if found.mask_pixels is not None and found.mask_pixels.any():
        share = found.mask_pixels / found.mask_pixels.sum()
        order = [i for i in np.argsort(-share[:-1], kind="stable") if share[i]]
        shown = [f"{printable(found.mask_classes[i])} {_percent(share[i])}" for i in order]
        more = [f"without a class {_percent(share[-1])}"] if share[-1] else []
        lines.append(f"masks     {', '.join([*_few(shown), *more])} of the pixels")
        if absent := [printable(found.mask_classes[i]) for i in np.flatnonzero(share[:-1] == 0)]:
            lines.append(f"warning: no pixel of {', '.join(_few(absent))} in the masks looked at")
    if found.rotated:
        lines.append(f"rotated   {counted(found.rotated, 'image')} turned upright by EXIF (--no-exif leaves them)")
    return lines + _warnings(found)


def _tiles_line(found: Survey) -> str:
    number, side = found.tiles
    line = f"tiles     {number:,} of {side} x {side} pixels before background is dropped"
    if looked := found.sampled + found.background:
        line += f"; {found.background:,} of {looked:,} looked at are background"
    if found.originals:
        heights, widths = zip(*found.originals, strict=True)
        line += f"; images: height {_sizes(heights)}, width {_sizes(widths)}"
    return line


def _warnings(found: Survey) -> list[str]:
    lines = []
    for kind in dict.fromkeys(error.kind for _, error in found.refused):
        same = [(name, error) for name, error in found.refused if error.kind == kind]
        name, error = same[0]
        lines.append(f"warning: {len(same):,} {kind}, such as {printable(name)}: {error}")
    if len({channels for channels, _ in found.pixels}) > 1:
        lines.append(
            "warning: images differ in their channels: pictures are converted to model.channels, arrays are not"
        )
    if 0 < found.highest < DARK:
        highest = round(found.highest * 65535)
        low = f"images of more than 8 bits have values up to {highest:,} of 65,535, so they are dark"
        lines.append(
            f"warning: {low}: add --value-range 0 {(1 << highest.bit_length()) - 1}, or the range of the device"
        )
    if found.duplicates is None:
        lines.append(f"equal files were not searched: there are more than {MOST_COMPARED:,}, or they are at a URL")
    elif found.duplicates:
        first = ", ".join(printable(item.name) for _, item in found.duplicates[0][:3])
        count = sum(len(group) - 1 for group in found.duplicates)
        lines.append(f"warning: {counted(count, 'image')} equal to another one byte for byte, such as {first}")
        leaks = [group for group in found.duplicates if len({split for split, _ in group}) > 1]
        if leaks:
            (one, a), (other, b) = leaks[0][0], next(m for m in leaks[0] if m[0] != leaks[0][0][0])
            where = f"{printable(a.name)} ({one}) = {printable(b.name)} ({other})"
            lines.append(f"warning: {counted(len(leaks), 'image')} in several splits, so scores are too good: {where}")
    return lines


def _few(texts: list[str]) -> list[str]:
    return texts if len(texts) <= MAX_CLASSES else [*texts[: MAX_CLASSES - 1], "..."]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def _counts(found: Counter) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in found.most_common(SHOWN))


def _channels(count: int) -> str:
    return {1: "grey", 3: "colour", 4: "4 channels"}.get(count, f"{count} channels")


def _sizes(values: Sequence[int]) -> str:
    low, middle, high = value_range(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,})"


def write_pictures(found: Survey, path: Path, shown: str | None = None) -> None:
    """Write the pictures, if there are any, as a contact sheet, a PNG; `shown` is the name to print."""
    if not found.pictures:
        return
    rows, side = -(-len(found.pictures) // COLUMNS), TILE + GAP
    sheet = Image.new("RGB", (min(COLUMNS, len(found.pictures)) * side + GAP, rows * side + GAP), "white")
    for i, picture in enumerate(found.pictures):
        sheet.paste(picture, (i % COLUMNS * side + GAP, i // COLUMNS * side + GAP))
    out = io.BytesIO()
    sheet.save(out, "png")
    write_atomic(path, out.getvalue())
    say(f"  see {shown or path}")
