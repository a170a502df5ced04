"""prepare --boxes: COCO, VOC and YOLO give the same targets; every problem is named or refused in one line."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

from data.folder import sample_names
from data.prepare import main
from data.shards import Split
from tests.conftest import has
from tests.data.test_prepare import prepared

NAMES = ["ring", "bar"]
BOXES = {  # image -> (class, x, y, width, height)
    "a.png": [("ring", 2, 3, 10, 8), ("bar", 20, 5, 6, 12)],
    "b.png": [("bar", 0, 0, 40, 30)],
    "c.png": [],
}


def images(folder, names=BOXES, size=(40, 30), exif=None):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        pixels = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / name, **({"exif": exif} if exif else {}))


def coco(file, boxes=BOXES, names=NAMES, **more):
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 + 2 * i, "name": n} for i, n in enumerate(names)],
    }
    for i, (name, rows) in enumerate(boxes.items()):
        content["images"].append({"id": i, "file_name": name, "width": 40, "height": 30})
        for label, *box in rows:
            number = 3 + 2 * names.index(label) if label in names else 99
            about = {"id": len(content["annotations"]), "image_id": i, "category_id": number, "bbox": box}
            content["annotations"].append(about | {"area": box[2] * box[3], "iscrowd": 0} | more)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def voc(folder, boxes=BOXES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in boxes.items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for label, x, y, w, h in rows
        )
        size = "<size><width>40</width><height>30</height></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (folder / f"{name[:-4]}.xml").write_text(text)
    return folder


def yolo(folder, boxes=BOXES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in boxes.items():
        lines = [
            f"{NAMES.index(label)} {(x + w / 2) / 40} {(y + h / 2) / 30} {w / 40} {h / 30}\n"
            for label, x, y, w, h in rows
        ]
        (folder / f"{name[:-4]}.txt").write_text("".join(lines))
    (folder.parent / "data.yaml").write_text("names: [ring, bar]\n")
    return folder


def prepare(*words):
    """What a preparation in this process prints."""
    with redirect_stdout(io.StringIO()) as out:
        prepared(*words)
    return out.getvalue()


def targets(folder, split="train"):
    found = Split(folder, split)
    return {name: json.loads(found.read_target(i)) for i, name in enumerate(sample_names(found))}


def rows(target):
    return sorted((x["class"], *(round(v, 6) for v in x["box"])) for x in target["boxes"])


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_three_formats_give_the_same_targets(kind, tmp_path):
    images(tmp_path / "in/images")
    place = {"coco": "boxes.json", "voc": "xml", "yolo": "labels"}[kind]
    given = {"coco": coco, "voc": voc, "yolo": yolo}[kind](tmp_path / "in" / place)
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", given)
    assert has(out, f"boxes {kind.upper()} 3 negatives") and "ignored" not in out.replace("1 file ignored: 1 .yaml", "")
    found = targets(tmp_path / "out")
    assert {name.rpartition("/")[2]: rows(x) for name, x in found.items()} == {k: sorted(v) for k, v in BOXES.items()}
    assert all((x["height"], x["width"]) == (30, 40) for x in found.values())
    about = Split(tmp_path / "out", "train").targets
    assert about["kind"] == "boxes" and set(about["names"]) == set(NAMES)
    assert about.get("ids") == ([3, 5] if kind == "coco" else None)
    assert json.loads((tmp_path / "out/index.json").read_text())["classes"] is None


@pytest.mark.slow
def test_resized_and_turned(tmp_path):
    """An annotation of the stored picture is turned with it; both follow --resize."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    images(tmp_path / "in", exif=exif)  # stored 40 x 30, shown 30 x 40
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", coco(tmp_path / "boxes.json"), "--resize", "15")
    assert has(out, "stored picture turned")
    found = targets(tmp_path / "out")["a.png"]
    assert (found["height"], found["width"]) == (20, 15)
    assert rows(found) == [("bar", 6.5, 10, 6, 3), ("ring", 9.5, 1, 4, 5)]
    out = prepare(tmp_path / "in", tmp_path / "plain", "--boxes", tmp_path / "boxes.json", "--no-exif")
    assert rows(targets(tmp_path / "plain")["a.png"]) == sorted(BOXES["a.png"])


