"""`data/prepare.py --masks`: pairs, types of masks, classes, bad input; what shards and preview have."""

import io
import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from configs.errors import UserError
from data.exif import upright
from data.masks import (
    MaskClasses,
    class_colours,
    cut_mask,
    decode_mask,
    encode_mask,
    overlay,
    read_classes,
    read_mask,
    shrink_mask,
)
from data.planning import ORDER_SEED
from data.reading import ImageError
from data.shard_index import read_index
from data.shards import Split
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip, picture
from tests.data.test_prepare import prepared

MASK = np.arange(20 * 16).reshape(16, 20) % 3  # of tests.data.helpers.picture
MASK[0] = 255
NAMES = "cat\ndog\nsky\n"


def png(pixels, mode=None) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(out, "png")
    return out.getvalue()


def files(count: int = 3, **more: bytes) -> dict[str, bytes]:
    found = {}
    for i in range(count):
        mask = np.roll(MASK, i, 1).astype(np.uint8)
        found |= {f"images/{i}.jpg": picture(i), f"labels/{i}.png": png(mask)}
    return found | {"classes.txt": NAMES.encode()} | more


def stored(out, split: str = "train") -> dict[str, np.ndarray]:
    """The masks of a split by the name of their image; files are in the order of the shuffled names."""
    samples = Split(out, split)
    order = np.random.default_rng(ORDER_SEED).permutation(len(samples)).tolist()
    return {k: decode_mask(samples.read_target(i)) for i, k in enumerate(order)}


def classes_file(tmp_path, text: str = NAMES):
    (tmp_path / "names.csv").write_text(text)
    return tmp_path / "names.csv"


def prepare(source, tmp_path, *more, text: str = NAMES, out: str = "out"):
    masks = () if "--masks" in more else ("--masks", "labels")
    prepared(source, tmp_path / out, "--mask-classes", classes_file(tmp_path, text), *masks, *more)
    return tmp_path / out


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_a_folder_of_the_source(make, tmp_path, capsys):
    out = prepare(make(files(), tmp_path / "x.zip"), tmp_path)
    index = read_index(out)
    assert index.classes is None and index.targets["names"] == ["cat", "dog", "sky"] and index.targets["ignore"] == 255
    masks = stored(out)
    assert all((masks[i] == np.roll(MASK, i, 1)).all() for i in range(3))
    pixels = sum(np.bincount(np.minimum(mask, 3).ravel(), minlength=4) for mask in masks.values())
    assert index.targets["pixels"] == pixels.tolist()
    assert has(capsys.readouterr().out, "3 of 3 images cat 31. % without a class 6.2 %")
    assert (out / "preview.png").exists()


def test_masks_beside_images_are_recognised(tmp_path, refused):
    from data.prepare import main

    source = as_folder(files(), tmp_path / "x")
    line = refused(main, source, tmp_path / "out")
    assert has(line, "images/0.jpg labels/0.png --masks labels") and not (tmp_path / "out").exists()
    (source / "images/9.jpg").write_bytes(picture(9))  # has no mask: these may be class folders
    assert has(refused(main, source, tmp_path / "out"), "labels/ beside images/ not classes --masks --no-splits")
    prepared(source, tmp_path / "out", "--no-splits")
    assert read_index(tmp_path / "out").classes == ["images", "labels"]


def test_names_are_asked_for_with_the_values(tmp_path, refused):
    from data.prepare import main

    line = refused(main, as_folder(files(), tmp_path / "x"), tmp_path / "out", "--masks", "labels")
    assert has(line, "--mask-classes 0, 1, 2, 255")


@pytest.mark.parametrize("ending", ["_mask", "_L", "_label", "_gt", "_seg", "-labels", "_gtFine_labelIds", ""])
def test_another_source_and_endings(ending, tmp_path, capsys):
    source = as_folder({f"train/a/{i}.jpg": picture(i) for i in range(3)}, tmp_path / "x")
    masks = {f"top/train/a/{i}{ending}.png": png(np.full((16, 20), i, np.uint8)) for i in range(3)}
    masks["top/train/a/7.png"] = png(MASK.astype(np.uint8))
    out = prepare(source, tmp_path, "--masks", as_zip(masks, tmp_path / "masks.zip"))
    assert [int(mask[0, 0]) for _, mask in sorted(stored(out).items())] == [0, 1, 2]
    assert has(capsys.readouterr().out, "1 mask without an image top/train/a/7.png")


