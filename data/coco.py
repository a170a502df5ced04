"""Read a COCO json of boxes. Free of torch."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from configs.errors import UserError, few, printable, reason

KEYS = ("images", "annotations", "categories")
Id = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]  # 5 is "5"
Side = Annotated[int, Field(ge=0)] | None  # 0: not known


@dataclass(frozen=True)
class Image:
    """An entry of `images`."""

    id: Id
    file_name: str
    height: Side = None
    width: Side = None


@dataclass(frozen=True)
class Annotation:
    """An entry of `annotations`. Outlines are checked where their image's size is known."""

    image_id: Id
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: bool | None = None
    segmentation: Any = None


@dataclass(frozen=True)
class Category:
    """An entry of `categories`."""

    id: int
    name: str
    supercategory: Any = None


@dataclass(frozen=True)
class Coco:
    """The content of a file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


READ = TypeAdapter(Coco)


def read_coco(file: Path) -> Coco:
    """Read a file. Raises `UserError` for one that is no COCO json, with the entry, or has an id twice."""
    try:
        found = READ.validate_python(json.loads(file.read_bytes()))
    except ValidationError as error:
        raise UserError(f"{file} is not COCO json: {_problem(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not COCO json ({printable(reason(error))})") from None
    images: dict[Any, str] = {}
    for image in found.images:
        if image.id in images:
            both = few((images[image.id], image.file_name))
            raise UserError(f"{file}: two images have the id {printable(image.id)} ({both}): give each its own")
        images[image.id] = image.file_name
    if twice := [number for number, count in Counter(c.id for c in found.categories).items() if count > 1]:
        raise UserError(f"{file}: two categories have the id {twice[0]}: give each its own")
    return found


def _problem(error: ValidationError) -> str:
    """`annotations[3].bbox[0]: input should be a valid number`, of the first problem."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}" if place else "it is not an object with lists"


def categories_of(file: Path, content: Coco, remarks: list[str]) -> dict[int, str]:
    """Names by id of the categories that boxes may have; those without a role go to `remarks`.

    Raises `UserError` for a box of an unknown category, or a name that is missing or repeated.
    """
    categories = {category.id: category.name.strip() for category in content.categories}
    used = {box.category_id for box in content.annotations}
    if unknown := sorted(used - categories.keys()):
        known = ", ".join(map(str, sorted(categories)[:10]))
        raise UserError(f"{file}: category_id {unknown[0]} is not one of its categories ({known})")
    groups = {category.supercategory for category in content.categories if isinstance(category.supercategory, str)}
    for number, name in list(categories.items()):
        if number not in used and name in groups and len(categories) > 1:  # Roboflow's category 0
            del categories[number]
            remarks.append(f"category {name} of {file.name} is the group of the others and has no boxes: left out")
    by_name: dict[str, int] = {}
    for number, name in categories.items():
        if not name:
            raise UserError(f"{file}: category {number} has no name: give it one")
        if name in by_name:
            raise UserError(
                f"{file}: categories {by_name[name]} and {number} are both named {printable(name)}: rename one"
            )
        by_name[name] = number
    return categories