def test_problems_are_counted(tmp_path):
    images(tmp_path / "in", [*BOXES, "d.png"])
    boxes = {
        "a.png": [("ring", -5, 3, 10, 8), ("bar", 50, 5, 6, 12), ("bar", 3, 3, 0, 4)],
        "b.png": [("bar", 1, 1, 5, 5)],
        "gone.png": [("bar", 1, 1, 5, 5)],
    }
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", coco(tmp_path / "boxes.json", boxes, iscrowd=1))
    assert "1 without width or height left out, such as of a.png" in out
    assert "1 outside of their image left out, such as of a.png" in out
    assert "1 reaching beyond their image clipped, such as of a.png" in out
    assert "1 annotated image not found, such as gone.png" in out
    assert "2 images without a row in boxes.json, such as c.png: split unlabeled" in out
    assert has(out, "2 crowd regions")
    found = targets(tmp_path / "out")
    assert rows(found["a.png"]) == [("ring", 0, 3, 5, 8)] and found["a.png"]["boxes"][0]["crowd"]
    assert Split(tmp_path / "out", "unlabeled").without_target() == 2


def test_an_image_of_another_shape_is_left_out(tmp_path):
    images(tmp_path / "in", ["a.png", "b.png"])
    images(tmp_path / "in", ["c.png"], (30, 30))
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", coco(tmp_path / "boxes.json"))
    assert "1 with boxes of another size, such as c.png" in out
    assert set(targets(tmp_path / "out")) == {"a.png", "b.png"}
    assert has((tmp_path / "out/skipped.txt").read_text(), "c.png 40x30 30x30")


@pytest.mark.slow
def test_splits_with_files_of_their_own_and_equal_names(tmp_path):
    """As COCO and Roboflow have it: the same file name in two splits."""
    for split in ("train", "valid"):
        images(tmp_path / "in" / split)
        coco(tmp_path / "in" / split / "_annotations.coco.json", {k: v[:1] for k, v in BOXES.items()})
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", tmp_path / "in")
    assert "boxes from in (COCO)" in out
    assert rows(targets(tmp_path / "out", "val")["valid/a.png"]) == [("ring", 2, 3, 10, 8)]
    other = coco(tmp_path / "other.json", {k: v[1:] for k, v in BOXES.items()})
    train = tmp_path / "in/train/_annotations.coco.json"
    prepare(tmp_path / "in", tmp_path / "two", "--boxes", train, "--val-boxes", other)
    assert rows(targets(tmp_path / "two", "val")["valid/a.png"]) == [("bar", 20, 5, 6, 12)]
    assert rows(targets(tmp_path / "two")["train/a.png"]) == [("ring", 2, 3, 10, 8)]


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_the_option_is_named(kind, tmp_path):
    images(tmp_path / "in/images")
    place = {"coco": "boxes.json", "voc": "xml", "yolo": "labels"}[kind]
    {"coco": coco, "voc": voc, "yolo": yolo}[kind](tmp_path / "in" / place)
    out = prepare(tmp_path / "in", tmp_path / "out", "--dry-run")
    assert f"({kind.upper()}): add --boxes {tmp_path / 'in' / place}\n" in out


