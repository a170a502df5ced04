"""The images of one or several sources, with splits and labels; what was found, decided and left out is printed.

SOURCE    its folders are splits and classes; --labels FILE, --masks SOURCE
--val SOURCE, --test SOURCE    further splits; --val-labels FILE, --test-labels FILE
--boxes FILE                   boxes of objects in place of labels; --val-boxes FILE, --test-boxes FILE
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError, counted, printable
from configs.log import say
from data.box_files import BoxFile
from data.box_targets import box_hint, box_items, box_targets, in_split
from data.class_counts import check_classes, class_names, count_classes, split_lines
from data.classes import UNLABELED, WAY_OUT
from data.known import find_val_labels, known_rows, without_image_class
from data.labels import label_by_sidecars, label_by_table, set_apart
from data.layouts import arrange
from data.listing import ARCHIVES, TABLES, Listing, suffix
from data.pairs import open_masks, pair_masks
from data.planning import LABEL_OPTIONS, PrepareOptions, divided
from data.sources import Item, digits
from data.tables import Columns, Row, find_columns, list_table, may_hold_labels, one_hot, read_table
from data.walk import list_source

FIRST_LINE = 1 << 12  # bytes that have the header of a table


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
        say(f"digits: {len(items):,} images")
        yield sorted(items, key=lambda item: item.name), None if options.no_labels else class_names(items, False), None
        return
    with ExitStack() as stack:
        yield _collect(stack, options, scratch)


def read_collection(source: str) -> tuple[list[Item], list[str] | None]:
    """Images and class names of a folder, zip, uncompressed tar or table, as `open_collection` without options."""
    with ExitStack() as stack:
        items, classes, _ = _collect(stack, PrepareOptions(source=source), None)
        for line in split_lines(count_classes(divided(items))):
            say(f"  {line}")
        return items, classes


def _collect(
    stack: ExitStack, options: PrepareOptions, scratch: Path | None
) -> tuple[list[Item], list[str] | None, dict | None]:
    listing, files = _list(stack, options.source, scratch, options), []
    masks = open_masks(listing, options, scratch, stack)
    items = _main_images(listing, options, files)
    from_files = bool(listing.sidecars or options.labels or listing.rows)
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
            further = _list(stack, source, inner, options)
            items = items + _further_images(further, split, labels, boxes, options, files)
    if options.masks:
        items, notes = pair_masks(items, masks, options)
        _print_notes(notes)
    if options.no_labels:
        items = [item.placed(item.split, None) for item in items]
    check_classes(items, options.source)
    return items, class_names(items, from_files), box_targets(files) if files else None


def _list(stack: ExitStack, source: str, scratch: Path | None, options: PrepareOptions) -> Listing:
    """The files of a source, which may be a table of files."""
    path = Path(source)
    if not (path.is_file() and suffix(path.name) in TABLES):
        return stack.enter_context(list_source(source, scratch))
    rows = read_table(path.read_bytes(), path.name)
    return list_table(path, _columns(rows, path, options, is_source=True), rows)


def _columns(rows: list[Row], path: Path, options: PrepareOptions, is_source: bool) -> Columns:
    """The columns of a table. One that is the source may be without labels."""
    if not rows:
        raise UserError(f"{path} has no rows")
    return find_columns(rows, path.name, options.path_column, options.label_column, is_source)


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
    from_folders = not (labels or listing.rows or options.no_labels or options.masks or options.boxes)
    first = label_by_sidecars(listing) if from_folders else []
    items, notes = arrange(listing, splits, no_splits, labelled=from_folders)
    listing.images = items  # not twice in memory
    if listing.rows and not labels:
        items = _with_labels(items, Path(listing.source), options, notes, rows=listing.rows)
    elif labels:
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
    rows: list[Row] | None = None,
) -> list[Item]:
    """The images with the labels of a file; those of split `unlabeled` have none.

    `data` is the file's content, `rows` are those of a table that is the source.
    """
    if data is None and not path.exists():
        raise UserError(f"{path} does not exist: give a file of labels")
    is_source = rows is not None
    open_items = [item for item in items if item.split != UNLABELED]
    if not is_source:
        devkit = path.is_dir() or path.name.lower().endswith(ARCHIVES)
        data = path.read_bytes() if data is None and not devkit else data
        rows = known_rows(place or path, data, open_items) if open_items else None
        known = rows is not None
        rows = rows if known else read_table(data, path.name)
    if not is_source and known:
        columns = Columns(("path",), ("label",), None)
    else:
        columns = _columns(rows, path, options, is_source)
    labelled, more = label_by_table(open_items, rows, columns, path.name)
    of = f"column {', '.join(columns.labels)} of " if columns.labels != ("label",) else ""
    count = sum(item.label is not None or item.targets is not None for item in labelled)
    found = f"labels from {of}{path.name}: {count:,} of {counted(len(labelled), 'image')}"
    if not columns.labels:
        advice = one_hot(rows)
        found = f"{path.name} has no column of labels{advice and f': {advice}'}"
    notes.append(found)
    notes += more
    return labelled + [item for item in items if item.split == UNLABELED]


def _report(listing: Listing, items: list[Item], notes: list[str], hint: bool, split: str = "") -> None:
    """Print what a source has, and what was left out or decided."""
    flag = f"--{split}-labels" if split else "--labels"
    say(f"{printable(listing.source)}: {counted(len(items), 'image')}")
    _print_notes([*listing.notes(), *notes])
    tables = [item for name, item in listing.label_files.items() if suffix(name) in TABLES] if hint else []
    if hint and (line := box_hint(listing, flag.replace("labels", "boxes"))):
        say(f"  {line}")
    for item in [item for item in tables if may_hold_labels(item.head(FIRST_LINE), item.name)][:3]:
        first = "fetch it and " if item.remote else "unpack it and " if item.offset is not None else ""
        where = f"{first}add {flag} {'PATH' if first else printable(item.container)}"
        say(f"  {printable(item.name)} looks like labels: {where} {WAY_OUT}")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        say(f"  {printable(note)}")
