"""Give images the boxes of a file: matched by name, checked, counted."""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from configs.errors import UserError, counted, printable
from data.box_files import Annotated, BoxFile, kind_of_bytes, read_boxes
from data.boxes import ROUNDING, Target, beyond, clipped, outline_problem, usable
from data.cache import RemoteUserError
from data.exif import orientation, swaps
from data.labels import Paths, set_apart
from data.listing import Listing, suffix
from data.sources import Item

SHOWN = 10  # names in a line
NO_AREA, OUTSIDE, CLIPPED = (
    "{:,} without width or height left out, such as of {}",
    "{:,} outside of their image left out, such as of {}",
    "{:,} reaching beyond their image clipped, such as of {}",
)
OUTLINE = "{{:,}} without their outline, which {}, such as of {{}}"
CROWD = "{:,} crowd regions: not trained on, ignored in evaluation, such as of {}"
HINTED = ("json", "xml", "txt")  # files that may have boxes
HEAD = 4096


@dataclass
class Problems:
    """Counted kinds of problems, with the name of the first image of each."""

    counts: Counter[str]
    first: dict[str, str]

    def add(self, kind: str, name: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        self.first.setdefault(kind, name)

    def lines(self, prefix: str) -> list[str]:
        """A line for each kind."""
        return [f"{prefix}: {kind.format(n, printable(self.first[kind]))}" for kind, n in self.counts.items()]


def box_items(items: list[Item], path: Path, listing: Listing, notes: list[str]) -> tuple[list[Item], BoxFile]:
    """The images with the boxes of a file or folder; those that it does not have go to split `unlabeled`.

    Raises `UserError` if the file is unreadable, names none of the images, or one twice.
    """
    found = read_boxes(path, Path(listing.source))
    used = {file.resolve() for file in found.files}
    for name, file in [*listing.label_files.items()]:
        if file.is_file and Path(file.container).resolve() in used:
            del listing.label_files[name]
    short, paths, problems = printable(path.name), Paths(items), Problems(Counter(), {})
    by_image: dict[int, Annotated] = {}
    missing = []
    for image in found.images:
        at = next((i for name in image.paths if (i := paths.find(name, str(path))) is not None), None)
        if at is None:
            missing += [] if image.problem else [image]
        elif image.problem:
            raise UserError(image.problem)
        elif at in by_image:
            raise UserError(f"{path}: {printable(items[at].name)} is annotated twice: give one file for each image")
        else:
            by_image[at] = image
    if not by_image:
        example = found.images[0].paths[-1] if found.images else "none"
        named = f"the images are named like {printable(items[0].name)}, its images like {printable(example)}"
        raise UserError(f"{path} has boxes of none of the images: {named}")
    out = list(items)
    for i, image in by_image.items():
        target = _checked(items[i], image.target, problems)
        digest = hashlib.sha256(json.dumps(target).encode()).hexdigest()[:16]  # other boxes are another data set
        out[i] = replace(items[i], label=None, targets=target, stamp=f"{items[i].stamp} {digest}")
    classes = Counter(box["class"] for i in by_image for box in out[i].targets["boxes"])
    empty = [out[i] for i in by_image if not out[i].targets["boxes"]]
    shown = ", ".join(f"{printable(name)} {count:,}" for name, count in classes.most_common(SHOWN))
    boxes = counted(classes.total(), "box", "boxes")
    notes.append(
        f"boxes from {short} ({found.kind}): {boxes} of {counted(len(found.names), 'class', 'classes')} on "
        f"{len(by_image):,} of {counted(len(items), 'image')}: {shown}{', ...' if len(classes) > SHOWN else ''}"
    )
    notes += [*map(printable, found.remarks), *problems.lines(f"{short}: boxes")]
    if empty:
        notes.append(f"{counted(len(empty), 'image')} without a box, such as {empty[0].name}: kept as negatives")
    if missing:
        lost = f"{counted(len(missing), 'annotated image')} not found, such as {missing[0].paths[-1]}"
        notes.append(f"{short}: {lost}: left out")
    return set_apart(out, set(by_image), path.name, notes), found


def _checked(item: Item, target: Target, problems: Problems) -> Target:
    """A target with usable boxes, within the annotated size; that of the picture if the file has none."""
    if not (target["height"] and target["width"]):
        if (size := _picture_size(item)) is None:
            return {**target, "height": 0, "width": 0, "boxes": []}  # left out when it is written
        height, width = size
        target = {**target, "height": height, "width": width}
    height, width = target["height"], target["width"]
    rounding = ROUNDING if (height, width) != (1, 1) else 1e-3
    boxes = []
    for entry in target["boxes"]:
        box = entry["box"]
        if not usable(box):
            problems.add(NO_AREA, item.name)
            continue
        inside = clipped(box, height, width)
        if not usable(inside):
            problems.add(OUTSIDE, item.name)
            continue
        if beyond(box, height, width) > rounding:
            problems.add(CLIPPED, item.name)
        if (outline := entry.get("segmentation")) and (wrong := outline_problem(outline, height, width)):
            problems.add(OUTLINE.format(wrong), item.name)
            entry = {key: value for key, value in entry.items() if key != "segmentation"}
        if entry.get("crowd"):
            problems.add(CROWD, item.name)
        boxes.append({**entry, "box": inside})
    return {**target, "boxes": boxes}


def _picture_size(item: Item) -> tuple[int, int] | None:
    """Height and width of the upright picture, from its header; None if it cannot be read."""
    try:
        data = item.image_bytes()
        width, height = Image.open(io.BytesIO(data)).size
    except RemoteUserError:
        raise
    except Exception:  # almost any exception in PIL
        return None
    return (width, height) if swaps(orientation(data)) else (height, width)


def box_targets(files: Sequence[BoxFile]) -> dict:
    """`targets` of index.json. Raises `UserError` if a file has classes that the first, of train, does not have."""
    first = files[0]
    names = first.names
    if all(file.kind == "VOC" for file in files):  # lists no classes, only those of its boxes
        names = sorted({name for file in files for name in file.names})
    for file in files:
        if unknown := [name for name in file.names if name not in names]:
            known = ", ".join(names[:SHOWN])
            raise UserError(f"{file.name} has boxes of {unknown[0]}, which {first.name} does not have ({known})")
    ids = first.ids and {"ids": first.ids}
    return {"kind": "boxes", "names": names} | (ids or {})


def box_hint(listing: Listing, flag: str = "--boxes") -> str | None:
    """A line that names the option for boxes in a source, if it has some."""
    found = defaultdict(list)
    for name, item in listing.label_files.items():
        if suffix(name) in HINTED and (suffix(name) != "txt" or "labels" in PurePosixPath(name).parts):
            if found["VOC"][2:] or found["YOLO"][2:] or found["COCO"][20:]:
                break
            if kind := kind_of_bytes(PurePosixPath(name).name, item.head(HEAD)):
                found[kind].append(item)
    for kind in ("COCO", "VOC", "YOLO"):
        if items := found[kind]:
            inside = not items[0].is_file
            place = Path(items[0].container if not inside else items[0].name)
            where = place if kind == "COCO" and len(items) == 1 else place.parent
            if kind == "COCO" and len(items) > 1:
                train = [item for item in items if "train" in item.name] or items
                where = Path(train[0].container if not inside else train[0].name)
            way = f"unpack it and add {flag} PATH" if inside else f"add {flag} {printable(where)}"
            return f"{printable(items[0].name)} has boxes ({kind}): {way}"
    return None


def in_split(items: list[Item], split: str, path: Path) -> list[Item]:
    """The images of a split. Raises `UserError` if there are none."""
    members = [item for item in items if item.split == split]
    if not members:
        raise UserError(f"--{split}-boxes {path}: the source has no split {split}: add --{split} SOURCE")
    return members
