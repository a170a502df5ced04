"""Build a folder of shards from a source, or complete one after an interruption or damage."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from configs.errors import UserError, counted, printable
from configs.files import write_atomic
from configs.log import say
from data.class_counts import check_val, count_classes, split_lines
from data.collection import open_collection
from data.grid import Sizes, count_tiles
from data.index import check_every_byte, describe
from data.masks import read_classes
from data.name_lists import read_lists, select
from data.planning import PrepareOptions, ShardPlan, Written, claim_folder, hold_out, plan_shards
from data.pool import run_tasks
from data.reading import (
    DAMAGED,
    KINDS,
    MASK_CLASS,
    MASK_SIZE,
    NEED_OPTION,
    NO_MASK,
    VALUES,
    ImageError,
    Plural,
    number,
)
from data.remote import is_url
from data.remote_files import Upload, check_out_url
from data.repair import LOST, salvaged_shards
from data.shard_index import Index, Shard, index_file, read_index, write_index
from data.shards import find_damage
from data.sources import Item
from data.vectors import preview_lines, settle_targets

if TYPE_CHECKING:
    from data.survey import Survey

KIND = re.compile(rf": ({'|'.join(KINDS)}): ")  # in a line of skipped.txt


def build(options: PrepareOptions) -> None:
    """Write the shards of a source. After an interruption, a second run writes only the missing shards.

    Raises `UserError` if the source cannot be read, or the folder has other content.
    """
    if is_url(options.out):
        upload = Upload(check_out_url(options.out))
        if options.repair:
            raise UserError(f"--repair reads every byte: fetch {upload.url}, repair the folder, and upload it again")
        with TemporaryDirectory(prefix="prepare-") as mirror:  # of the small files; TMPDIR chooses the disk
            upload.pull(Path(mirror))
            _build(replace(options, out=upload.url), Path(mirror), upload)
        return
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder")
    if out.exists() and not (out / "source.json").exists() and any(not f.name.startswith(".") for f in out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by this command: choose another folder")
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _build(replace(options, out=str(out)), out, None)
    finally:
        if created and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _build(options: PrepareOptions, out: Path, upload: Upload | None) -> None:
    """Write what is missing in a folder or, with `upload`, at the URL whose small files it mirrors."""
    lists = read_lists(options.only, options.without)
    with open_collection(options, out) as (items, classes, boxes):
        if upload and options.ray and any(_unpacked(item, out) for item in items):
            raise UserError(
                f"{options.source} is unpacked on this machine, where Ray's other nodes cannot read it: "
                "unpack it first, or give a folder as OUT"
            )
        _write_missing(options, out, upload, select(items, lists, options.source), classes, boxes)


def _unpacked(item: Item, out: Path) -> bool:
    """Whether an image or its mask is in an archive that was unpacked into `out`."""
    return any(part and part.container.startswith(f"{out}/") for part in (item, item.mask))


def _write_missing(
    options: PrepareOptions,
    out: Path,
    upload: Upload | None,
    items: list[Item],
    classes: list[str] | None,
    boxes: dict | None,
) -> None:
    items, targets = settle_targets(items)
    targets = boxes or targets
    splits = hold_out(items, options.val_fraction, tiled=options.tile is not None)
    counts = count_classes(splits)
    kind = "masks" if options.masks else targets["kind"] if targets else None
    lines = [*split_lines(counts, kind), *preview_lines(splits, targets)]
    for line in lines:
        say(f"  {line}")
    check_val(counts)
    sizes = None
    if options.tile:
        from data.tiles import measure  # imports torch

        sizes = measure(items, options)
    survey = write_sheet = None
    if options.dry_run or not (out / "preview.png").exists():
        survey, write_sheet = _preview(options, splits, sizes, lines)
    if options.dry_run:
        name = f"{PurePosixPath(options.out).name}.preview.png"
        write_sheet(Path(name) if upload else out.with_name(name))
        say("no shards were written (--dry-run)")
        return
    claim_folder(out, options, items, survey)
    if write_sheet:
        write_sheet(out / "preview.png", f"{options.out}/preview.png")
    if upload:
        upload.push(*(path for path in (out / "source.json", out / "preview.png") if path.exists()))
    for file in out.glob(".*.part"):  # left behind by a killed run
        file.unlink()
    tiles = {item: max(1, count_tiles(found, options.tile, options.overlap)) for item, found in (sizes or {}).items()}
    plans = plan_shards(out, splits, classes, options.shard_size, tiles)
    done = _finished_shards(plans, out, upload, options)
    missing = [plan for plan in plans if plan not in done]
    listed = (out / "index.json").exists()
    if listed and targets:
        listed = read_index(out).targets == targets  # those of older versions lack them
    if not missing and listed and not any(plan.record.exists() for plan in plans):
        say(f"{options.out} is complete{', nothing is damaged' if options.repair else ' already'}")
        return
    if done and missing:
        samples = sum(written.shard.samples for written in done.values())
        images = counted(samples, "tile" if options.tile else "image")
        say(f"{len(done):,} of {counted(len(plans), 'shard')} ({images}) are complete already")
    if missing:
        from data.writing import write_shard  # imports torch: here, so that the forked processes share it

        write = partial(write_shard, options=options, upload=upload)
        images = sum(len(part.tiles) for plan in missing for part in plan.parts)
        written = run_tasks(write, missing, options.pool, images, None if upload else out)
        done |= dict(zip(missing, written, strict=True))
    _finish(out, upload, {plan: done[plan] for plan in plans}, classes, targets, options)


def _preview(
    options: PrepareOptions, splits: dict[str, list[Item]], sizes: Sizes | None, first: list[str]
) -> tuple[dict, Callable[..., None]]:
    """Print what the collection contains. Returns the survey for index.json, and what writes the contact sheet.

    Raises `UserError` if images need an option, before the work begins.
    """
    from data.preview import describe, write_pictures  # import torch
    from data.survey import survey

    found = survey(options, splits, sizes)
    lines = describe(found, sum(map(len, splits.values())))
    for line in lines:
        say(f"  {line}")
    _check_options(found.refused)
    _check_masks(found)
    return found.as_plain() | {"preview": [*first, *lines]}, partial(write_pictures, found)


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


def _check_masks(found: "Survey") -> None:
    """Raise `UserError` if no mask that was looked at can be used: writing would take long and leave nothing."""
    kinds = {error.kind for _, error in found.refused}
    if not found.sides and kinds & {NO_MASK, MASK_SIZE, MASK_CLASS}:
        name, error = found.refused[0]
        raise UserError(f"no image looked at can be used with its mask, the first: {printable(name)}: {error}")


def _finished_shards(
    plans: list[ShardPlan], out: Path, upload: Upload | None, options: PrepareOptions
) -> dict[ShardPlan, Written]:
    """Finished shards and their skipped images, from index.json or from the records of an interrupted run.

    Their sizes are checked, with `--repair` every byte. Shards that lost images to a repair without the source do not
    count as finished.
    """
    done, incomplete = {}, salvaged_shards(out)
    listed = {shard.file: shard for shard in read_index(out).shards} if (out / "index.json").exists() else {}
    skipped = _skipped_lines(out)
    for plan in plans:
        if plan.path.name in incomplete:
            continue
        if plan.record.exists():
            record = json.loads(plan.record.read_bytes())
            done[plan] = Written(Shard(**record["shard"]), record["skipped"], record.get("notes", {}))
        elif plan.path.name in listed:
            lines = [line for part in plan.parts for line in skipped.get(printable(part.item.name), ())]
            done[plan] = Written(listed[plan.path.name], lines, {})
    shards = [written.shard for written in done.values()]
    if options.repair and shards:
        damage = check_every_byte(out, shards, options.pool)
    elif upload:
        damage = upload.damage(shards)
    else:
        damage = [find_damage(out, shard) for shard in shards]
    for description in filter(None, damage):
        say(f"{description}: rewriting it")
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


def _mask_targets(options: PrepareOptions, survey: dict) -> dict:
    """What index.json says about masks."""
    classes = read_classes(options.mask_classes, options.ignore)
    about = {"kind": "mask", "names": classes.names, "ignore": classes.void}
    return about | ({"pixels": survey["mask_pixels"]} if "mask_pixels" in survey else {})


def _finish(
    out: Path,
    upload: Upload | None,
    done: dict[ShardPlan, Written],
    classes: list[str] | None,
    targets: dict | None,
    options: PrepareOptions,
) -> None:
    """Write skipped.txt and index.json, remove the records, print a summary."""
    splits = defaultdict(list)
    for plan, written in done.items():
        splits[plan.path.name.rsplit("-", 1)[0]].append(written.shard)
    survey, tiled = json.loads((out / "source.json").read_bytes()).get("survey"), options.tile is not None
    targets = _mask_targets(options, survey or {}) if options.masks else targets
    index = Index(dict(splits), classes, survey, targets)
    skipped = list(dict.fromkeys(line for written in done.values() for line in written.skipped))  # shards share images
    if not any(shard.samples for shard in index.shards):
        useless = [file for plan in done for file in (plan.path, index_file(plan.path), plan.record)]
        useless += [out / "source.json"]
        for file in useless:
            file.unlink(missing_ok=True)  # a mirror has only some of them
        if upload:
            upload.delete(useless)
        if not skipped:
            raise UserError("all tiles are background: add --keep-empty to keep them")
        raise UserError(f"no image of the source could be read, the first: {skipped[0]}")
    if skipped:
        write_atomic(out / "skipped.txt", "\n".join([*skipped, ""]).encode())
        one, more = ("image", "images")
        if tiled:
            one, more = "image, or group of its tiles,", "images, or groups of an image's tiles,"
        left_out = f"1 {one} was" if len(skipped) == 1 else f"{len(skipped):,} {more} were"
        say(f"{left_out} left out, listed in {options.out}/skipped.txt: {_by_kind(skipped)}")
    for note, count in sorted(sum((Counter(written.notes) for written in done.values()), Counter()).items()):
        say(note.format(Plural(count)))
    write_index(out, index)
    if upload:
        upload.push(*[out / "skipped.txt"] * bool(skipped), out / "index.json")
        upload.delete([plan.record for plan in done])
    (out / LOST).unlink(missing_ok=True)  # images lost to a repair without the source are complete again
    for plan in done:
        plan.record.unlink(missing_ok=True)
    describe(out)
