"""Build a folder of shards from a source, or complete one after an interruption or damage."""

import json
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomic
from data.index import check_every_byte, describe
from data.name_lists import escape_name, read_lists, select
from data.planning import PrepareOptions, ShardPlan, claim_folder, hold_out, plan_shards
from data.pool import run_tasks
from data.repair import LOST, salvaged_shards
from data.shards import Index, Shard, find_damage, index_file, read_index, write_index
from data.sources import Item, open_source


def build(options: PrepareOptions) -> None:
    """Write the shards of a source. After an interruption, a second run writes only the missing shards.

    Raises `UserError` if the source cannot be read, or the folder has other content.
    """
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    if out.exists() and not (out / "source.json").exists() and any(not f.name.startswith(".") for f in out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by this command: choose another folder")
    lists = read_lists(options.only, options.without)
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open_source(options.source, out, options.no_labels) as items:
            print(f"{options.source}: {len(items):,} images", flush=True)
            items = select(items, lists, options.source)
            _write_missing(options, items)
    finally:
        if created and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _write_missing(options: PrepareOptions, items: list[Item]) -> None:
    out, splits = options.out, hold_out(items, options.val_fraction)
    claim_folder(options, items)
    for file in out.glob(".*.part"):  # left behind by a killed run
        file.unlink()
    classes = None if options.no_labels or items[0].label is None else sorted({item.label for item in items})
    plans = plan_shards(out, splits, classes, options.shard_size)
    done = _finished_shards(plans, options)
    missing = [plan for plan in plans if plan not in done]
    if not missing and (out / "index.json").exists() and not any(plan.record.exists() for plan in plans):
        print(f"{out} is complete{', nothing is damaged' if options.repair else ' already'}")
        return
    if missing:
        from data.writing import write_shard  # imports torch: here, so that the forked processes share it

        write = partial(write_shard, resize=options.resize, quality=options.quality)
        written = run_tasks(write, missing, options.workers, sum(len(plan.items) for plan in missing))
        done |= dict(zip(missing, written, strict=True))
    _finish(out, {plan: done[plan] for plan in plans}, classes)


def _finished_shards(plans: list[ShardPlan], options: PrepareOptions) -> dict[ShardPlan, tuple[Shard, list[str]]]:
    """Finished shards and their skipped images, from index.json or from the records of an interrupted run.

    Their sizes are checked, with `--repair` every byte. Shards that lost images to a repair without the source do not
    count as finished.
    """
    out, done, incomplete = options.out, {}, salvaged_shards(options.out)
    listed = {shard.file: shard for shard in read_index(out).shards} if (out / "index.json").exists() else {}
    skipped = _skipped_lines(out)
    for plan in plans:
        if plan.path.name in incomplete:
            continue
        if plan.record.exists():
            record = json.loads(plan.record.read_bytes())
            done[plan] = Shard(**record["shard"]), record["skipped"]
        elif plan.path.name in listed:
            done[plan] = listed[plan.path.name], [skipped[i.name] for i, _ in plan.items if i.name in skipped]
    shards = [shard for shard, _ in done.values()]
    if options.repair and shards:
        damage = check_every_byte(out, shards, options.workers)
    else:
        damage = [find_damage(out, shard) for shard in shards]
    for description in filter(None, damage):
        print(f"{description}: rewriting it")
    return {plan: done[plan] for plan, found in zip(done, damage, strict=True) if found is None}


def _skipped_lines(out: Path) -> dict[str, str]:
    """Lines `name: reason` of skipped.txt by name; a name may contain `: ` itself, so every prefix is a key."""
    path = out / "skipped.txt"
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n") if path.exists() else []
    return {line[: colon.start()]: line for line in lines for colon in re.finditer(": ", line)}


def _finish(out: Path, done: dict[ShardPlan, tuple[Shard, list[str]]], classes: list[str] | None) -> None:
    """Write skipped.txt and index.json, remove the records, print a summary."""
    splits = defaultdict(list)
    for plan, (shard, _) in done.items():
        splits[plan.path.name.rsplit("-", 1)[0]].append(shard)
    index = Index(dict(splits), classes)
    skipped = [line for _, lines in done.values() for line in lines]
    if not any(shard.samples for shard in index.shards):
        for plan in done:
            for file in (plan.path, index_file(plan.path), plan.record):
                file.unlink()
        (out / "source.json").unlink()
        raise UserError(f"no image of the source could be read, the first: {escape_name(skipped[0])}")
    if skipped:
        write_atomic(out / "skipped.txt", "\n".join([*skipped, ""]).encode("utf-8", "surrogateescape"))
        print(f"{len(skipped):,} damaged images were left out, listed in {out / 'skipped.txt'}")
    write_index(out, index)
    (out / LOST).unlink(missing_ok=True)  # images lost to a repair without the source are complete again
    for plan in done:
        plan.record.unlink(missing_ok=True)
    describe(out)
