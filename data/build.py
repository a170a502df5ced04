"""Build a folder of shards from a source, or complete one after an interruption or damage."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from configs.errors import UserError, printable
from configs.files import write_atomic
from data.collection import check_val, open_collection
from data.index import check_every_byte, describe
from data.name_lists import read_lists, select
from data.planning import PrepareOptions, ShardPlan, Written, claim_folder, hold_out, plan_shards
from data.pool import run_tasks
from data.reading import DAMAGED, KINDS, NEED_OPTION, VALUES, ImageError, number
from data.repair import LOST, salvaged_shards
from data.shards import Index, Shard, find_damage, index_file, read_index, write_index
from data.sources import Item

KIND = re.compile(rf": ({'|'.join(KINDS)}): ")  # in a line of skipped.txt


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
        with open_collection(options, out) as (items, classes, targets):
            _write_missing(options, select(items, lists, options.source), classes, targets)
    finally:
        if created and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _write_missing(options: PrepareOptions, items: list[Item], classes: list[str] | None, targets: dict | None) -> None:
    out, splits = options.out, hold_out(items, options.val_fraction)
    check_val(splits)
    survey = write_sheet = None
    if options.dry_run or not (out / "preview.png").exists():
        survey, write_sheet = _preview(options, splits)
    if options.dry_run:
        write_sheet(out.with_name(f"{out.name}.preview.png"))
        print("no shards were written (--dry-run)")
        return
    claim_folder(options, items, survey)
    if write_sheet:
        write_sheet(out / "preview.png")
    for file in out.glob(".*.part"):  # left behind by a killed run
        file.unlink()
    plans = plan_shards(out, splits, classes, options.shard_size)
    done = _finished_shards(plans, options)
    missing = [plan for plan in plans if plan not in done]
    if not missing and (out / "index.json").exists() and not any(plan.record.exists() for plan in plans):
        print(f"{out} is complete{', nothing is damaged' if options.repair else ' already'}")
        return
    if missing:
        from data.writing import write_shard  # imports torch: here, so that the forked processes share it

        write = partial(write_shard, options=options)
        written = run_tasks(write, missing, options.workers, sum(len(plan.items) for plan in missing))
        done |= dict(zip(missing, written, strict=True))
    _finish(out, {plan: done[plan] for plan in plans}, classes, targets)


def _preview(options: PrepareOptions, splits: dict[str, list[Item]]) -> tuple[dict, Callable[[Path], None]]:
    """Print what the collection contains. Returns the survey for index.json, and what writes the contact sheet.

    Raises `UserError` if images need an option, before the work begins.
    """
    from data.preview import describe, write_pictures  # import torch
    from data.survey import survey

    found = survey(options, splits)
    lines = describe(found)
    for line in lines:
        print(f"  {line}", flush=True)
    _check_options(found.refused)
    return found.as_plain() | {"preview": lines}, partial(write_pictures, found)


def _check_options(refused: list[tuple[str, ImageError]]) -> None:
    """Raise `UserError` if images cannot be used without an option."""
    needs = [(name, error) for name, error in refused if error.kind in NEED_OPTION]
    if not needs:
        return
    name, error = needs[0]
    ranges = [error.found for _, error in needs if error.kind == VALUES]
    more = ""
    if error.kind == VALUES and len(set(ranges)) > 1:
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        more = f" ({len(ranges)} files like it: {number(low)} to {number(high)})"
    raise UserError(f"{printable(name)} {error}{more}")


def _finished_shards(plans: list[ShardPlan], options: PrepareOptions) -> dict[ShardPlan, Written]:
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
            done[plan] = Written(Shard(**record["shard"]), record["skipped"], record.get("notes", {}))
        elif plan.path.name in listed:
            lines = [line for item, _ in plan.items for line in skipped.get(printable(item.name), ())]
            done[plan] = Written(listed[plan.path.name], lines, {})
    shards = [written.shard for written in done.values()]
    if options.repair and shards:
        damage = check_every_byte(out, shards, options.workers)
    else:
        damage = [find_damage(out, shard) for shard in shards]
    for description in filter(None, damage):
        print(f"{description}: rewriting it")
    return {plan: done[plan] for plan, found in zip(done, damage, strict=True) if found is None}


def _skipped_lines(out: Path) -> dict[str, list[str]]:
    """Lines `NAME: REASON` or `NAME#PAGE: REASON` of skipped.txt by name.

    A name may contain `: ` itself, so every prefix is a key.
    """
    path, found = out / "skipped.txt", defaultdict(list)
    for line in path.read_bytes().decode().split("\n") if path.exists() else []:
        for prefix in {re.sub(r"#\d+$", "", line[: colon.start()]) for colon in re.finditer(": ", line)}:
            found[prefix].append(line)
    return found


def _by_kind(skipped: list[str]) -> str:
    """Numbers of the kinds of refusals, the most frequent first."""
    kinds = Counter(found[1] if (found := KIND.search(line)) else DAMAGED for line in skipped)
    return ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda found: (-found[1], found[0]))
    )


def _finish(out: Path, done: dict[ShardPlan, Written], classes: list[str] | None, targets: dict | None) -> None:
    """Write skipped.txt and index.json, remove the records, print a summary."""
    splits = defaultdict(list)
    for plan, written in done.items():
        splits[plan.path.name.rsplit("-", 1)[0]].append(written.shard)
    index = Index(dict(splits), classes, json.loads((out / "source.json").read_bytes()).get("survey"), targets)
    skipped = [line for written in done.values() for line in written.skipped]
    if not any(shard.samples for shard in index.shards):
        for plan in done:
            for file in (plan.path, index_file(plan.path), plan.record):
                file.unlink()
        (out / "source.json").unlink()
        raise UserError(f"no image of the source could be read, the first: {skipped[0]}")
    if skipped:
        write_atomic(out / "skipped.txt", "\n".join([*skipped, ""]).encode())
        print(f"{len(skipped):,} images were left out, listed in {out / 'skipped.txt'}: {_by_kind(skipped)}")
    for note, count in sorted(sum((Counter(written.notes) for written in done.values()), Counter()).items()):
        print(note.format(count))
    write_index(out, index)
    (out / LOST).unlink(missing_ok=True)  # images lost to a repair without the source are complete again
    for plan in done:
        plan.record.unlink(missing_ok=True)
    describe(out)
