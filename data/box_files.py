"""Files of boxes: COCO json, Pascal VOC xml, YOLO text; recognised by content. Free of torch.

COCO: one json for many images; crowd regions and outlines are kept.
VOC: an xml for each image; corners are taken as written, so a box is xmax - xmin pixels wide.
YOLO: a txt for each image in a folder `labels`, with data.yaml, classes.txt or obj.names; boxes or polygons, in shares
of the sides.
"""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from configs.errors import UserError, printable, reason
from data.boxes import Target

COCO_KEYS = ("images", "annotations", "categories")
YOLO_NAMES = ("data.yaml", "data.yml", "classes.txt", "obj.names")
LOOK_ABOVE = 3  # folders in which YOLO's names are searched
HEAD = 4096  # bytes that tell a file's kind
MAX_LOOKED_AT = 100  # files of a folder


@dataclass(frozen=True)
class Annotated:
    """One image of a file of boxes."""

    paths: tuple[str, ...]  # what the image may be called, in order
    target: Target


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
            return _yolo(path, sorted(path.parent.rglob("*.txt")), path, source)
        if kind is None:
            way_out = f"give a COCO json ({', '.join(COCO_KEYS)}), or a folder of VOC xml or YOLO txt files"
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
        text = head.lstrip()
        return "COCO" if text[:1] == b"{" and any(b'"%b"' % key.encode() in head for key in COCO_KEYS) else None
    if suffix == ".txt" and name not in YOLO_NAMES:
        lines = head.decode("utf-8", "replace").splitlines()
        lines = [line.split() for line in (lines[:-1] if len(head) == HEAD else lines) if line.strip()]
        return "YOLO" if lines and all(len(words) >= 5 and _numbers(words) for words in lines) else None
    return None


def _kinds_in(folder: Path) -> dict[str, list[Path]]:
    """Files of boxes in a folder, by kind; of COCO's own files only the instances."""
    found: dict[str, list[Path]] = {}
    for suffix in ("json", "xml", "txt"):
        files = sorted(folder.rglob(f"*.{suffix}"))
        if suffix == "json":
            files = [file for file in files if kind_of(file)]
            files = [file for file in files if file.name.startswith("instances")] or files
        elif not any(kind_of(file) for file in islice(files, MAX_LOOKED_AT)):
            continue
        if files:
            found[{"json": "COCO", "xml": "VOC", "txt": "YOLO"}[suffix]] = files
    return found


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
        content = _read_coco(file)
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        used = {entry["category_id"] for entry in content["annotations"]}
        if unknown := sorted(used - categories.keys(), key=str):
            known = ", ".join(map(str, sorted(categories)[:10]))
            raise UserError(f"{file}: category_id {unknown[0]} is not one of its categories ({known})")
        groups = {entry.get("supercategory") for entry in content["categories"]}
        for number, name in list(categories.items()):
            if number not in used and name in groups and len(categories) > 1:  # Roboflow's category 0
                del categories[number]
                remarks.append(f"category {name} of {file.name} is the group of the others and has no boxes: left out")
        if names and (new := [name for name in categories.values() if name not in names]):
            raise UserError(f"{file}: category {new[0]} is not one of {files[0]}: give files of one data set")
        names |= {name: number for number, name in sorted(categories.items())} if not names else {}
        by_image: dict[Any, list] = {entry["id"]: [] for entry in content["images"]}
        lost = 0
        for entry in content["annotations"]:
            box = {"class": categories[entry["category_id"]], "box": [float(x) for x in entry["bbox"]]}
            box |= {"crowd": True} if entry.get("iscrowd") else {}
            box |= {"segmentation": entry["segmentation"]} if entry.get("segmentation") else {}
            if entry["image_id"] in by_image:
                by_image[entry["image_id"]].append(box)
            else:
                lost += 1
        if lost:
            remarks.append(f"{file.name}: {lost:,} boxes of an image_id that it does not list: left out")
        prefix = _inside(file, source)
        for entry in content["images"]:
            size = {key: entry.get(key) for key in ("height", "width")}
            name = str(entry["file_name"])
            images.append(Annotated((prefix + name, name), {**size, "boxes": by_image[entry["id"]]}))
    return BoxFile(str(path), "COCO", list(names), list(names.values()), images, files, remarks)


def _read_coco(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
        for key in COCO_KEYS:
            if not isinstance(content[key], list):
                raise TypeError(f"{key} is not a list")
        for entry in content["annotations"]:
            if len(entry["bbox"]) != 4 or not _numbers(entry["bbox"]):
                raise ValueError(f"bbox {entry['bbox']}")
            entry["image_id"], entry["category_id"]
        for key, keys in {"images": ("id", "file_name"), "categories": ("id", "name")}.items():
            [entry[name] for entry in content[key] for name in keys]
        return content
    except KeyError as error:
        raise UserError(f"{file} is not COCO json: no {error.args[0]}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not COCO json ({printable(reason(error))})") from None


def _voc(path: Path, files: list[Path], _: Any, source: Path) -> BoxFile:
    images, names, difficult = [], set(), 0
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
            size = {key: int(float(root.findtext(f"size/{key}") or 0)) or None for key in ("height", "width")}
            boxes = []
            for entry in root.iter("object"):
                x0, y0, x1, y1 = (float(entry.find("bndbox").findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                boxes.append({"class": entry.findtext("name").strip(), "box": [x0, y0, x1 - x0, y1 - y0]})
                difficult += entry.findtext("difficult", "0").strip() == "1"
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not Pascal VOC xml ({printable(reason(error))})") from None
        names |= {box["class"] for box in boxes}
        paths = [
            _inside(file, source) + file.stem,
            file.stem,
            PurePosixPath(root.findtext("filename") or file.stem).name,
        ]
        images.append(Annotated(tuple(dict.fromkeys(paths)), {**size, "boxes": boxes}))
    remarks = [f"{difficult:,} boxes marked as difficult are used like the others"] if difficult else []
    return BoxFile(str(path), "VOC", sorted(names), None, images, files, remarks)


def _yolo(path: Path, files: list[Path], names_file: Path | None, source: Path) -> BoxFile:
    names_file = names_file or _names_file(path)
    names = _yolo_names(names_file)
    images, used = [], []
    for file in files:
        if file.name in YOLO_NAMES or (kind_of(file) is None and file.read_text("utf-8", "replace").strip()):
            continue  # lists of files, notes
        boxes = []
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1):
            if words := line.split():
                boxes.append(_yolo_box(words, names, f"{file}, line {number}", names_file))
        parts = PurePosixPath(_inside(file, source) + file.stem).parts
        if "labels" in parts:
            last = len(parts) - 1 - parts[::-1].index("labels")
            parts = (*parts[:last], "images", *parts[last + 1 :])
        images.append(Annotated(("/".join(parts), file.stem), {"height": 1, "width": 1, "boxes": boxes}))
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
        names = yaml.safe_load(text)["names"]
        return [str(names[i]) for i in range(len(names))]  # a list, or a mapping from 0 on
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file} has no list `names` ({printable(reason(error))})") from None


def _numbers(words: list) -> bool:
    try:
        [float(word) for word in words]
    except (ValueError, TypeError):
        return False
    return True
