"""Turn any collection of images into WebDataset shards with an index.

python data/prepare.py digits shards/digits                               built-in example
python data/prepare.py photos/ shards/photos --val-fraction 0.1           a folder; sub-folders are the classes
python data/prepare.py ILSVRC2012_img_train.tar shards/imagenet --resize 512
python data/prepare.py cifar10.tar.xz shards/cifar10 --val-fraction 0.1   tar (gz, bz2, xz) or zip
python data/prepare.py shards/made-elsewhere --index                      index WebDataset tars where they are
python data/prepare.py shards/photos --verify                             check every byte
python data/prepare.py photos/ shards/photos --repair                     write damaged shards again, from the images
python data/prepare.py shards/photos --repair                             the same without them: keep what is whole
"""

import argparse
import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np

from configs.errors import Parser, UserError, reason, run_main
from configs.files import write_whole
from data.index import describe, index_folder, verify
from data.pool import count, run_tasks
from data.reencode import Options, convert
from data.repair import LOST, repair, salvaged
from data.shards import Index, Shard, flaw, index_file, index_tar, read_index, write_index, write_tar
from data.sources import Item, open_source

ORDER_SEED = 0  # of the order in which images go into shards, and of the held-out ones


@dataclass(frozen=True, eq=False)
class Task:
    """One shard to write."""

    path: Path
    items: list[tuple[Item, int | None]]  # with the label's number
    first: int  # number of its first image in the split

    @property
    def record(self) -> Path:
        """Says that the shard is done, until index.json does."""
        return self.path.with_name(f".{self.path.stem}.record.json")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source", help="`digits`, a folder, a zip, a tar (plain, gz, bz2, xz), the ILSVRC2012 train tar"
    )
    parser.add_argument(
        "out", nargs="?", help="folder for the shards; not given with --index, --verify and the second way of --repair"
    )
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
    parser.add_argument(
        "--repair",
        action="store_true",
        help="with SOURCE OUT: check every byte of the shards in OUT and write the damaged ones again; "
        "with a folder of shards alone: write damaged indexes again, and of damaged tars keep the whole images",
    )
    args = parser.parse_args(argv)
    in_place = args.index or args.verify or (args.repair and not args.out)
    if not args.source or bool(args.out) == in_place or args.index + args.verify + args.repair > 1:
        parser.error("give SOURCE OUT, or one folder of shards with --index, --verify or --repair")
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
    elif args.repair and not args.out:
        repair(Path(args.source), args.workers)
    else:
        prepare(args)


