"""The images of one or several sources, with splits and labels; what was found, decided and left out is printed.

SOURCE    its folders are splits and classes; --labels FILE
--val SOURCE, --test SOURCE    further splits; --val-labels FILE, --test-labels FILE
--boxes FILE                   boxes of objects in place of labels; --val-boxes FILE, --test-boxes FILE
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError, counted, printable
from data.box_files import BoxFile
from data.box_targets import box_hint, box_items, box_targets, in_split
from data.known import find_val_labels, known_rows, without_image_class
from data.labels import label_by_sidecars, label_by_table, set_apart
from data.layouts import UNLABELED, arrange
from data.listing import TABLES, Listing, list_source, suffix
from data.planning import LABEL_OPTIONS, PrepareOptions
from data.sources import Item, digits
from data.tables import Columns, find_columns, may_hold_labels, read_table

SHOWN = 10  # names in a line


@contextmanager
def open_collection(
    options: PrepareOptions, scratch: Path
) -> Iterator[tuple[list[Item], list[str] | None, dict | None]]:
    """All images with their splits and labels, the class names of all splits, and `targets` of index.json. Prints what
    was decided.

    What has to be unpacked stays in `scratch` until the block ends. Raises `UserError` for sources or labels that
    cannot be read, or that could mean several things.
    """
    if options.source == "digits":
        reject = [key for key in LABEL_OPTIONS if getattr(options, key)]
        if reject:
            raise UserError(f"--{reject[0].replace('_', '-')} does not apply to the built-in digits: leave it out")
        items = [Item(name, "digits", split=split, label=label) for name, (_, split, label) in digits().items()]
        print(f"digits: {len(items):,} images", flush=True)
        yield sorted(items, key=lambda item: item.name), None if options.no_labels else class_names(items, False), None
        return
    with ExitStack() as stack:
        listing = stack.enter_context(list_source(options.source, scratch))
        files: list[BoxFile] = []
        items = _main_images(listing, options, files)
        from_files = bool(listing.sidecars or options.labels)
        for split, source, labels, boxes in (
            ("val", options.val, options.val_labels, options.val_boxes),
            ("test", options.test, options.test_labels, options.test_boxes),
        ):
            if source is not None:
                if any(item.split == split for item in items):
                    raise UserError(f"--{split} {source}: {options.source} has a split {split} already")
                inner = scratch / f".{split}"
                inner.mkdir(exist_ok=True)
                stack.callback(inner.rmdir)
                further = stack.enter_context(list_source(source, inner))
                items = items + _further_images(further, split, labels, boxes, options, files)
        if options.no_labels:
            items = [replace(item, label=None) for item in items]
        check_classes(items, options.source)
        yield items, class_names(items, from_files), box_targets(files) if files else None


def _main_images(listing: Listing, options: PrepareOptions, files: list[BoxFile]) -> list[Item]:
    """Images of SOURCE, also with labels of its splits val and test from files."""
    items, notes = _arranged(listing, options.labels, options, options.splits, options.no_splits)
    if options.boxes:
        items = _boxed(listing, items, options, notes, files)
    listed = len(listing.label_files)
    if not (options.boxes or options.no_labels or options.labels or options.val or options.val_labels):
        items = _known_val(listing, items, options, notes)
    for split, labels, source in (
        ("val", options.val_labels, options.val),
        ("test", options.test_labels, options.test),
    ):
        if labels and not source:
            members = [item for item in items if item.split == split]
            if not members:
                raise UserError(
                    f"--{split}-labels {labels}: {options.source} has no split {split}: add --{split} SOURCE"
                )
            labelled = _with_labels(members, labels, options, notes)
            items = [item for item in items if item.split != split] + labelled
            items.sort(key=lambda item: item.name)
    known = len(listing.label_files) < listed
    _report(listing, items, notes, hint=not (options.labels or options.no_labels or options.boxes or known))
    return items


def _boxed(
    listing: Listing, items: list[Item], options: PrepareOptions, notes: list[str], files: list[BoxFile]
) -> list[Item]:
    """Images of SOURCE with boxes: those of splits val and test from files of their own, if these are given."""
    own = {"val": options.val_boxes, "test": options.test_boxes}
    own = {split: path for split, path in own.items() if path and not getattr(options, split)}
    rest = [item for item in items if item.split not in own]
    parts = [(rest, options.boxes), *((in_split(items, split, path), path) for split, path in own.items())]
    out = []
    for members, path in parts:
        boxed, file = box_items(members, path, listing, notes)
        out += boxed
        files.append(file)
    return sorted(out, key=lambda item: item.name)


def _arranged(
    listing: Listing, labels: Path | None, options: PrepareOptions, splits: tuple[str, ...], no_splits: bool
) -> tuple[list[Item], list[str]]:
    """Images with splits, and with labels from a table, from files beside them, or from their folders."""
    unlabelled = bool(labels or options.no_labels or options.boxes)
    first = [] if unlabelled else label_by_sidecars(listing)
    items, notes = arrange(listing, splits, no_splits, labelled=not unlabelled)
    if labels:
        items = _with_labels(items, labels, options, notes)
        for name, file in [*listing.label_files.items()]:
            if file.offset is None and Path(file.container).resolve() == labels.resolve():
                del listing.label_files[name]  # used, not ignored
    elif listing.sidecars:
        labelled = {i for i, item in enumerate(items) if item.label is not None or item.targets}
        items = set_apart(items, labelled, "the .cls and .json files", notes)
    return items, first + notes


def _known_val(listing: Listing, items: list[Item], options: PrepareOptions, notes: list[str]) -> list[Item]:
    """Labels of split val of Tiny-ImageNet and of Kaggle's CLS-LOC, if they are not in folders."""
    train = {item.label for item in items if item.split == "train" and item.label}
    members = [item for item in items if item.split == "val"]
    if not members or not train or train & {item.label for item in members}:
        return items
    file = find_val_labels(listing)
    if file is None:
        return items
    labelled = _with_labels(members, Path(file.name), options, notes, file.image_bytes(), Path(file.container))
    others = [item for item in items if item.split != "val"]
    test = without_image_class([item for item in others if item.split == "test"])
    others = [item for item in others if item.split != "test"]
    return sorted(others + test + labelled, key=lambda item: item.name)


