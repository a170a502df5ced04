"""Turn any collection of images into WebDataset shards with an index.

python data/prepare.py digits shards/digits                               built-in example
python data/prepare.py photos/ shards/photos --val-fraction 0.1           a folder; sub-folders are the classes
python data/prepare.py ILSVRC2012_img_train.tar shards/imagenet --resize 512
python data/prepare.py cifar10.tar.xz shards/cifar10 --val-fraction 0.1   tar (gz, bz2, xz) or zip
python data/prepare.py shards/made-elsewhere --index                      index WebDataset tars where they are
python data/prepare.py shards/photos --verify                             check every byte
"""

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np

from configs.errors import UserError, run_main
from configs.files import write_whole
from data.convert import Options, convert
from data.pool import count, run_tasks
from data.shards import Index, Shard, index_file, index_tar, read_index, read_rows, sha256, write_index, write_tar
from data.sources import Item, open_source

ORDER_SEED = 0  # of the order in which images go into shards, and of the held-out ones


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    path: Path
    items: list[tuple[Item, int | None]]  # with the label's number
    first: int  # number of its first image in the split


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", help="`digits`, a folder, a zip, a tar (plain, gz, bz2, xz), the ILSVRC2012 train tar"
    )
    parser.add_argument("out", nargs="?", help="folder for the shards; not given with --index and --verify")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer than this"
    )
    parser.add_argument("--quality", type=int, metavar="Q", help="re-encode as JPEG of this quality, 1 to 100")
    parser.add_argument(
        "--shard-size", type=int, default=5000, metavar="N", help="images in a shard (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="hold out this share of each class"
    )
    parser.add_argument("--no-labels", action="store_true", help="folders are not classes: make label-free shards")
    parser.add_argument("--index", action="store_true", help="index the .tar files in SOURCE, made by other tools")
    parser.add_argument("--verify", action="store_true", help="check every byte of the shards in SOURCE")
    args = parser.parse_args(argv)
    if bool(args.out) == (args.index or args.verify):
        parser.error("give SOURCE OUT, or one folder of shards with --index or --verify")
    for name, low, high in (
        ("resize", 1, 1 << 16),
        ("quality", 1, 100),
        ("shard_size", 1, 1 << 30),
        ("workers", 1, 1 << 12),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: must be {low} to {high}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction {args.val_fraction}: must be at least 0 and below 1")
    return args


def main() -> None:
    """Entry point."""
    args = parse()
    if args.verify:
        verify(Path(args.source), args.workers)
    elif args.index:
        index_folder(Path(args.source), args.workers)
    else:
        prepare(args)


def prepare(args: argparse.Namespace) -> None:
    """Write the shards of a source. Run again after an interruption, it goes on with the shards that are missing."""
    out = Path(args.out)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with open_source(args.source, out) as items:
            print(f"{args.source}: {len(items):,} images", flush=True)
            classes = None if args.no_labels or items[0].label is None else sorted({item.label for item in items})
            splits = hold_out(items, args.val_fraction)
            claim(out, args, items)
            if (out / "index.json").exists():
                print(f"{out} is complete already")
                return
            tasks = plan(out, splits, classes, args.shard_size)
            options = Options(args.resize, args.quality)
            records = run_tasks(partial(write_shard, options=options), tasks, args.workers, len(items))
    finally:
        if created and not any(out.iterdir()):
            out.rmdir()
    finish(out, tasks, records, classes)


def hold_out(items: list[Item], fraction: float) -> dict[str, list[Item]]:
    """Items of each split; `fraction` of each class of `train` becomes `val`, chosen by a hash of the name."""
    splits = defaultdict(list)
    for item in items:
        splits[item.split].append(item)
    if fraction == 0:
        return dict(splits)
    if "val" in splits or "train" not in splits:
        raise UserError(f"--val-fraction splits train, but the source has its own splits: {', '.join(sorted(splits))}")
    by_label = defaultdict(list)
    for item in splits.pop("train"):
        by_label[item.label].append(item)
    for members in by_label.values():
        members.sort(key=lambda item: hashlib.sha256(f"{ORDER_SEED} {item.name}".encode()).digest())
        held = round(fraction * len(members))
        splits["val"] += members[:held]
        splits["train"] += members[held:]
    return {split: members for split, members in splits.items() if members}


def claim(out: Path, args: argparse.Namespace, items: list[Item]) -> None:
    """Mark the folder with what goes into it, or raise `UserError` if it already holds something else."""
    names = hashlib.sha256("\n".join(f"{item.name} {item.size}" for item in items).encode()).hexdigest()[:16]
    keys = ("resize", "quality", "shard_size", "val_fraction", "no_labels")
    wanted = {"source": Path(args.source).name, "images": len(items), "names": names} | {
        k: getattr(args, k) for k in keys
    }
    mark = out / "source.json"
    if not mark.exists():
        if any(file for file in out.iterdir() if not file.name.startswith(".")):
            raise UserError(f"{out} is not empty and was not made by this command: choose another folder")
        write_whole(mark, json.dumps(wanted, indent=1).encode())
        return
    held = json.loads(mark.read_bytes())
    differences = [f"{key} {held.get(key)} there, {wanted[key]} here" for key in wanted if held.get(key) != wanted[key]]
    if differences:
        raise UserError(f"{out} holds another data set ({'; '.join(differences)}): choose another folder or delete it")


def plan(out: Path, splits: dict[str, list[Item]], classes: list[str] | None, shard_size: int) -> list[Task]:
    """The shards to write: each split in a random order, cut into equal parts of at most `shard_size`."""
    number = {name: i for i, name in enumerate(classes or [])}
    tasks = []
    for split, items in sorted(splits.items()):
        order = np.random.default_rng(ORDER_SEED).permutation(len(items))
        first = 0
        for i, part in enumerate(np.array_split(order, -(-len(items) // shard_size))):
            members = [(items[k], number.get(items[k].label)) for k in part]
            tasks.append(Task(out / f"{split}-{i:06}.tar", members, first))
            first += len(part)
    return tasks


def write_shard(task: Task, options: Options) -> dict:
    """Write one shard and its index; skip it if it is there. Returns its record: the shard, and damaged images."""
    record_file = task.path.with_name(f".{task.path.stem}.json")
    if record_file.exists() and task.path.exists() and index_file(task.path).exists():
        count(len(task.items))
        return json.loads(record_file.read_bytes())
    skipped: list[str] = []

    def samples():
        for i, (item, label) in enumerate(task.items, task.first):
            try:
                kind, data = convert(item.read(), item.name, options)
            except UserError as error:
                skipped.append(f"{item.name}: {error}")
            else:
                yield _sample(i, kind, data, label, item)
            count(1)

    write_tar(task.path, samples())
    record = {"shard": asdict(index_tar(task.path)), "skipped": skipped}
    write_whole(record_file, json.dumps(record).encode())
    return record


def _sample(number: int, kind: str, data: bytes, label: int | None, item: Item) -> dict[str, bytes | str]:
    about = {"name": item.name} | ({} if label is None else {"class": item.label})
    members = {"__key__": f"{number:09}", kind: data, "json": json.dumps(about).encode()}
    return members if label is None else members | {"cls": str(label).encode()}


def finish(out: Path, tasks: list[Task], records: list[dict], classes: list[str] | None) -> None:
    """Write index.json, list what was left out, and say what there is."""
    splits = defaultdict(list)
    for task, record in zip(tasks, records, strict=True):
        splits[task.path.name.rsplit("-", 1)[0]].append(Shard(**record["shard"]))
    skipped = [line for record in records for line in record["skipped"]]
    if not any(shard.samples for shards in splits.values() for shard in shards):
        raise UserError(f"no image of the source could be read, the first: {skipped[0]}")
    if skipped:
        write_whole(out / "skipped.txt", "\n".join([*skipped, ""]).encode())
        print(f"{len(skipped):,} damaged images were left out, listed in {out / 'skipped.txt'}")
    write_index(out, Index(dict(splits), classes))
    for task in tasks:
        task.path.with_name(f".{task.path.stem}.json").unlink()
    describe(out)


def describe(folder: Path) -> None:
    """Print what a folder of shards holds, and how to go on."""
    index = read_index(folder)
    for split, shards in index.splits.items():
        samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        print(f"  {split:6} {samples:12,} images {len(shards):6,} shards {size / 1e6:12,.1f} MB")
    print(f"  {len(index.classes)} classes" if index.classes else "  no labels: for pretraining")
    print(f"ready: deepspeed pretrain/main.py --data.path {folder}")


def index_folder(folder: Path, workers: int) -> None:
    """Index WebDataset tars made elsewhere. A split is a tar's name up to its number (train-0001.tar -> train)."""
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
            f"{folder}: {len(damage)} of {len(shards)} shards are damaged, listed above: prepare or fetch them again"
        )
    print(f"{folder}: {len(shards):,} shards, {samples:,} images, every byte as indexed")


def _verify_one(shard: Shard, folder: Path) -> str | None:
    tar = folder / shard.file
    count(shard.samples)
    for path, digest in ((tar, shard.sha256), (index_file(tar), shard.index_sha256)):
        if not path.exists():
            return f"{path} is missing"
        if sha256(path) != digest:
            return f"{path} is not what was indexed{_which(tar) if path == tar else ''}"
    return None


def _which(tar: Path) -> str:
    """Which samples of a damaged shard differ from its index."""
    try:
        rows, known = read_rows(tar), np.load(index_file(tar), allow_pickle=False)
    except (UserError, OSError, ValueError) as error:
        return f" ({error})"
    if len(rows) != len(known):
        return f" ({len(rows)} images, {len(known)} indexed)"
    differ = np.flatnonzero(rows != known)
    return f" (images {', '.join(map(str, differ[:10]))} differ)" if len(differ) else " (its images are whole)"


if __name__ == "__main__":
    run_main(main)