@pytest.mark.slow
def test_other_boxes_are_another_data_set(tmp_path, refused):
    images(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out", "--boxes", coco(tmp_path / "boxes.json"))
    coco(tmp_path / "boxes.json", {**BOXES, "c.png": [("bar", 1, 1, 2, 2)]})
    line = refused(main, tmp_path / "in", tmp_path / "out", "--boxes", tmp_path / "boxes.json")
    assert has(line, "another data set content")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: coco(p / "x.json", {"a.png": [("cat", 1, 2, 3, 4)]}), "category_id 99 categories 3, 5"),
        (lambda p: coco(p / "x.json", {"z.png": [("bar", 1, 2, 3, 4)]}), "none of the images a.png z.png"),
        (lambda p: coco(p / "x.json", {"a.png": [("bar", 1, 2, "w", 4)]}), "x.json COCO annotations[0].bbox[2] number"),
        (lambda p: edited(p, "images", width="wide"), "x.json images[0].width integer"),
        (lambda p: edited(p, "images", height=float("nan")), "x.json images[0].height finite"),
        (lambda p: edited(p, "images", width=-40), "x.json images[0].width greater"),
        (lambda p: edited(p, "images", id=[1]), "x.json images[0].id string"),
        (lambda p: edited(p, "images", id=1), "x.json two images id 1 a.png b.png"),
        (lambda p: edited(p, "categories", id=5), "x.json two categories id 5"),
        (lambda p: edited(p, "categories", id="ring"), "x.json categories[0].id integer"),
        (lambda p: edited(p, "categories", name="bar"), "x.json categories 3 and 5 both bar"),
        (lambda p: edited(p, "categories", name=" "), "x.json category 3 no name"),
        (lambda p: edited(p, "categories", name=None), "x.json categories[0].name string"),
        (lambda p: write(p / "x.json", "[1]"), "x.json no boxes COCO"),
        (lambda p: write(p / "x.json", '{"images": []}'), "x.json no annotations"),
        (lambda p: write(p / "x.json", '{"images": ['), "x.json COCO json"),
        (lambda p: write(p / "x.csv", "a,b"), "x.csv no boxes COCO VOC YOLO"),
        (lambda p: write(voc(p / "xml") / "a.xml", "<annotation><object></annotation>").parent, "a.xml VOC"),
        (lambda p: changed(voc(p / "xml") / "a.xml", "<name>ring</name>", "<name/>"), "a.xml name"),
        (lambda p: changed(voc(p / "xml") / "a.xml", "<xmax>12</xmax>", ""), "a.xml bndbox/xmax missing"),
        (lambda p: changed(voc(p / "xml") / "a.xml", "<ymin>3", "<ymin>nan"), "a.xml bndbox/ymin nan"),
        (lambda p: changed(voc(p / "xml") / "a.xml", "<width>40", "<width>inf"), "a.xml size/width inf"),
        (lambda p: write(yolo(p / "y/labels") / "a.txt", "0 .5 .5 .1 .1\n1 .5 .5 .1").parent, "a.txt line 2 class x"),
        (lambda p: write(yolo(p / "y/labels") / "a.txt", "0,.5,.5,.1,.1").parent, "a.txt line 1 class x"),
        (lambda p: write(yolo(p / "y/labels") / "a.txt", "ring .5 .5 .1 .1").parent, "a.txt line 1 class x"),
        (lambda p: write(yolo(p / "y/labels").parent / "data.yaml", "names: [a, a]"), "data.yaml a twice"),
        (lambda p: write(yolo(p / "y/labels").parent / "data.yaml", "names: {1: a, 2: b}"), "data.yaml class 0"),
        (lambda p: write(yolo(p / "y/labels").parent / "data.yaml", "names: 3"), "data.yaml names"),
        (lambda p: write(yolo(p / "y/labels") / "a.txt", "7 0.5 0.5 0.1 0.1").parent, "a.txt line 1 class 7 2 names"),
        (lambda p: (yolo(p / "y/labels"), (p / "y/data.yaml").unlink())[0] or p / "y/labels", "names data.yaml"),
        (lambda p: (voc(p / "m"), coco(p / "m/x.json"))[0], "COCO and VOC name"),
        (lambda p: p / "none.json", "none.json exist"),
    ],
)
def test_bad_input(make, message, tmp_path, refused):
    images(tmp_path / "in")
    given = make(tmp_path)
    given = tmp_path / "y/labels" if not hasattr(given, "name") or given.name == "data.yaml" else given
    assert has(refused(main, tmp_path / "in", tmp_path / "out", "--boxes", given), message)
    assert not (tmp_path / "out").exists()


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def edited(folder, key, **values):
    """A COCO json whose first entry of `key` has other values."""
    file = coco(folder / "x.json")
    content = json.loads(file.read_text())
    content[key][0] |= values
    return write(file, json.dumps(content))


def changed(file, old, new):
    """The folder of a file in which text is replaced."""
    assert old in file.read_text()
    return write(file, file.read_text().replace(old, new)).parent


def test_names_and_numbers_as_other_tools_write_them(tmp_path):
    """COCO with numbers as text and a byte order mark; names that YAML would read as false; suffixes in upper case."""
    images(tmp_path / "in")
    content = json.loads(coco(tmp_path / "x.json").read_text())
    for entry in content["images"]:
        entry |= {"width": "40", "height": 30.0}
    for entry in content["annotations"]:
        entry |= {"image_id": str(entry["image_id"]), "category_id": str(entry["category_id"]), "iscrowd": "0"}
    write(tmp_path / "x.json", "\ufeff" + json.dumps(content))
    prepare(tmp_path / "in", tmp_path / "out", "--boxes", tmp_path / "x.json")
    assert rows(targets(tmp_path / "out")["a.png"]) == sorted(BOXES["a.png"])
    assert not any("crowd" in box for box in targets(tmp_path / "out")["a.png"]["boxes"])
    folder = yolo(tmp_path / "y/labels")
    write(tmp_path / "y/data.yaml", "names: [no, yes]")
    write(folder / "notes.txt", "made by hand\n")
    (folder / "a.txt").rename(folder / "a.TXT")
    prepare(tmp_path / "in", tmp_path / "out2", "--boxes", folder)
    assert {row[0] for row in rows(targets(tmp_path / "out2")["a.png"])} == {"no", "yes"}


