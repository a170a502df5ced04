"""Writing shards. Imports webdataset, torch and torchvision: commands import this module when they need it."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import webdataset

from configs.errors import UserError, printable
from configs.files import atomic_file, write_atomic
from data.cache import RemoteUserError
from data.decode import read_npy
from data.planning import PrepareOptions, ShardPlan, Written
from data.pool import add_progress
from data.reading import ImageError, Notes
from data.reencode import Encoded, reencode_all
from data.remote_files import Upload
from data.shards import index_file, index_tar
from data.sources import Item

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
        for number, (item, label, data) in enumerate(_read_ahead(plan.items), plan.first):
            for name, image in _images(item, data, options, notes):
                if isinstance(image, ImageError):
                    skipped.append(printable(f"{name}: {image.kind}: {image}"))
                    continue
                kind, data = image
                if kind == "npy":
                    channels = read_npy(data).shape[2]
                    notes[f"{{:,}} images are arrays: they need --model.channels {channels}"] += 1
                key = f"{number:09}{name[len(item.name) :].replace('#', '-')}"  # -1, -2, ... for pages
                about = {"name": name} | ({} if label is None else {"class": item.label}) | (item.targets or {})
                members = {"__key__": key, kind: data, "json": json.dumps(about, default=str).encode()}
                yield members | ({} if label is None else {"cls": str(label).encode()})
            add_progress(1)

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


def _read_ahead(items: list[tuple[Item, int | None]]) -> Iterator[tuple[Item, int | None, Callable[[], bytes]]]:
    """Images, their labels, and a function for their bytes; those at URLs are fetched by threads in advance."""
    with ThreadPoolExecutor(FETCHED_AHEAD) as pool:
        coming = deque()
        for item, label in items:
            coming.append((item, label, pool.submit(item.image_bytes).result if item.remote else item.image_bytes))
            if len(coming) > FETCHED_AHEAD:
                yield coming.popleft()
        yield from coming


def _images(
    item: Item, read: Callable[[], bytes], options: PrepareOptions, notes: Notes
) -> Iterator[tuple[str, Encoded | ImageError]]:
    """Images of a file, or why it cannot be read."""
    try:
        data = read()
    except RemoteUserError:  # the image is not damaged, but cannot be fetched
        raise
    except UserError as error:
        yield item.name, ImageError(str(error))
    else:
        yield from reencode_all(data, item.name, options.resize, options.quality, options, notes)