def prepare(args: argparse.Namespace) -> None:
    """Write the shards of a source. Run again after an interruption, it goes on with the shards that are missing."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    if out.exists() and not (out / "source.json").exists() and any(not f.name.startswith(".") for f in out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by this command: choose another folder")
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open_source(args.source, out, args.no_labels) as items:
            print(f"{args.source}: {len(items):,} images", flush=True)
            write_all(args, out, items)
    finally:
        if created and out.exists() and not any(out.iterdir()):
            out.rmdir()


def write_all(args: argparse.Namespace, out: Path, items: list[Item]) -> None:
    """Write the shards that are missing, then the index."""
    splits = hold_out(items, args.val_fraction)
    claim(out, args, items)
    for file in out.glob(".*.part"):  # left by a call that was killed
        file.unlink()
    classes = None if args.no_labels or items[0].label is None else sorted({item.label for item in items})
    tasks = plan(out, splits, classes, args.shard_size)
    done = finished(out, tasks, args)
    missing = [task for task in tasks if task not in done]
    if not missing and (out / "index.json").exists() and not any(task.record.exists() for task in tasks):
        print(f"{out} is complete{', nothing is damaged' if args.repair else ' already'}")
        return
    write = partial(write_shard, options=Options(args.resize, args.quality))
    written = run_tasks(write, missing, args.workers, sum(len(t.items) for t in missing)) if missing else []
    records = dict(zip(missing, written, strict=True))
    finish(out, [records.get(task) or done[task] for task in tasks], tasks, classes)


def finished(out: Path, tasks: list[Task], args: argparse.Namespace) -> dict[Task, dict]:
    """Records of the shards that are there, from index.json or left by an interrupted run.

    Those that lack images since a `--repair` without the source are not among them. Their length is checked, with
    `--repair` every byte.
    """
    records = {}
    if (out / "index.json").exists():
        listed = {shard.file: asdict(shard) for shards in read_index(out).splits.values() for shard in shards}
        skipped = left_out(out)
        for task in tasks:
            if task.path.name in listed:
                lines = [skipped[item.name] for item, _ in task.items if item.name in skipped]
                records[task] = {"shard": listed[task.path.name], "skipped": lines}
    records |= {task: json.loads(task.record.read_bytes()) for task in tasks if task.record.exists()}
    lacking = salvaged(out)
    records = {task: record for task, record in records.items() if task.path.name not in lacking}
    shards = [Shard(**record["shard"]) for record in records.values()]
    if args.repair and shards:
        found = run_tasks(partial(checked, out=out), shards, args.workers, sum(shard.samples for shard in shards))
    else:
        found = [flaw(out, shard) for shard in shards]
    for wrong in filter(None, found):
        print(f"{wrong}: it is written again")
    return {task: record for (task, record), wrong in zip(records.items(), found, strict=True) if wrong is None}


def checked(shard: Shard, out: Path) -> str | None:
    """What is wrong with a shard, by every byte; None = nothing."""
    count(shard.samples)
    return flaw(out, shard, digests=True)


def left_out(out: Path) -> dict[str, str]:
    """Lines of skipped.txt by the name of the image (which may itself hold the `: ` that follows it)."""
    path = out / "skipped.txt"
    lines = path.read_bytes().decode().split("\n") if path.exists() else []
    return {line[: colon.start()]: line for line in lines for colon in re.finditer(": ", line)}


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
    if not splits["val"] or not splits["train"]:
        raise UserError(f"--val-fraction {fraction} leaves a split empty: no class has enough images")
    return dict(splits)


def claim(out: Path, args: argparse.Namespace, items: list[Item]) -> None:
    """Mark the folder with what goes into it, or raise `UserError` if it already holds something else."""
    content = hashlib.sha256("\n".join(f"{item.name} {item.stamp}" for item in items).encode()).hexdigest()[:16]
    keys = ("resize", "quality", "shard_size", "val_fraction", "no_labels")
    wanted = {"source": Path(args.source).name, "images": len(items), "content": content}
    wanted |= {key: getattr(args, key) for key in keys}
    mark = out / "source.json"
    if not mark.exists():
        write_whole(mark, json.dumps(wanted, indent=1).encode())
        return
    try:
        held = dict(json.loads(mark.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{mark} is damaged: delete {out} and run this again, or choose another folder") from None
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
    """Write one shard and its index. Returns its record: the shard, and what was left out because it is damaged."""
    skipped: list[str] = []

    def samples():
        for i, (item, label) in enumerate(task.items, task.first):
            try:
                kind, data = convert(read_item(item), item.name, options)
            except UserError as error:
                skipped.append(f"{item.name}: {error}")
            else:
                yield _sample(i, kind, data, label, item)
            count(1)

    write_tar(task.path, samples())
    record = {"shard": asdict(index_tar(task.path)), "skipped": skipped}
    write_whole(task.record, json.dumps(record).encode())
    return record


def read_item(item: Item) -> bytes:
    """An image's bytes. Raises `UserError` for a damaged member of a zip; a source that is gone stops everything."""
    try:
        return item.read_bytes()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
        raise UserError(f"cannot be read from the zip ({reason(error)})") from None


def _sample(number: int, kind: str, data: bytes, label: int | None, item: Item) -> dict[str, bytes | str]:
    about = {"name": item.name} | ({} if label is None else {"class": item.label})
    members = {"__key__": f"{number:09}", kind: data, "json": json.dumps(about).encode()}
    return members if label is None else members | {"cls": str(label).encode()}


def finish(out: Path, records: list[dict], tasks: list[Task], classes: list[str] | None) -> None:
    """Write index.json, list what was left out, and say what there is."""
    splits = defaultdict(list)
    for task, record in zip(tasks, records, strict=True):
        splits[task.path.name.rsplit("-", 1)[0]].append(Shard(**record["shard"]))
    skipped = [line for record in records for line in record["skipped"]]
    if not any(shard.samples for shards in splits.values() for shard in shards):
        for task in tasks:
            for file in (task.path, index_file(task.path), task.record):
                file.unlink()
        (out / "source.json").unlink()
        raise UserError(f"no image of the source could be read, the first: {skipped[0]}")
    if skipped:
        write_whole(out / "skipped.txt", "\n".join([*skipped, ""]).encode())
        print(f"{len(skipped):,} damaged images were left out, listed in {out / 'skipped.txt'}")
    write_index(out, Index(dict(splits), classes))
    (out / LOST).unlink(missing_ok=True)  # what an earlier --repair without the source lost is there again
    for task in tasks:
        task.record.unlink(missing_ok=True)
    describe(out)


if __name__ == "__main__":
    run_main(main)
