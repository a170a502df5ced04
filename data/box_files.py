"""Files of boxes: COCO json, Pascal VOC xml, YOLO text; recognised by content. Free of torch.

COCO: one json for many images; crowd regions and outlines are kept.
VOC: an xml for each image; corners are taken as written, so a box is xmax - xmin pixels wide.
YOLO: a txt for each image in a folder `labels`, with data.yaml, classes.txt or obj.names; boxes or polygons, in shares
of the sides.
"""

import math
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from configs.errors import UserError, printable, reason
from data.boxes import Target
from data.coco import KEYS, categories_of, read_coco

YOLO_NAMES = ("data.yaml", "data.yml", "classes.txt", "obj.names")
LOOK_ABOVE = 3  # folders in which YOLO's names are searched
HEAD = 4096  # bytes that tell a file's kind
MAX_LOOKED_AT = 100  # files of a folder


@dataclass(frozen=True)
class Annotated:
    """One image of a file of boxes."""

    paths: tuple[str, ...]  # what the image may be called, in order
    target: Target
    problem: str = ""  # of its file; without an image of this name, the file is a list or a note


@dataclass(frozen=True)
class BoxFile:
    """The content of a file or folder of boxes."""

    name: str  # file or folder
    kind: str  # COCO, VOC or YOLO
    names: list[str]  # of the classes
    ids: list[int] | None  # of COCO's categories
    images: list[Annotated]
    files: list[Path]
    remarks: list[str]


def read_boxes(path: Path, source: Path) -> BoxFile:
    """Read boxes of images in `source`. Raises `UserError` if the file is unreadable, or could mean several things."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a COCO json, or a folder of VOC xml or YOLO txt files")
    if path.is_file():
        kind = kind_of(path)
        if path.name in YOLO_NAMES:
            return _yolo(path, _with_suffix(path.parent, ".txt"), path, source)
        if kind is None:
            way_out = f"give a COCO json ({', '.join(KEYS)}), or a folder of VOC xml or YOLO txt files"
            raise UserError(f"{path} has no boxes: {way_out}")
        found = {kind: [path]}
    else:
        found = _kinds_in(path)
    if len(found) != 1:
        kinds = " and ".join(found) or "no file of boxes (COCO json, VOC xml, YOLO txt)"
        raise UserError(f"{path} has {kinds}: name the file or folder of one of them")
    ((kind, files),) = found.items()
    return {"COCO": _coco, "VOC": _voc, "YOLO": _yolo}[kind](path, files, None, source)


def kind_of(path: Path) -> str | None:
    """COCO, VOC or YOLO by the content of a file, None if it has no boxes."""
    with path.open("rb") as file:
        return kind_of_bytes(path.name, file.read(HEAD))


def kind_of_bytes(name: str, head: bytes) -> str | None:
    """`kind_of`, from a file's name and first bytes."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".xml":
        return "VOC" if b"<annotation" in head else None
    if suffix == ".json":
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        return "COCO" if text[:1] == b"{" and any(b'"%b"' % key.encode() in head for key in KEYS) else None
    if suffix == ".txt" and name not in YOLO_NAMES:
        lines = head.decode("utf-8", "replace").splitlines()
        lines = [line.split() for line in (lines[:-1] if len(head) == HEAD else lines) if line.strip()]
        return "YOLO" if lines and all(len(words) >= 5 and _numbers(words) for words in lines) else None
    return None


def _kinds_in(folder: Path) -> dict[str, list[Path]]:
    """Files of boxes in a folder, by kind; of COCO's own files only the instances."""
    found: dict[str, list[Path]] = {}
    for suffix in ("json", "xml", "txt"):
        files = _with_suffix(folder, f".{suffix}")
        if suffix == "json":
            files = [file for file in files if kind_of(file)]
            files = [file for file in files if file.name.startswith("instances")] or files
        elif not any(kind_of(file) for file in islice(files, MAX_LOOKED_AT)):
            continue
        if files:
            found[{"json": "COCO", "xml": "VOC", "txt": "YOLO"}[suffix]] = files
    return found


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() == suffix)


def _inside(file: Path, source: Path) -> str:
    """The folder of a file, relative to the source, with a slash; empty if it is elsewhere."""
    try:
        folder = file.resolve().parent.relative_to(source.resolve())
    except ValueError:
        return ""
    return "" if folder == Path() else f"{folder.as_posix()}/"


def _coco(path: Path, files: list[Path], _: Any, source: Path) -> BoxFile:
    names: dict[str, int] = {}
    images, remarks = [], []
    for file in files:
        content = read_coco(file)
        categories = categories_of(file, content, remarks)
        if names and (new := [name for name in categories.values() if name not in names]):
            raise UserError(f"{file}: category {new[0]} is not one of {files[0]}: give files of one data set")
        names |= {name: number for number, name in sorted(categories.items())} if not names else {}
        by_image: dict[Any, list] = {image.id: [] for image in content.images}
        lost = 0
        for found in content.annotations:
            box = {"class": categories[found.category_id], "box": list(found.bbox)}
            box |= {"crowd": True} if found.iscrowd else {}
            box |= {"segmentation": found.segmentation} if found.segmentation else {}
            if found.image_id in by_image:
                by_image[found.image_id].append(box)
            else:
                lost += 1
        if lost:
            remarks.append(f"{file.name}: {lost:,} boxes of an image_id that it does not list: left out")
        prefix = _inside(file, source)
        for image in content.images:
            target = {"height": image.height, "width": image.width, "boxes": by_image[image.id]}
            images.append(Annotated((prefix + image.file_name, image.file_name), target))
    return BoxFile(str(path), "COCO", list(names), list(names.values()), images, files, remarks)


