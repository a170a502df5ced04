"""Index the tars of other tools; verify and describe a folder of shards."""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from configs.errors import UserError
from configs.log import say
from configs.shell import quote
from data.pool import Pool, add_progress, run_tasks
from data.shard_index import Index, Shard, index_file, read_index, read_index_rows, repair_hint, write_index
from data.shards import Split, find_damage, index_tar
from data.tars import read_rows
from data.vectors import stored_targets

MAX_SHOWN = 10  # names of targets
NUMBER = re.compile(r"[-_.]*\d*([-_]of[-_]\d+)?$")  # of a tar


def describe(folder: Path) -> None:
    """Print the content of a folder of shards."""
    index = read_index(folder)
    for split, shards in index.splits.items():
        samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        say(f"  {split:9} {samples:12,} images {len(shards):6,} shards {size / 1e6:12,.1f} MB")
    if index.targets:
        kind, names = index.targets["kind"], index.targets["names"]
        say(f"  targets: {kind} ({', '.join(names[:MAX_SHOWN])}{', ...' if len(names) > MAX_SHOWN else ''})")
    if index.classes or not index.targets:
        say(f"  {len(index.classes)} classes" if index.classes else "  no labels: for pretraining")


def index_folder(folder: Path, pool: Pool) -> None:
    """Index WebDataset tars of other tools. A tar's split is its name without the number: of train-0001.tar and
    train-00001-of-00010.tar it is train.

    Raises `UserError` for no tars, a damaged one, no images, or too few lines in classes.txt.
    """
    if (folder / "source.json").exists():
        raise UserError(f"{folder} was made by this command and has an index: to rewrite it, {repair_hint(folder)}")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} has no .tar: give the folder of the shards")
    shards = run_tasks(_index_one, tars, pool, len(tars), folder)
    splits, max_label = defaultdict(list), -1
    for tar, shard in zip(tars, shards, strict=True):
        split = NUMBER.sub("", tar.stem) or "train"
        splits[split].append(shard)
        if shard.samples:
            max_label = max(max_label, int(np.load(index_file(tar), allow_pickle=False)["label"].max()))
    if not any(shard.samples for shard in shards):
        raise UserError(f"{folder}: its tars contain no images; a sample needs KEY.jpg, KEY.png, KEY.webp or KEY.npy")
    names = folder / "classes.txt"
    classes = (names.read_text().splitlines() if names.exists() else []) or [str(i) for i in range(max_label + 1)]
    if max_label >= len(classes):
        raise UserError(f"{names} has {len(classes)} lines, but a label is {max_label}: write one line per class")
    write_index(folder, Index(dict(splits), classes or None))
    if targets := stored_targets([Split(folder, name) for name in splits]):
        write_index(folder, Index(dict(splits), classes or None, targets=targets))
    describe(folder)


def _index_one(tar: Path) -> Shard:
    shard = index_tar(tar)
    add_progress(1)
    return shard


def verify(folder: Path, pool: Pool) -> None:
    """Check every byte of every shard. Prints the damaged shards and raises `UserError` if there are any."""
    index = read_index(folder)
    shards = index.shards
    damage = list(filter(None, check_every_byte(folder, shards, pool, index.classes)))
    if damage:
        say("\n".join(damage))
        way_out = f"or keep the undamaged images with `python data/prepare.py {quote(str(folder))} --repair`"
        problem = f"{len(damage)} of {len(shards)} shards are damaged, listed above"
        raise UserError(f"{folder}: {problem}: fetch or prepare them again, {way_out}")
    say(f"{folder}: {len(shards):,} shards, {sum(shard.samples for shard in shards):,} images, no damage")


def check_every_byte(
    folder: Path, shards: list[Shard], pool: Pool, classes: list[str] | None = None
) -> list[str | None]:
    """Description of each shard's damage, with its damaged samples; None if there is none.

    Labels must be numbers of `classes`, if these are given.
    """
    samples = sum(shard.samples for shard in shards)
    check = partial(_check_shard, folder=folder, classes=len(classes) if classes else None)
    return run_tasks(check, shards, pool, samples)


def _check_shard(shard: Shard, folder: Path, classes: int | None) -> str | None:
    tar = folder / shard.file
    add_progress(shard.samples)
    damage = find_damage(folder, shard, digests=True, classes=classes)
    in_tar = damage is not None and damage.startswith(f"{tar} ")  # not in its index
    return damage + _damaged_samples(tar, shard) if in_tar and tar.is_file() and index_file(tar).is_file() else damage


def _damaged_samples(tar: Path, shard: Shard) -> str:
    """Which samples of a damaged tar differ from its index, in parentheses."""
    try:
        rows, indexed = read_rows(tar), read_index_rows(index_file(tar).read_bytes(), shard)
    except (UserError, OSError, ValueError) as error:
        return f" ({error})"
    if not set(indexed.dtype.descr) <= set(rows.dtype.descr):
        return " (its index is damaged as well)"
    rows = rows[list(indexed.dtype.names)]  # older indexes have no targets
    if len(rows) != len(indexed):
        return f" ({len(rows)} images, {len(indexed)} indexed)"
    differ = np.flatnonzero(rows != indexed)
    return f" (images {', '.join(map(str, differ[:10]))} differ)" if len(differ) else " (its images are undamaged)"