def _further_images(
    listing: Listing, split: str, labels: Path | None, boxes: Path | None, options: PrepareOptions, files: list[BoxFile]
) -> list[Item]:
    """Images of --val or --test, all in one split."""
    items, notes = _arranged(listing, labels, options, (), True)
    if boxes:
        items, file = box_items(items, boxes, listing, notes)
        files.append(file)
    items = [item if item.split == UNLABELED else replace(item, split=split) for item in items]
    _report(listing, items, notes, not (labels or options.no_labels or options.boxes), split)
    return items


def _with_labels(
    items: list[Item],
    path: Path,
    options: PrepareOptions,
    notes: list[str],
    data: bytes | None = None,
    place: Path | None = None,
) -> list[Item]:
    """The images with the labels of a file; those of split `unlabeled` have none. `data` is the file's content."""
    if data is None and not path.exists():
        raise UserError(f"{path} does not exist: give a file of labels")
    devkit = path.is_dir() or path.name.startswith("ILSVRC2012_devkit")
    if data is None and not devkit:
        data = path.read_bytes()
    open_items = [item for item in items if item.split != UNLABELED]
    rows = known_rows(place or path, data, open_items) if open_items else None
    if rows is not None:
        columns = Columns(("path",), ("label",), None)
    else:
        rows = read_table(data, path.name)
        if not rows:
            raise UserError(f"{path} has no rows")
        columns = find_columns(rows, path.name, options.path_column, options.label_column)
    labelled, more = label_by_table(open_items, rows, columns, path.name)
    of = f"column {', '.join(map(printable, columns.labels))} of " if columns.labels != ("label",) else ""
    count = sum(item.label is not None or item.targets is not None for item in labelled)
    notes.append(f"labels from {of}{printable(path.name)}: {count:,} of {counted(len(labelled), 'image')}")
    notes += more
    return labelled + [item for item in items if item.split == UNLABELED]


def _report(listing: Listing, items: list[Item], notes: list[str], hint: bool, split: str = "") -> None:
    """Print what a source has, and what was left out or decided."""
    flag = f"--{split}-labels" if split else "--labels"
    print(f"{printable(listing.source)}: {counted(len(items), 'image')}", flush=True)
    for note in (*listing.notes(), *notes):
        print(f"  {printable(note)}", flush=True)
    tables = [item for name, item in listing.label_files.items() if suffix(name) in TABLES] if hint else []
    if hint and (line := box_hint(listing, flag.replace("labels", "boxes"))):
        print(f"  {line}", flush=True)
    for item in [item for item in tables if may_hold_labels(item.image_bytes(), item.name)][:3]:
        inside = item.offset is not None
        where = f"unpack it and add {flag} PATH" if inside else f"add {flag} {printable(item.container)}"
        print(f"  {printable(item.name)} looks like labels: {where}", flush=True)


def class_names(items: list[Item], by_number: bool) -> list[str] | None:
    """Class names of all splits, None without labels; sorted, with `by_number` as numbers if all of them are."""
    names = {item.label for item in items} - {None}
    return sorted(names, key=int if by_number and all(map(str.isdecimal, names)) else None) or None


def check_classes(items: list[Item], source: str) -> None:
    """Print the classes of each split. Raises `UserError` if train and another split have no class in common."""
    counts, without = defaultdict(Counter), Counter()
    for item in items:
        if item.label is None:
            without[item.split or "train"] += 1
        else:
            counts[item.split or "train"][item.label] += 1
    for split, found in sorted(counts.items()):
        shown = ", ".join(f"{name} ({count:,})" for name, count in sorted(found.items())[:SHOWN])
        more = ", ..." if len(found) > SHOWN else ""
        print(f"  {split}: {counted(len(found), 'class', 'classes')}: {shown}{more}", flush=True)
    for split, number in sorted(without.items()) if counts else ():
        way_out = f": add --{split}-labels FILE to evaluate on them" if split in ("val", "test") else ""
        print(f"  {split}: {counted(number, 'image')} without a label{way_out}", flush=True)
    train = counts.get("train")
    if train is None:
        return
    for split, found in sorted(counts.items()):
        absent = sorted(found.keys() - train.keys())
        if len(absent) == len(found) and split != UNLABELED:
            seen = f"no class of split {split} ({_few(absent)}) is a class of train ({_few(sorted(train))})"
            way_out = f"give its labels with --{split}-labels FILE, or choose folders with --splits, or use --no-labels"
            raise UserError(f"{printable(source)}: {seen}: {way_out}")
        if absent:
            print(f"  warning: {_few(absent)} of split {split} not in train: can never be predicted", flush=True)
    if len(train) == 1:
        print(f"  warning: 1 class ({next(iter(train))}): fine-tuning cannot learn from it", flush=True)


def check_val(splits: dict[str, list[Item]]) -> None:
    """Print the classes of train that have no image in val."""
    if "val" in splits:
        have = {item.label for item in splits["val"]}
        absent = sorted({item.label for item in splits.get("train", ())} - have - {None})
        if absent and have != {None}:
            subject = f"class {absent[0]} has" if len(absent) == 1 else f"classes {_few(absent)} have"
            print(f"  warning: {subject} no validation image", flush=True)


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
