"""Writing shards. Imports webdataset, torch and torchvision: commands import this module when they need it."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import webdataset
from PIL import Image

from configs.errors import UserError, printable
from configs.files import atomic_file, write_atomic
from data.boxes import fitted
from data.decode import read_npy
from data.exif import orientation, swaps
from data.planning import PrepareOptions, ShardPlan, Written
from data.pool import add_progress
from data.reading import ImageError, Notes
from data.reencode import Encoded, reencode_all
from data.shards import index_tar
from data.sources import Item


def write_tar(path: Path, samples: Iterator[dict[str, bytes | str]]) -> None:
    """Write samples {"__key__": name, "jpg": bytes, "cls": bytes, ...} to a tar; the same ones give the same bytes."""
    with atomic_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def write_shard(plan: ShardPlan, options: PrepareOptions) -> Written:
    """Write one shard, its index, and a record that it is complete."""
    skipped: list[str] = []
    notes = Notes()

    def samples() -> Iterator[dict[str, bytes | str]]:
        for number, (item, label) in enumerate(plan.items, plan.first):
            for name, image in _images(item, options, notes):
                if isinstance(image, ImageError):
                    skipped.append(printable(f"{name}: {image.kind}: {image}"))
                    continue
                kind, data = image
                try:
                    targets = (item.targets or {}) | box_target(item, image, options, notes)
                except ImageError as error:
                    skipped.append(printable(f"{name}: {error.kind}: {error}"))
                    continue
                if kind == "npy":
                    channels = read_npy(data).shape[2]
                    notes[f"{{:,}} images are arrays: they need --model.channels {channels}"] += 1
                key = f"{number:09}{name[len(item.name) :].replace('#', '-')}"  # -1, -2, ... for pages
                about = {"name": name} | ({} if label is None else {"class": item.label}) | targets
                members = {"__key__": key, kind: data, "json": json.dumps(about, default=str).encode()}
                yield members | ({} if label is None else {"cls": str(label).encode()})
            add_progress(1)

    write_tar(plan.path, samples())
    shard = index_tar(plan.path)
    record = {"shard": asdict(shard), "skipped": skipped, "notes": notes}
    write_atomic(plan.record, json.dumps(record).encode())
    return Written(shard, skipped, dict(notes))


def box_target(item: Item, image: Encoded, options: PrepareOptions, notes: Notes) -> dict:
    """The boxes of an encoded image, {} without. Raises `ImageError` if they are of an image of another shape."""
    if not item.targets or "height" not in item.targets:
        return {}
    kind, data = image
    if kind == "npy":
        height, width = read_npy(data).shape[:2]
    else:
        width, height = Image.open(io.BytesIO(data)).size
        height, width = (width, height) if swaps(orientation(data)) else (height, width)
    source = 1 if options.no_exif else orientation(item.image_bytes())
    target, turned = fitted(item.targets, height, width, source)
    notes["{:,} images have boxes of the stored picture: turned upright with it"] += turned
    return target


def _images(item: Item, options: PrepareOptions, notes: Notes) -> Iterator[tuple[str, Encoded | ImageError]]:
    """Images of a file, or why it cannot be read."""
    try:
        data = item.image_bytes()
    except UserError as error:
        yield item.name, ImageError(str(error))
    else:
        yield from reencode_all(data, item.name, options.resize, options.quality, options, notes)