def test_a_column_of_a_table(tmp_path):
    source = {"x/1.jpg": picture(1), "x/2.jpg": picture(2)}
    masks = {f"m/{name}.png": png(np.full((16, 20), i, np.uint8)) for i, name in enumerate("ab")}
    (tmp_path / "t.csv").write_text("path,mask,split\n1.jpg,b.png,train\n2.jpg,m/a.png,val\n")
    more = ("--masks", as_folder(masks, tmp_path / "m"), "--labels", tmp_path / "t.csv")
    out = prepare(as_folder(source, tmp_path / "x"), tmp_path, *more)
    assert stored(out)[0].max() == 1 and stored(out, "val")[0].max() == 0


def test_images_without_a_mask_are_set_apart(tmp_path, capsys):
    found = files()
    del found["labels/1.png"]
    out = prepare(as_folder(found, tmp_path / "x"), tmp_path)
    assert {split: len(Split(out, split)) for split in read_index(out).splits} == {"train": 2, "unlabeled": 1}
    assert has(capsys.readouterr().out, "1 image without a mask in labels images/1.jpg unlabeled")
    assert Split(out, "unlabeled").read_target(0) == b""


def encoded(kind: str) -> bytes:
    mask, out = MASK.astype(np.uint8), io.BytesIO()
    if kind == "palette":
        picture = Image.fromarray(mask, "P")
        picture.putpalette(list(range(256)) * 3)
        return png(picture)
    if kind == "npy":
        np.save(out, MASK.astype(np.int64))
    elif kind == "tif":
        tifffile.imwrite(out, MASK.astype(np.int32))
    elif kind == "grey as colour":
        return png(np.repeat(mask[..., None], 3, 2))
    else:
        return png(MASK.astype(np.uint16) if kind == "16 bits" else mask)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette", "npy", "tif", "grey as colour"])
def test_types_of_masks(kind, tmp_path):
    classes = read_classes(classes_file(tmp_path), (255,))
    assert (read_mask(encoded(kind), classes, 1 << 20) == MASK).all()


def test_colours_values_and_ignored_rows(tmp_path):
    colours = read_classes(
        classes_file(tmp_path, "name,r,g,b\ncat,1,2,3\ndog,255,0,0\ndog,0,0,9\nignore,7,7,7\n"), (255,)
    )
    assert colours.names == ["cat", "dog"]
    mask = read_mask(png(np.array([[[1, 2, 3], [255, 0, 0], [0, 0, 9], [7, 7, 7]]], np.uint8)), colours, 99)
    assert mask.tolist() == [[0, 1, 1, 255]]
    values = read_classes(classes_file(tmp_path, '"bed, big",1\nwall,255\n'), (0,))
    assert values.names == ["bed, big", "wall"]
    assert read_mask(png(np.array([[0, 1, 255]], np.uint8)), values, 99).tolist() == [[255, 0, 1]]
    with pytest.raises(ImageError, match="#050505"):
        read_mask(png(np.full((1, 1, 3), 5, np.uint8)), colours, 99)