def _voc(path: Path, files: list[Path], _: Any, source: Path) -> BoxFile:
    images, names, difficult = [], set(), 0
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"{file} is not Pascal VOC xml ({printable(reason(error))})") from None
        size = {key: round(_voc_number(file, root, f"size/{key}", "0")) or None for key in ("height", "width")}
        boxes = []
        for entry in root.iter("object"):
            if not (name := entry.findtext("name", "").strip()):
                raise UserError(f"{file}: an object has no name: write it as <name>")
            x0, y0, x1, y1 = (_voc_number(file, entry, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append({"class": name, "box": [x0, y0, x1 - x0, y1 - y0]})
            difficult += entry.findtext("difficult", "0").strip() == "1"
        names |= {box["class"] for box in boxes}
        paths = [
            _inside(file, source) + file.stem,
            file.stem,
            PurePosixPath(root.findtext("filename") or file.stem).name,
        ]
        images.append(Annotated(tuple(dict.fromkeys(paths)), {**size, "boxes": boxes}))
    remarks = [f"{difficult:,} boxes marked as difficult are used like the others"] if difficult else []
    return BoxFile(str(path), "VOC", sorted(names), None, images, files, remarks)


def _voc_number(file: Path, element: ElementTree.Element, name: str, default: str = "") -> float:
    """The number of an element inside another. Raises `UserError` if it is none, or a size that is none."""
    text = element.findtext(name, default).strip() or default
    with suppress(ValueError):
        if math.isfinite(value := float(text)) and (value >= 0 or not name.startswith("size")):
            return value
    raise UserError(f"{file}: {name} is {printable(text) or 'missing'}: write a number")


def _yolo(path: Path, files: list[Path], names_file: Path | None, source: Path) -> BoxFile:
    names_file = names_file or _names_file(path)
    names = _yolo_names(names_file)
    if wrong := [name for name in names if not name or names.count(name) > 1]:
        problem = f"names {printable(wrong[0])} twice" if wrong[0] else "has a name that is empty"
        raise UserError(f"{names_file} {problem}: give each class its own name")
    images, used = [], []
    for file in files:
        if file.name in YOLO_NAMES:
            continue
        target, problem = {"height": 1, "width": 1, "boxes": []}, ""
        try:
            for number, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
                if words := line.split():
                    target["boxes"].append(_yolo_box(words, names, f"{file}, line {number}", names_file))
        except UserError as error:
            if kind_of(file):
                raise
            problem = str(error)
        parts = PurePosixPath(_inside(file, source) + file.stem).parts
        if "labels" in parts:
            last = len(parts) - 1 - parts[::-1].index("labels")
            parts = (*parts[:last], "images", *parts[last + 1 :])
        images.append(Annotated(("/".join(parts), file.stem), target, problem))
        used.append(file)
    return BoxFile(str(path), "YOLO", names, None, images, [*used, names_file], [])


def _yolo_box(words: list[str], names: list[str], place: str, names_file: Path) -> dict:
    """A line: class and centre, width, height, or class and polygon, in shares of the sides."""
    if not _numbers(words) or (len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0)):
        raise UserError(f"{place}: a line of YOLO is `class x y width height` or `class x1 y1 x2 y2 ...`")
    number, values = float(words[0]), [float(word) for word in words[1:]]
    if not 0 <= number < len(names) or number % 1:
        raise UserError(f"{place}: class {words[0]} is not one of the {len(names)} names in {names_file}")
    box: dict = {"class": names[int(number)]}
    if len(values) == 4:
        x, y, w, h = values
        return box | {"box": [x - w / 2, y - h / 2, w, h]}
    xs, ys = values[::2], values[1::2]
    box["box"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return box | {"segmentation": [values]}


def _names_file(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    for above in islice((folder, *folder.absolute().parents), LOOK_ABOVE):
        for name in YOLO_NAMES:
            if (above / name).is_file():
                return above / name
    raise UserError(f"{path} has YOLO's boxes but no names of classes: add {', '.join(YOLO_NAMES)} to it or give it")


def _yolo_names(file: Path) -> list[str]:
    text = file.read_text("utf-8-sig", "replace")
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = yaml.load(text, yaml.BaseLoader)["names"]  # all values are text: `no` is a name
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("a list of names, or a mapping of numbers to names")
        return [name.strip() for name in names]
    except KeyError as error:
        problem = "no `names`" if error.args[0] == "names" else f"no name for class {error.args[0]}; they count from 0"
        raise UserError(f"{file} has {problem}") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file} has no list `names` ({printable(reason(error))})") from None


def _numbers(words: list) -> bool:
    try:
        [float(word) for word in words]
    except (ValueError, TypeError):
        return False
    return True
