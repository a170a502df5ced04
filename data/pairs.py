"""Which mask belongs to which image: by relative path, or by column `mask` of a table.

images/train/1.jpg   labels/train/1.png           folders such as images and labels do not count, nor does the suffix
train/1.jpg          train/1_mask.png             common endings of masks do not count either
"""

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath

from configs.errors import UserError, counted, printable
from data.classes import IMAGE_FOLDERS, MASK_FOLDERS, WAY_OUT, folders_of
from data.labels import Paths, set_apart
from data.listing import Listing, suffix
from data.masks import SHOWN, read_classes, read_pixels
from data.planning import PrepareOptions
from data.remote import is_url
from data.sources import Item
from data.walk import list_source

IGNORED_FOLDERS = IMAGE_FOLDERS | MASK_FOLDERS | {"leftimg8bit"}
IMAGE_ENDING = re.compile(r"_(leftImg8bit|image|img)$")
MASK_ENDING = re.compile(r"(_gtFine|_gtCoarse)?[_-](mask|L|label|labels|gt|seg|segmentation|labelIds)$", re.IGNORECASE)
LOSSLESS = ("png", "gif", "bmp", "tif", "tiff", "npy")
LOOKED_AT = 20  # masks whose values a message lists
Key = tuple[str, ...]


def open_masks(listing: Listing, options: PrepareOptions, scratch: Path, stack: ExitStack) -> list[Item]:
    """The masks of `--masks`, a folder of the source or another source; those of the source are no images any more.

    Raises `UserError` if there are none, or if images have masks beside them and `--masks` is missing.
    """
    if options.masks is None:
        if not (options.splits or options.no_splits or options.labels or options.boxes):
            _suggest_masks(listing)
        return []
    inner, path = options.masks.strip("/"), Path(options.masks)
    if path.exists() and path.resolve().is_relative_to(Path(listing.source).resolve()):
        inner = path.resolve().relative_to(Path(listing.source).resolve()).as_posix()
    parts = PurePosixPath(inner).parts
    masks = [item for item in listing.images if _inside(item.name, parts)]
    if masks:
        listing.images = [item for item in listing.images if not _inside(item.name, parts)]
        if not listing.images:
            raise UserError(
                f"--masks {options.masks} has all images of {listing.source}: give its folder of masks only"
            )
        return masks
    if not (path.exists() or is_url(options.masks)):
        raise UserError(f"--masks {options.masks}: neither a path nor a folder with images in {listing.source}")
    inside = scratch / ".masks"
    inside.mkdir(exist_ok=True)
    stack.callback(inside.rmdir)
    return stack.enter_context(list_source(options.masks, inside)).images


def _inside(name: str, parts: Key) -> bool:
    folders = PurePosixPath(name).parts[:-1]
    return any(folders[i : i + len(parts)] == parts for i in range(len(folders)))


def _suggest_masks(listing: Listing) -> None:
    """Raise `UserError` if every image has a mask of the same path in a folder such as `labels`."""
    if not any(
        part.lower() in MASK_FOLDERS for parts in {folders_of(item.name) for item in listing.images} for part in parts
    ):
        return
    named = {item.name: PurePosixPath(item.name).parts for item in listing.images}
    at = {
        name: next((i for i, p in enumerate(parts[:-1]) if p.lower() in MASK_FOLDERS), None)
        for name, parts in named.items()
    }
    masks = {
        _key(name, MASK_ENDING): name for name, place in at.items() if place is not None and suffix(name) in LOSSLESS
    }
    images = [name for name, place in at.items() if place is None]
    if not masks or not images or not all(_key(name, IMAGE_ENDING) in masks for name in images):
        return
    image, mask = images[0], masks[_key(images[0], IMAGE_ENDING)]
    folder = "/".join(named[mask][: at[mask] + 1])
    pair = f"{printable(image)} and {printable(mask)}"
    way_out = f"add --masks {printable(folder)} to store them, or name the folders of images with --splits {WAY_OUT}"
    raise UserError(f"{printable(listing.source)}: every image has a mask of the same path, such as {pair}: {way_out}")


