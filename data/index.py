"""Indexing shards that other tools made, verifying and describing a folder of shards."""

from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from configs.errors import UserError
from data.pool import count, run_tasks
from data.shards import Index, Shard, flaw, index_file, index_tar, read_index, read_rows, remedy, write_index


def describe(folder: Path) -> None:
    """Print what a folder of shards holds, and how to go on."""
    index = read_index(folder)
    for split, shards in index.splits.items():
        samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        print(f"  {split:6} {samples:12,} images {len(shards):6,} shards {size / 1e6:12,.1f} MB")
    print(f"  {len(index.classes)} classes" if index.classes else "  no labels: for pretraining")
    recipe = "--config configs/pretrain/photos.yaml"
    print(f"ready: deepspeed pretrain/main.py {recipe} --data.path {folder} --run.name {folder.absolute().name}")


def index_folder(folder: Path, workers: int) -> None:
    """Index WebDataset tars made elsewhere. A split is a tar's name up to its number (train-0001.tar -> train)."""
    if (folder / "source.json").exists():
        raise UserError(f"{folder} was made by this command and has its index: to mend it, {remedy(folder)}")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} has no .tar: give the folder that holds the shards")
    shards = run_tasks(_index_one, tars, workers, len(tars))
    splits, top = defaultdict(list), -1
    for tar, shard in zip(tars, shards, strict=True):
        split = tar.stem.rstrip("0123456789").rstrip("-_.") or "train"
        splits[split].append(shard)
        if shard.samples:
            top = max(top, int(np.load(index_file(tar), allow_pickle=False)["label"].max()))
    if not any(shard.samples for shard in shards):
        raise UserError(f"{folder}: its tars hold no image; a sample needs KEY.jpg, KEY.png, KEY.webp or KEY.npy")
    classes = _names(folder) or ([str(i) for i in range(top + 1)] or None)
    if classes is not None and top >= len(classes):
        raise UserError(
            f"{folder / 'classes.txt'} names {len(classes)} classes, but a label is {top}: one line a class"
        )
    write_index(folder, Index(dict(splits), classes))
    describe(folder)


def _names(folder: Path) -> list[str] | None:
    """Class names of foreign shards: a line each in classes.txt, if there is one."""
    path = folder / "classes.txt"
    return path.read_text().splitlines() if path.exists() else None


def _index_one(tar: Path) -> Shard:
    shard = index_tar(tar)
    count(1)
    return shard


def verify(folder: Path, workers: int) -> None:
    """Check every byte against the index. Raises `UserError` that names the damaged shards."""
    index = read_index(folder)
    shards = [shard for shards in index.splits.values() for shard in shards]
    samples = sum(shard.samples for shard in shards)
    found = run_tasks(partial(_verify_one, folder=folder), shards, workers, samples)
    damage = [line for line in found if line]
    if damage:
        print("\n".join(damage))
        raise UserError(
            f"{folder}: {len(damage)} of {len(shards)} shards are damaged, listed above: fetch or prepare them again, "
            f"or keep what is whole with `python data/prepare.py {folder} --repair`"
        )
    print(f"{folder}: {len(shards):,} shards, {samples:,} images, every byte as indexed")


def _verify_one(shard: Shard, folder: Path) -> str | None:
    tar = folder / shard.file
    count(shard.samples)
    wrong = flaw(folder, shard, digests=True)
    of_tar = wrong is not None and wrong.startswith(f"{tar} ")  # not of its index
    return wrong + _which(tar) if of_tar and tar.exists() and index_file(tar).exists() else wrong


def _which(tar: Path) -> str:
    """Which samples of a damaged shard differ from its index."""
    try:
        rows, known = read_rows(tar), np.load(index_file(tar), allow_pickle=False)
    except (UserError, OSError, ValueError) as error:
        return f" ({error})"
    if known.dtype != rows.dtype:
        return " (its index is damaged, too)"
    if len(rows) != len(known):
        return f" ({len(rows)} images, {len(known)} indexed)"
    differ = np.flatnonzero(rows != known)
    return f" (images {', '.join(map(str, differ[:10]))} differ)" if len(differ) else " (its images are whole)"