def test_more_than_255_classes():
    classes = MaskClasses([str(i) for i in range(300)], (0,))
    mask = read_mask(png(np.array([[0, 1, 299]], np.uint16)), classes, 99)
    assert mask.dtype == np.uint16 and decode_mask(encode_mask(mask)).tolist() == [[65535, 1, 299]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("labels/1.png", png(MASK[:, :10].astype(np.uint8)), "mask of another size labels/1.png 10x16 20x16"),
        ("labels/1.png", png(np.full((16, 20), 3, np.uint8)), "unknown classes values 3 3 classes --ignore"),
        ("labels/1.png", png(np.zeros((16, 20), np.uint8))[:-30], "unreadable mask cut short"),
        ("labels/1.png", picture(1, kind="png"), "unreadable mask colour name,r,g,b"),
        ("labels/1.png", picture(1, mode="L"), "unreadable mask JPEG PNG"),
    ],
)
def test_bad_masks_are_named_and_left_out(name, data, message, tmp_path, capsys):
    out = prepare(as_folder(files(4) | {name: data}, tmp_path / "x"), tmp_path)
    shown = capsys.readouterr().out
    assert has(shown, f"warning: images/1.jpg {message}") and len(Split(out, "train")) == 3
    assert has((out / "skipped.txt").read_text(), f"images/1.jpg {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names.csv is empty"),
        ("a,1\nb,1\n", "two classes"),
        ("a,1,2,3\nb,1,2\n", "b,1,2 name,r,g,b"),
        ("a,1,2,3\nb,1,2,256\n", "255"),
        ("a\nb\na\n", "a twice"),
        ("name,value\na,x\n", "a,x name,value"),
        ("a;0\nb;1\n", "a;0 comma name,value"),
        ("a\t0\nb\t1\n", "a 0 comma name,value"),
    ],
)
def test_bad_lists_of_classes(text, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_classes(classes_file(tmp_path, text), (255,))
    assert has(error.value, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--masks", "nowhere"), "nowhere folder"),
        (("--masks", "other"), "no mask has the path of an image images/0.jpg"),
        (("--masks", "images", "--ignore", "3"), "JPEG"),
    ],
)
def test_bad_options(more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_folder({"z.png": png(MASK.astype(np.uint8))}, tmp_path / "other")
    with pytest.raises(UserError) as error:
        prepare(as_folder(files(), tmp_path / "x"), tmp_path, *more)
    assert has(error.value, message)
    assert not (tmp_path / "out").exists()


def test_two_masks_of_one_image(tmp_path):
    found = files() | {"labels/1.tif": encoded("tif")}
    with pytest.raises(UserError, match=r"images/1\.jpg may have"):
        prepare(as_folder(found, tmp_path / "x"), tmp_path)


def test_one_mask_of_two_images(tmp_path):
    found = files() | {"images/1.png": picture(7, kind="png")}
    with pytest.raises(UserError, match=r"labels/1\.png may be of images/1\.jpg and images/1\.png: .*--labels"):
        prepare(as_folder(found, tmp_path / "x"), tmp_path)


def test_all_masks_wrong_stops_before_the_work(tmp_path):
    with pytest.raises(UserError, match="no image looked at can be used with its mask"):
        prepare(as_folder(files(), tmp_path / "x"), tmp_path, text="cat\n")


def test_other_classes_are_another_data_set(tmp_path):
    source = as_folder(files(), tmp_path / "x")
    prepare(source, tmp_path)
    with pytest.raises(UserError, match="another data set"):
        prepare(source, tmp_path, text="cat\ndog\ncloud\n")


def test_shrunk_with_the_image(tmp_path):
    """A marked corner stays in its corner."""
    mask = np.zeros((16, 20), np.uint8)
    mask[:4, -4:] = 2
    source = as_folder(files(1) | {"labels/0.png": png(mask)}, tmp_path / "x")
    small = stored(prepare(source, tmp_path, "--resize", "8"))[0]
    assert small.shape == (8, 10) and (small[:2, -2:] == 2).all() and small.sum() == 8
    assert (small == shrink_mask(mask, 8, 10)).all()


def turned(orientation: int, size: tuple[int, int] = (20, 16)) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.new("RGB", size).save(out, "jpeg", exif=exif)
    return out.getvalue()


def test_turned_by_exif(tmp_path, capsys):
    """The mask's size says whether it is turned already; where it cannot, the image is refused."""
    tall = upright(MASK, 6).astype(np.uint8)
    found = files(1) | {"images/0.jpg": turned(6), "images/1.jpg": turned(6), "labels/1.png": png(tall)}
    found |= {"images/2.jpg": turned(3), "labels/2.png": png(MASK.astype(np.uint8))}
    out = prepare(as_folder(found, tmp_path / "x"), tmp_path)
    masks = stored(out)
    assert len(masks) == 2 and all((mask == tall).all() for mask in masks.values())
    assert has(capsys.readouterr().out, "images/2.jpg turned by EXIF --no-exif")
    assert len(stored(prepare(as_folder(found, tmp_path / "x"), tmp_path, "--no-exif", out="raw"))) == 2


def test_a_second_run_writes_nothing(tmp_path, capsys):
    source = as_folder(files(), tmp_path / "x")
    before = (prepare(source, tmp_path) / "index.json").read_bytes()
    assert "complete already" in (prepare(source, tmp_path), capsys.readouterr().out)[1]
    assert json.loads(before)["targets"] == read_index(tmp_path / "out").targets


def test_tiles_and_colours():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert cut_mask(mask, 1, 2, 2, 2).tolist() == [[5, 255], [255, 255]]
    assert cut_mask(mask, -1, 0, 2, 2).tolist() == [[255, 255], [0, 1]]
    assert len({tuple(colour) for colour in class_colours(40).tolist()}) == 40
    shown = overlay(np.full((1, 2, 3), 100, np.uint8), np.array([[0, 255]]), 3)
    assert shown[0, 1].tolist() == [50] * 3 and shown[0, 0].std() > 0