def pair_masks(items: list[Item], masks: list[Item], options: PrepareOptions) -> tuple[list[Item], list[str]]:
    """The images with their masks, and lines on what was decided; images without a mask go to split `unlabeled`.

    Raises `UserError` if no image has a mask, one has several, or the names of the classes are missing.
    """
    if options.mask_classes is None:
        raise UserError(f"--masks needs --mask-classes FILE, one name a line: {_values(masks, options)}")
    classes, table = read_classes(options.mask_classes, options.ignore), str(options.labels)
    paths = Paths(masks)
    listed = [(item.targets or {}).get("mask") for item in items]
    if any(listed):
        found = [paths.find(value, table) for value in listed]
        pairs = {i: masks[number] for i, number in enumerate(found) if number is not None}
    else:
        pairs = _by_path(items, masks, options.masks, lambda folders: folders)
        pairs = pairs or _by_path(items, masks, options.masks, None)
    if not pairs:
        names = f"the images are named like {printable(items[0].name)}, the masks like {printable(masks[0].name)}"
        way_out = "rename them, or give a table with columns path and mask as --labels"
        raise UserError(f"--masks {options.masks}: no mask has the path of an image: {names}: {way_out}")
    about = f"{classes.names} {classes.values} {classes.numbers} {options.ignore}"
    paired = []
    for i, item in enumerate(items):
        targets = {key: value for key, value in (item.targets or {}).items() if key != "mask"} or None
        mask = pairs.get(i)
        stamp = f"{item.stamp} mask {mask.name} {mask.stamp} {about}" if mask else item.stamp
        paired.append(replace(item, mask=mask, targets=targets, stamp=stamp))
    where = printable(options.masks)
    notes = [
        f"masks of {len(pairs):,} of {counted(len(items), 'image')}, {counted(len(classes.names), 'class', 'classes')}"
    ]
    used = {mask.name for mask in pairs.values()}
    if alone := [mask for mask in masks if mask.name not in used]:
        notes.append(f"{counted(len(alone), 'mask')} without an image, such as {printable(alone[0].name)}")
    return set_apart(paired, set(pairs), where, notes, "mask"), notes


def _by_path(items: list[Item], masks: list[Item], where: str, common: Callable | None) -> dict[int, Item]:
    """The mask of each image, by its number; with `common` None, folders that all images or all masks share do not
    count."""
    plain, ended = defaultdict(list), defaultdict(list)
    drop = 0 if common else _shared([_key(mask.name) for mask in masks])
    for mask in masks:
        plain[_key(mask.name)[drop:]].append(mask)
        if (key := _key(mask.name, MASK_ENDING)) != _key(mask.name):
            ended[key[drop:]].append(mask)
    pairs, drop = {}, 0 if common else _shared([_key(item.name) for item in items])
    for i, item in enumerate(items):
        key = _key(item.name, IMAGE_ENDING)[drop:]
        found = plain.get(_key(item.name)[drop:]) or plain.get(key) or ended.get(key) or []
        if len(found) > 1:
            both = " and ".join(printable(mask.name) for mask in found[:2])
            raise UserError(f"--masks {where}: {printable(item.name)} may have {both}: remove one")
        pairs |= {i: found[0]} if found else {}
    first: dict[str, int] = {}
    for i, mask in pairs.items():
        if (other := first.setdefault(mask.name, i)) != i:
            both = " and ".join(printable(items[j].name) for j in (other, i))
            way_out = "remove one, or give a table with columns path and mask as --labels"
            raise UserError(f"--masks {where}: {printable(mask.name)} may be of {both}: {way_out}")
    return pairs


def _key(name: str, ending: re.Pattern | None = None) -> Key:
    """Folders that count, and the name without suffix and ending."""
    *folders, file = PurePosixPath(name).parts
    stem = file.rpartition(".")[0] or file
    return (*(f for f in folders if f.lower() not in IGNORED_FOLDERS), ending.sub("", stem) if ending else stem)


def _shared(keys: list[Key]) -> int:
    """Number of leading folders that all have in common."""
    first, last = min(keys)[:-1], max(keys)[:-1]
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _values(masks: list[Item], options: PrepareOptions) -> str:
    """`masks have the values 0, 1, 255 (20 looked at)`, for a message."""
    looked, found, problem = 0, set(), ""
    for mask in masks[:LOOKED_AT]:
        try:
            pixels = read_pixels(mask.image_bytes(options.max_file_bytes), options.max_pixels)
            found |= set(map(int, pixels.ravel().tolist()))
            looked += 1
        except UserError as error:
            problem = f"{printable(mask.name)}: {error}"
    if not looked:
        return problem
    shown = ", ".join(map(str, sorted(found)[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
    return f"the first {counted(looked, 'mask')} have the values {shown}"
