"""Writing shards. Imports webdataset, torch and torchvision: commands import this module when they need it."""

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import webdataset

from configs.errors import UserError, reason
from configs.files import atomic_file, write_atomic
from data.planning import ShardPlan
from data.pool import add_progress
from data.reencode import reencode
from data.shards import index_tar
from data.sources import Item


def write_tar(path: Path, samples: Iterator[dict[str, bytes | str]]) -> None:
    """Write WebDataset samples to a tar; the same samples give the same bytes.

    Args:
        path: written under a temporary name, then renamed
        samples: {"__key__": name, "jpg": bytes, "cls": bytes, ...}
    """
    with atomic_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def write_shard(plan: ShardPlan, resize: int | None, quality: int | None) -> dict:
    """Write one shard, its index, and a record that it is complete. See `reencode` for `resize` and `quality`.

    Returns:
        the record: {"shard": entry for index.json, "skipped": one line per damaged image}
    """
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, bytes | str]]:
        for number, (item, label) in enumerate(plan.items, plan.first):
            try:
                kind, data = reencode(_image_bytes(item), item.name, resize, quality)
            except UserError as error:
                skipped.append(f"{item.name}: {error}")
            else:
                yield _sample(number, kind, data, label, item)
            add_progress(1)

    write_tar(plan.path, samples())
    record = {"shard": asdict(index_tar(plan.path)), "skipped": skipped}
    write_atomic(plan.record, json.dumps(record).encode())
    return record


def _image_bytes(item: Item) -> bytes:
    """An image's bytes. Raises `UserError` for a damaged zip member, `OSError` if the source has disappeared."""
    try:
        return item.image_bytes()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
        raise UserError(f"cannot be read from the zip ({reason(error)})") from None


def _sample(number: int, kind: str, data: bytes, label: int | None, item: Item) -> dict[str, bytes | str]:
    about = {"name": item.name} | ({} if label is None else {"class": item.label})
    members = {"__key__": f"{number:09}", kind: data, "json": json.dumps(about).encode()}
    return members if label is None else members | {"cls": str(label).encode()}
