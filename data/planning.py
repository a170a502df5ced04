"""What goes into a folder of shards: options, held-out images, the images of each shard.

A folder is marked in source.json with its source and options, so that a second run can only complete it.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from configs.errors import UserError
from configs.files import write_atomic
from configs.keys import RAY_HELP, BelowOne, argument, option
from data.pool import Pool
from data.reading import Reading
from data.shard_index import Shard
from data.sources import Item

Pixels = Annotated[int, Field(ge=1, le=1 << 16)]
Quality = Annotated[int, Field(ge=1, le=100)]
TileSize = Annotated[int, Field(ge=16, le=1 << 16)]
Overlap = Annotated[int, Field(ge=0, le=1 << 16)]
ShardSize = Annotated[int, Field(ge=1, le=1 << 30)]
Workers = Annotated[int, Field(ge=1, le=1 << 12)]
FILES = ("labels", "val", "val_labels", "test", "test_labels", "boxes", "val_boxes", "test_boxes")
LABEL_OPTIONS = ("splits", "no_splits", "label_column", "path_column", *FILES, "masks", "mask_classes")
TILE_OPTIONS = ("tile", "overlap", "keep_empty")
ORDER_SEED = 0  # of the order of images in shards, and of the choice of held-out images


@dataclass(frozen=True)
class PrepareOptions(Reading):
    """The command line of data/prepare.py: what to write, and how."""

    source: str = argument("`digits`, a folder, a zip, a tar (plain, gz, bz2, xz), the ILSVRC2012 train tar, or a URL")
    out: str | None = argument(
        "folder for the shards, or its URL; omitted with --index, --verify, and --repair without the source",
        default=None,
    )
    resize: Pixels | None = option(None, "shrink images whose shorter side is longer than this, pixels")
    quality: Quality | None = option(None, "re-encode as JPEG of this quality, 1 to 100")
    tile: TileSize | None = option(
        None,
        "cut images into tiles of this side, pixels; the last row and column are shifted inwards, and images smaller "
        "than a tile stay whole (see docs/data.md)",
    )
    overlap: Overlap = option(0, "minimum overlap of neighbouring tiles, pixels")
    keep_empty: bool = option(
        False,
        "keep background tiles; otherwise a tile is dropped if over 90 % of its pixels have no data, if each band has "
        "one value, or if 8-bit bands are nearly uniform (standard deviation below 4) and all white (means above 200) "
        "or all black (means below 8)",
    )
    shard_size: ShardSize = option(5000, "maximum images, or tiles before background is dropped, in a shard")
    workers: Workers = option(len(os.sched_getaffinity(0)), "processes")
    ray: str | None = option(None, RAY_HELP, alone="auto")
    val_fraction: BelowOne = option(0.0, "hold out this share of each class as split val")
    only: Path | None = option(None, "use only the images whose names this file lists (see docs/guide/embed.md)")
    without: tuple[Path, ...] = option((), "leave out the images whose names these files list")
    no_labels: bool = option(False, "folders are not classes: write shards without labels")
    splits: tuple[str, ...] = option(
        (),
        "folders that are splits, NAME=FOLDER, such as train=Training test=Testing; "
        "the rest is left out; the split `unlabeled` has no classes",
    )
    no_splits: bool = option(False, "top folders are classes, also those named like splits")
    labels: Path | None = option(None, "labels of SOURCE: csv, tsv, json lines, parquet, or `path label` lines (.txt)")
    label_column: tuple[str, ...] = option((), "column of --labels with the class; several are kept for other tasks")
    path_column: str | None = option(None, "column of --labels with the file names")
    val: str | None = option(None, "another source: its images are split val")
    val_labels: Path | None = option(None, "labels of split val, as --labels; or the devkit of ILSVRC2012")
    test: str | None = option(None, "another source: its images are split test")
    test_labels: Path | None = option(None, "labels of split test, as --labels")
    boxes: Path | None = option(None, "boxes of SOURCE: a COCO json, or a folder of VOC xml or YOLO txt files")
    val_boxes: Path | None = option(None, "boxes of split val, as --boxes")
    test_boxes: Path | None = option(None, "boxes of split test, as --boxes")
    masks: str | None = option(
        None, "masks for semantic segmentation: a folder of SOURCE, or another source; see docs/data.md"
    )
    mask_classes: Path | None = option(
        None, "classes of the masks: a name a line, or csv with `name,value` or `name,r,g,b`"
    )
    ignore: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = option((255,), "values of masks that are no class")
    dry_run: bool = option(False, "look at the images and write OUT.preview.png; no shards")
    no_plan: bool = option(False, "do not plan a training on the shards (launch/plan.py)")
    index: bool = option(False, "index the .tar files of other tools in SOURCE")
    verify: bool = option(False, "check every byte of the shards in SOURCE")
    repair: bool = option(
        False,
        "with SOURCE OUT: check every byte of the shards in OUT and rewrite damaged ones; with a folder of shards "
        "alone: rewrite damaged indexes, and keep the undamaged images of damaged tars",
    )

    @property
    def pool(self) -> Pool:
        """Where the work is done."""
        return Pool(self.workers, self.ray)


class Part(NamedTuple):
    """What a shard takes from a file: all of it or, with `--tile`, the tiles at some positions of its grid."""

    item: Item
    label: int | None
    number: int  # of the file within the split
    tiles: range


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """One shard to write."""

    path: Path
    parts: list[Part]

    @property
    def record(self) -> Path:
        """File that marks the shard as complete until index.json lists it."""
        return self.path.with_name(f".{self.path.stem}.record.json")


class Written(NamedTuple):
    """A complete shard, a line `NAME: KIND: REASON` per image left out, and the number of each kind of change."""

    shard: Shard
    skipped: list[str]
    notes: dict[str, int]


def divided(items: list[Item]) -> dict[str, list[Item]]:
    """The images of each split; of a collection without splits, all are train."""
    splits = defaultdict(list)
    for item in items:
        splits[item.split or "train"].append(item)
    return dict(splits)


def hold_out(items: list[Item], fraction: float, tiled: bool = False) -> dict[str, list[Item]]:
    """Items of each split; `fraction` of each class of `train` moves to `val`, chosen by a hash of the name.

    Raises `UserError` if the source has its own splits, or a split would be empty.
    """
    splits = defaultdict(list, divided(items))
    if fraction == 0:
        return dict(splits)
    if "val" in splits or "train" not in splits:
        raise UserError(f"--val-fraction splits train, but the source has its own splits: {', '.join(sorted(splits))}")
    by_label = defaultdict(list)
    for item in splits.pop("train"):
        by_label[item.label].append(item)
    for members in by_label.values():
        members.sort(
            key=lambda item: hashlib.sha256(f"{ORDER_SEED} {item.name}".encode(errors="surrogateescape")).digest()
        )
        count = min(round(fraction * len(members)), len(members) - 1)  # train keeps at least one
        splits["val"] += members[:count]
        splits["train"] += members[count:]
    if not splits["val"] or not splits["train"]:
        several = ""
        if tiled:
            few = f"{len(items):,} image{'s' * (len(items) > 1)}"
            several = f"; the source has {few}, whose tiles stay together: add images, or --val SOURCE"
        raise UserError(f"--val-fraction {fraction} leaves a split empty: no class has enough images{several}")
    return dict(splits)


def claim_folder(out: Path, options: PrepareOptions, items: list[Item], survey: dict | None) -> None:
    """Write source.json with the survey to `out`. Raises `UserError` if there is one of another source or options."""
    content = _digest(f"{item.name} {item.stamp}" for item in items)
    new = {"source": Path(options.source).name, "images": len(items), "content": content}
    defaults = {field.name: field.default for field in fields(Reading)}
    for key in ("resize", "quality", "shard_size", "val_fraction", "no_labels", *defaults):
        value = getattr(options, key)
        new[key] = list(value) if isinstance(value, tuple) else value
    for key in (*LABEL_OPTIONS, *TILE_OPTIONS):  # only those that are given: older folders do not list them
        if value := getattr(options, key):
            new[key] = (
                list(value)
                if isinstance(value, tuple)
                else Path(value).name
                if key in FILES or isinstance(value, Path)
                else value
            )
    path = out / "source.json"
    if not path.exists():
        write_atomic(path, json.dumps(new | {"survey": survey}, indent=1).encode())
        return
    try:
        old = defaults | dict(json.loads(path.read_bytes()))  # older folders lack these options
    except (ValueError, TypeError):
        way_out = f"delete {options.out} and run this again, or choose another folder"
        raise UserError(f"{path} is damaged: {way_out}") from None
    keys = [*new, *(key for key in (*LABEL_OPTIONS, *TILE_OPTIONS) if key in old and key not in new)]
    changes = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key))
    if changes:
        raise UserError(f"{options.out} has another data set ({changes}): choose another folder or delete it")


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def plan_shards(
    out: Path, splits: dict[str, list[Item]], classes: list[str] | None, shard_size: int, tiles: dict[Item, int]
) -> list[ShardPlan]:
    """The shards to write: each split in random order, divided evenly into shards of at most `shard_size` images.

    `tiles` has the number of tiles of each file, if they are cut; those of one file may go to several shards.
    """
    label_numbers = {name: i for i, name in enumerate(classes or [])}
    plans = []
    for split, items in sorted(splits.items()):
        files = [items[k] for k in np.random.default_rng(ORDER_SEED).permutation(len(items))]
        for i, parts in enumerate(_divided([tiles.get(item, 1) for item in files], shard_size)):
            members = [Part(files[k], label_numbers.get(files[k].label), k, part) for k, part in parts]
            plans.append(ShardPlan(out / f"{split}-{i:06}.tar", members))
    return plans


def _divided(counts: list[int], shard_size: int) -> Iterator[list[tuple[int, range]]]:
    """The files of each shard, with ranges of their tiles, of which file k has `counts[k]`."""
    total, file, used = sum(counts), 0, 0
    shards = -(-total // shard_size)
    for i in range(shards):
        left, parts = total // shards + (i < total % shards), []
        while left:
            taken = range(used, min(used + left, counts[file]))
            parts.append((file, taken))
            left, used = left - len(taken), taken.stop
            if used == counts[file]:
                file, used = file + 1, 0
        yield parts
