"""Writing shards. Imports webdataset, torch and torchvision: commands import this module when they need it."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import webdataset

from configs.errors import printable
from configs.files import atomic_file, write_atomic
from data.boxes import box_target
from data.decode import read_npy
from data.masks import with_masks, with_tile_masks
from data.planning import Part, PrepareOptions, ShardPlan, Written
from data.pool import add_progress
from data.reading import ImageError, Notes
from data.reencode import Encoded, reencode_all
from data.remote_files import Upload
from data.shard_index import index_file
from data.shards import index_tar
from data.tars import MASK
from data.tiles import cut

ARRAYS = "{:image is an array: it needs|images are arrays: they need} --model.channels "

FETCHED_AHEAD = 16  # images at URLs


def write_tar(path: Path, samples: Iterator[dict[str, bytes | str]]) -> None:
    """Write samples {"__key__": name, "jpg": bytes, "cls": bytes, ...} to a tar; the same ones give the same bytes."""
    with atomic_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def write_shard(plan: ShardPlan, options: PrepareOptions, upload: Upload | None) -> Written:
    """Write one shard, its index, and a record that it is complete; with `upload`, move them to its URL."""
    skipped: list[str] = []
    notes = Notes()

    def samples() -> Iterator[dict[str, bytes | str]]:
        for part, read in _read_ahead(plan.parts, options):
            item, label = part.item, part.label
            for name, image, place, mask in _images(part, read, options, notes):
                if isinstance(image, ImageError):
                    skipped.append(printable(f"{name}: {image.kind}: {image}"))
                    continue
                kind, data = image
                try:
                    targets = (item.targets or {}) | box_target(item, image, place, options, notes)
                except ImageError as error:
                    skipped.append(printable(f"{name}: {error.kind}: {error}"))
                    continue
                if kind == "npy":
                    channels = read_npy(data).shape[2]
                    notes[ARRAYS + str(channels)] += 1
                place_in_file = name[len(item.name) :].replace("@", "-y").replace(",", "-x").replace("#", "-")
                key = f"{part.number:09}{place_in_file}"  # -1, -2, ... for pages, -y0-x512 for tiles
                about = {"name": name} | place | ({} if label is None else {"class": item.label}) | targets
                members = {"__key__": key, kind: data, "json": json.dumps(about, default=str).encode()}
                members |= {} if mask is None else {MASK: mask}
                yield members | ({} if label is None else {"cls": str(label).encode()})
            add_progress(len(part.tiles))

    if upload:
        plan.path.parent.mkdir(exist_ok=True)  # on another node
    write_tar(plan.path, samples())
    shard = index_tar(plan.path)
    record = {"shard": asdict(shard), "skipped": skipped, "notes": notes}
    write_atomic(plan.record, json.dumps(record).encode())
    if upload:
        files = [plan.path, index_file(plan.path), plan.record]
        upload.push(*files)
        for file in files:
            file.unlink()
    return Written(shard, skipped, dict(notes))


def _read_ahead(parts: list[Part], options: PrepareOptions) -> Iterator[tuple[Part, Callable[[], bytes]]]:
    """Parts, and a function for the bytes of their files; those at URLs are fetched by threads in advance."""
    with ThreadPoolExecutor(FETCHED_AHEAD) as pool:
        coming = deque()
        for part in parts:
            read = partial(part.item.image_bytes, options.max_file_bytes)
            ahead = part.item.remote and not options.tile  # tiles are cut from an open file
            coming.append((part, pool.submit(read).result if ahead else read))
            if len(coming) > FETCHED_AHEAD:
                yield coming.popleft()
        yield from coming


def _images(
    part: Part, read: Callable[[], bytes], options: PrepareOptions, notes: Notes
) -> Iterator[tuple[str, Encoded | ImageError, dict, bytes | None]]:
    """Name of each image of a file, the image or why it cannot be read, of tiles their places, and masks."""
    item = part.item
    if options.tile:
        yield from with_tile_masks(cut(item, part.tiles, options, notes), item, options)
        return
    try:
        data = read()
    except ImageError as error:
        yield item.name, error, {}, None
    else:
        images = reencode_all(data, item.name, options.resize, options.quality, options, notes)
        for name, image, mask in with_masks(images, data, item, options):
            yield name, image, {}, mask
