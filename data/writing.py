"""Writing shards. Imports webdataset, torch and torchvision: commands import this module when they need it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import webdataset

from configs.errors import UserError, printable
from configs.files import atomic_file, write_atomic
from data.planning import ShardPlan
from data.pool import add_progress
from data.reencode import reencode
from data.shards import Shard, index_tar


def write_tar(path: Path, samples: Iterator[dict[str, bytes | str]]) -> None:
    """Write samples {"__key__": name, "jpg": bytes, "cls": bytes, ...} to a tar; the same ones give the same bytes."""
    with atomic_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def write_shard(plan: ShardPlan, resize: int | None, quality: int | None) -> tuple[Shard, list[str]]:
    """Write one shard, its index, and a record that it is complete. Returns the shard and a line per skipped image."""
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, bytes | str]]:
        for number, (item, label) in enumerate(plan.items, plan.first):
            try:
                kind, data = reencode(item.image_bytes(), item.name, resize, quality)
            except UserError as error:
                skipped.append(printable(f"{item.name}: {error}"))
            else:
                about = {"name": item.name} | ({} if label is None else {"class": item.label}) | (item.targets or {})
                members = {"__key__": f"{number:09}", kind: data, "json": json.dumps(about, default=str).encode()}
                yield members | ({} if label is None else {"cls": str(label).encode()})
            add_progress(1)

    write_tar(plan.path, samples())
    shard = index_tar(plan.path)
    write_atomic(plan.record, json.dumps({"shard": asdict(shard), "skipped": skipped}).encode())
    return shard, skipped