@pytest.mark.parametrize(
    ("outline", "problem"),
    [
        ([[float("nan"), 1, 2, 3, 4, 5]], "not finite"),
        ([[None, 1, 2, 3, 4, 5]], "not finite"),
        ([[1e9, 1, 2, 3, 4, 5]], "far beyond"),
        ([["x", 1, 2, 3, 4, 5]], "other values than numbers"),
        ([[1, 2, 3, 4, 5]], "three points"),
        ([[1, 2, 3, 4]], "three points"),
        ([[]], "three points"),
        ([1, 2, 3, 4, 5, 6], "neither"),
        ("12 3", "neither"),
        ({"size": [30, 40]}, "do not add up"),
        ({"size": [10, 10], "counts": [100]}, "another size"),
        ({"size": [30, 40], "counts": [1000, 100]}, "do not add up"),
        ({"size": [30, 40], "counts": [1300, -100]}, "do not add up"),
        ({"size": [30, 40], "counts": "abc"}, "do not add up"),
    ],
)
def test_an_outline_that_cannot_be_drawn_is_left_out(outline, problem, tmp_path):
    images(tmp_path / "in")
    file = edited(tmp_path, "annotations", segmentation=outline)
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", file, "--resize", 20)
    assert has(out, f"1 without their outline {problem} such as of a.png")
    found = targets(tmp_path / "out")["a.png"]["boxes"]
    assert len(found) == 2 and not any("segmentation" in box for box in found)


def test_options_that_exclude_each_other(tmp_path, refused):
    images(tmp_path / "in")
    file = coco(tmp_path / "x.json")
    for more in (["--no-labels"], ["--labels", file]):
        assert has(refused(main, tmp_path / "in", tmp_path / "out", "--boxes", file, *more), f"--boxes {more[0]}")
    assert has(refused(main, tmp_path / "in", tmp_path / "out", "--val-boxes", file), "--val-boxes --boxes")
    line = refused(main, tmp_path / "in", tmp_path / "out", "--boxes", file, "--val-boxes", file)
    assert has(line, "--val-boxes split val")


def test_a_class_that_train_does_not_have(tmp_path, refused):
    for split in ("train", "val"):
        images(tmp_path / "in" / split)
    one = coco(tmp_path / "one.json", {"a.png": [("bar", 1, 1, 2, 2)]}, ["bar"])
    line = refused(main, tmp_path / "in", tmp_path / "out", "--boxes", one, "--val-boxes", coco(tmp_path / "two.json"))
    assert has(line, "two.json ring one.json bar")


@pytest.mark.slow
def test_tiles_have_the_parts_of_boxes_that_are_in_them(tmp_path):
    """20 % of a box must be in a tile; a tile without a box is a negative. Also of pictures that are turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    boxes = {"a.png": [("ring", 2, 3, 10, 8), ("bar", 10, 18, 12, 4), ("ring", 15, 2, 10, 4)], "b.png": []}
    images(tmp_path / "in", boxes)
    given = coco(tmp_path / "boxes.json", boxes)
    words = "--boxes", given, "--tile", "16"
    out = prepare(tmp_path / "in", tmp_path / "out", *words)
    assert has(out, "train 2 images") and "no labels" not in out and has(out, "train 2 classes of boxes: ring 2, bar 1")
    found = targets(tmp_path / "out")
    assert len(found) == 12 and all((x["height"], x["width"]) == (16, 16) for x in found.values())
    expected = {
        "a.png@0,0": [("ring", 2, 3, 10, 8)],
        "a.png@0,16": [("ring", 0, 2, 9, 4)],
        "a.png@0,24": [],
        "a.png@14,0": [("bar", 10, 4, 6, 4)],
        "a.png@14,16": [("bar", 0, 4, 6, 4)],
        "a.png@14,24": [],
    }
    assert {name: rows(x) for name, x in found.items() if name[0] == "a"} == expected
    assert all(not x["boxes"] for name, x in found.items() if name[0] == "b")
    images(tmp_path / "turned", boxes, exif=exif)  # stored 40 x 30, shown 30 x 40
    out = prepare(tmp_path / "turned", tmp_path / "upright", *words)
    assert has(out, "stored picture turned")
    found = targets(tmp_path / "upright")
    assert rows(found["a.png@0,14"]) == [("ring", 5, 2, 8, 10)] and rows(found["a.png@16,14"]) == [
        ("ring", 10, 0, 4, 9)
    ]


def test_boxes_and_masks_exclude_each_other(tmp_path, refused):
    images(tmp_path / "in")
    words = tmp_path / "in", tmp_path / "out", "--boxes", coco(tmp_path / "boxes.json"), "--masks", "labels"
    assert has(refused(main, *words, "--mask-classes", tmp_path / "names.txt"), "--boxes --masks exclude")


def test_masks_beside_images_with_boxes_are_no_question(tmp_path):
    images(tmp_path / "in/images", BOXES)
    images(tmp_path / "in/annotations", BOXES)
    given = coco(tmp_path / "boxes.json", {f"images/{name}": rows for name, rows in BOXES.items()})
    out = prepare(tmp_path / "in", tmp_path / "out", "--boxes", given)
    assert has(out, "unlabeled 3 images, no boxes") and len(targets(tmp_path / "out")) == 3
