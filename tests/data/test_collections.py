"""Every kind of collection in docs/data.md: classes, counts and pixel values of the shards that it becomes."""

import io
import json
import tarfile

import imagecodecs
import numpy as np
import pillow_heif
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from data.decode import decode
from data.folder import iterate_names
from data.shard_index import read_index
from data.shards import Split
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip
from tests.data.test_layouts import refusal
from tests.data.test_prepare import prepared

YY, XX = np.mgrid[:40, :30]
RAMP = np.dstack([YY * 6, XX * 8, (YY + XX) * 3]).astype(np.uint8)  # no two turns of it are equal


def pixels(number: int) -> np.ndarray:
    """A colour picture [40, 30, 3] of its own."""
    return RAMP + np.uint8(number)


def png(array: np.ndarray) -> bytes:
    return imagecodecs.png_encode(array)


def tiff(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def files(*names: str) -> dict[str, bytes]:
    """Name -> a PNG; the n-th one is of `pixels(n)`."""
    return {name: png(pixels(number)) for number, name in enumerate(names)}


def loaded(folder) -> dict[str, tuple[str, str | None, np.ndarray]]:
    """Name -> split, class and pixels [H, W, C] of each image of a folder of shards."""
    index, found = read_index(folder), {}
    for name in index.splits:
        split = Split(folder, name)
        for i, original in enumerate(iterate_names(split)):
            data, label = split.read(i)
            assert original not in found
            image = decode(data).permute(1, 2, 0).numpy()
            found[original] = name, index.classes[label] if label >= 0 else None, image
    return found


def check(source, out, expected: dict[str, tuple[str, str | None]], *args) -> None:
    """Prepare `source` and compare split, class and pixels of every image; the n-th one has `pixels(n)`."""
    prepared(source, out, *args)
    found = loaded(out)
    assert {name: (split, label) for name, (split, label, _) in found.items()} == expected
    for number, name in enumerate(expected):
        assert np.array_equal(found[name][2], pixels(number)), name
    assert read_index(out).classes == (sorted({label for _, label in expected.values()} - {None}) or None)


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar, lambda x, path: as_tar(x, path, "w:gz")])
@pytest.mark.parametrize(
    "expected",
    [
        {"CAT/1.png": ("train", "CAT"), "DOG/more/2.png": ("train", "DOG")},
        {"train/CAT/1.png": ("train", "CAT"), "Testing/CAT/2.png": ("test", "CAT")},
        {"CAT/train/1.png": ("train", "CAT"), "CAT/test/2.png": ("test", "CAT"), "DOG/train/3.png": ("train", "DOG")},
        {"train/a/1.png": ("train", "a"), "unlabeled/x/2.png": ("unlabeled", None)},
        {"train/a/1.png": ("train", "a"), "train/b/2.png": ("train", "b"), "test/3.png": ("test", None)},
        {"train/a/1.png": ("train", "a"), "train/b/2.png": ("train", "b"), "test/test/3.png": ("test", None)},
        {"train/images/1.png": ("train", None), "val/images/2.png": ("val", None)},
        {"imagesTr/1.png": ("train", None), "imagesTs/2.png": ("test", None)},
        {"Train Set/a/1.png": ("train", "a"), "Valid/a/2.png": ("val", "a")},
        {"x/train/a/1.png": ("train", "a"), "x/val2017/a/2.png": ("val", "a")},
    ],
    ids=str,
)  # fmt: skip
def test_folders(expected, make, tmp_path):
    check(make(files(*expected), tmp_path / "in"), tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("names", "words", "args", "expected"),
    [
        ("images/1 masks/1", "mask of the same path --masks masks --splits",
         ["train=images"], {"images/1.png": ("train", None)}),
        ("images/1 depth/1", "depth/ beside images/ are not classes --masks --splits train=images --no-splits",
         ["train=images"], {"images/1.png": ("train", None)}),
        ("train/images/1 train/masks/1 val/images/2 val/masks/2",
         "mask of the same path --masks train/masks --splits",
         ["train=train/images", "val=val/images"],
         {"train/images/1.png": ("train", None), "val/images/2.png": ("val", None)}),
        ("train/images/1 train/masks/2 val/images/2 val/masks/2",
         "split train: masks/ beside images/ --splits train=train/images val=val/images",
         ["train=train/images", "val=val/images"],
         {"train/images/1.png": ("train", None), "val/images/2.png": ("val", None)}),
        ("fold1/a/1 fold2/a/2", "parts of one collection --splits train=fold1 train=fold2 --no-splits",
         ["train=fold1", "train=fold2"], {"fold1/a/1.png": ("train", "a"), "fold2/a/2.png": ("train", "a")}),
        ("images_001/images/1 images_002/images/2", "parts of one collection --splits train=images_001",
         ["train=images_001", "train=images_002"],
         {"images_001/images/1.png": ("train", None), "images_002/images/2.png": ("train", None)}),
        ("color/a/1 color/b/1 gray/a/1 gray/b/1", "color/, gray/ same sub-folders (a/, b/) --splits train=color",
         ["train=color"], {"color/a/1.png": ("train", "a"), "color/b/1.png": ("train", "b")}),
        ("x/train/a/1 x/train/b/1 y/train/a/1 y/train/b/1 x/val/a/1 y/val/b/1",
         "same sub-folders --splits train=x/train", ["train=x/train", "val=x/val"],
         {"x/train/a/1.png": ("train", "a"), "x/train/b/1.png": ("train", "b"), "x/val/a/1.png": ("val", "a")}),
        ("Testdaten/a/1 Trainingsdaten/a/1", "may be splits --splits test=Testdaten train=Trainingsdaten",
         ["test=Testdaten", "train=Trainingsdaten"],
         {"Testdaten/a/1.png": ("test", "a"), "Trainingsdaten/a/1.png": ("train", "a")}),
        ("train1/a/1 train2/a/1", "names of one split --splits train=train1 train=train2",
         ["train=train1", "train=train2"],
         {"train1/a/1.png": ("train", "a"), "train2/a/1.png": ("train", "a")}),
    ],
)  # fmt: skip
def test_folders_that_are_no_classes(names, words, args, expected, tmp_path):
    listed = [f"{name}.png" for name in names.split()]
    source = as_folder(files(*listed), tmp_path / "in")
    message = refusal(source, tmp_path / "out")
    assert has(message, words), message
    prepared(source, tmp_path / "out", "--splits", *args)  # as the message says
    found = loaded(tmp_path / "out")
    assert {name: (split, label) for name, (split, label, _) in found.items()} == expected
    assert all(np.array_equal(found[name][2], pixels(listed.index(name))) for name in expected)


def test_no_splits_makes_any_folder_a_class(tmp_path):
    expected = {"images/1.png": ("train", "images"), "masks/1.png": ("train", "masks")}
    check(as_folder(files(*expected), tmp_path / "in"), tmp_path / "out", expected, "--no-splits")


def shard(numbers, suffix: str = "cls") -> bytes:
    """A WebDataset tar with the labels 0 and 1, or the names a and b in json."""
    members = {f"{n:05}.png": png(pixels(n)) for n in numbers}
    label = {"cls": lambda n: str(n % 2), "json": lambda n: json.dumps({"label": "ab"[n % 2], "caption": "x"})}[suffix]
    members |= {f"{n:05}.{suffix}": label(n).encode() for n in numbers}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted(members):
            member = tarfile.TarInfo(name)
            member.size = len(members[name])
            tar.addfile(member, io.BytesIO(members[name]))
    return out.getvalue()


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize(
    ("tars", "splits"),
    [
        ({"imagenet1k-train-0000.tar": (0, 1), "imagenet1k-train-0001.tar": (2, 3)}, ["train"] * 4),
        ({"train/00000.tar": (0, 1), "val/00000.tar": (2, 3)}, ["train"] * 2 + ["val"] * 2),
        ({"train-0.tar": (0, 1), "validation-0.tar": (2, 3)}, ["train"] * 2 + ["val"] * 2),
    ],
)  # fmt: skip
def test_webdataset_tars(tars, splits, suffix, tmp_path):
    source = as_folder({name: shard(numbers, suffix) for name, numbers in tars.items()}, tmp_path / "in")
    labels = "01" if suffix == "cls" else "ab"
    names = [f"{name[:-4]}/{n:05}.png" for name, numbers in tars.items() for n in numbers]
    check(source, tmp_path / "out", {name: (splits[n], labels[n % 2]) for n, name in enumerate(names)})


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("id,label\n{0},a\n{1},b\n{2},a\n", "aba"),
        ('\ufeff"file";"class"\n"{0}.png";"a"\n"{1}.png";"b"\n"{2}.png";"a"\n', "aba"),
        ("path,label\nC:\\x\\images\\{0}.png,a\n/home/me/{1}.png,b\n{2},a\n", "aba"),
        ("id_code,diagnosis\n{0},2.0\n{1},10.0\n{2},2.0\n", ["2", "10", "2"]),
        ("path,label,,\n{0},a,,\n{1},b,,\n{2},a,,\n", "aba"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables(text, labels, encoding, tmp_path):
    expected = {f"images/é{n}.png": ("train", labels[n]) for n in range(3)}
    source = as_folder(files(*expected), tmp_path / "in")
    (tmp_path / "x.csv").write_bytes(text.format("e\u0301" + "0", "é1", "é2").encode(encoding))  # NFD, as on macOS
    prepared(source, tmp_path / "out", "--labels", tmp_path / "x.csv")
    found = loaded(tmp_path / "out")
    assert {name: (split, label) for name, (split, label, _) in found.items()} == expected
    assert all(np.array_equal(found[name][2], pixels(n)) for n, name in enumerate(expected))


def test_one_hot_columns(tmp_path, capsys):
    expected = {f"{n}.png": ("train", ["NV", "MEL", "NV"][n]) for n in range(3)}
    source = as_folder(files(*expected), tmp_path / "in")
    table = tmp_path / "x.csv"
    table.write_text("image,MEL,NV,BCC\n0,0.0,1.0,0.0\n1,1.0,0.0,0.0\n2,0.0,1.0,0.0\n")
    assert has(refusal(source, tmp_path / "out", "--labels", table), "--label-column MEL NV BCC one is 1 in each row")
    check(source, tmp_path / "out", expected, "--labels", table, "--label-column", "MEL", "NV", "BCC")
    assert "its name is the class" in capsys.readouterr().out


def test_splits_and_other_columns_of_a_table(tmp_path, capsys):
    expected = {"0.png": ("train", "a"), "1.png": ("test", "a"), "2.png": ("train", "b")}
    source = as_folder(files(*expected), tmp_path / "in")
    (tmp_path / "x.csv").write_text("file,label,usage,age\n0.png,a,Training,3\n1.png,a,Test,4\n2.png,b,Training,5\n")
    check(source, tmp_path / "out", expected, "--labels", tmp_path / "x.csv")
    out = capsys.readouterr().out
    assert has(out, "splits from column usage of x.csv") and has(out, "1 column not used: age")


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["a, b", "a"], "1 label such as `a, b` may be several separate |"),
        (["['a']", "['b']"], "2 labels such as `['a']` may be several"),
        (["1 2", "3"], "1 label such as `1 2` may be several"),
        (["-1", "1"], "label -1 is a class leave the cell empty"),
        (["nan", "b"], "label nan is a class"),
        (["Cat", "cat"], "`Cat` and `cat` are different classes, but look alike"),
    ],
)
def test_doubtful_labels_are_named(cells, words, tmp_path, capsys):
    source = as_folder(files("0.png", "1.png"), tmp_path / "in")
    (tmp_path / "x.tsv").write_text("file\tlabel\n" + "".join(f"{n}.png\t{cell}\n" for n, cell in enumerate(cells)))
    prepared(source, tmp_path / "out", "--labels", tmp_path / "x.tsv")
    assert has(capsys.readouterr().out, f"warning: {words}")
    assert [loaded(tmp_path / "out")[f"{n}.png"][1] for n in range(2)] == cells


def test_contradicting_rows_name_an_image(tmp_path, capsys):
    source = as_folder(files("0.png", "1.png"), tmp_path / "in")
    (tmp_path / "x.csv").write_text("file,label\n0.png,a\n0.png,b\n1.png,a\n")
    check(source, tmp_path / "out", {"0.png": ("train", None), "1.png": ("train", "a")}, "--labels", tmp_path / "x.csv")
    assert has(capsys.readouterr().out, "1 image with rows of several labels, such as 0.png: a, b")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "1 0.png\n2 1.png\n", "names an image last in each line"),
        ("x.json", '{"images": [{"id": 1}], "annotations": []}', "structure that is not known"),
        ("x.parquet", "PAR1", "damaged, cut short or not parquet"),
    ],
)
def test_tables_of_other_kinds_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    source = as_folder(files("0.png", "1.png"), tmp_path / "in")
    assert has(refusal(source, tmp_path / "out", "--labels", tmp_path / name), words)


def turned(orientation: int) -> Image.Image:
    """The ramp as a camera stores it with an EXIF orientation."""
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
             7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    image = Image.fromarray(RAMP)
    return image if orientation == 1 else image.transpose(Image.Transpose[turns[orientation]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_upright_in_every_type(orientation, tmp_path):
    image, exif, images = turned(orientation), Image.Exif(), {}
    exif[0x0112] = orientation
    exif = exif.tobytes()
    for kind, options in {
        "jpeg": {"exif": exif, "quality": 100, "subsampling": 0}, "png": {"exif": exif},
        "webp": {"exif": exif, "lossless": True}, "tiff": {"tiffinfo": {0x0112: orientation}},
        "avif": {"exif": exif, "quality": 100, "subsampling": "4:4:4"},
    }.items():  # fmt: skip
        out = io.BytesIO()
        image.save(out, kind, **options)
        images[f"x.{kind}"] = out.getvalue()
    heif, out = pillow_heif.from_pillow(image), io.BytesIO()
    heif.info["exif"] = exif
    heif.save(out, quality=-1, chroma=444)
    prepared(as_folder(images | {"x.heic": out.getvalue()}, tmp_path / "in"), tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert len(found) == 6
    for name, (_, _, image) in found.items():
        lossless = name in ("x.png", "x.webp", "x.tiff")
        assert image.shape == RAMP.shape, name
        assert np.abs(image.astype(int) - RAMP).max() <= (0 if lossless else 4), name


def scan() -> bytes:
    """A CT slice as DICOM: signed 16 bits with a window."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    image = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID, image.PhotometricInterpretation = CTImageStorage, "1.2.3", "MONOCHROME2"
    (image.Rows, image.Columns), image.SamplesPerPixel, image.PixelRepresentation = SIGNED.shape, 1, 1
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelData, image.WindowCenter, image.WindowWidth = SIGNED.tobytes(), 500, 1001
    out = io.BytesIO()
    pydicom.dcmwrite(out, image, enforce_file_format=True)
    return out.getvalue()


SIGNED = RAMP[..., 0].astype(np.int16) * 10 - 1024
DEEP = RAMP.astype(np.uint16) * 16 + 7  # of 12 bits
BANDS = np.random.default_rng(0).integers(0, 10000, (20, 24, 13)).astype(np.uint16)
NIR = np.dstack([RAMP, RAMP[..., 0] // 2])
DEPTHS = {  # name -> file, options, values from 0 to 1 or 8-bit values
    "signed 16-bit TIFF": ("a.tif", tiff(SIGNED), ["--value-range", "-1024", "1516"], (SIGNED + 1024) / 2540),
    "unsigned 32-bit TIFF": ("a.tif", tiff(SIGNED.astype("i4").astype("u4") % 5000), ["--value-range", "0", "5000"],
                             SIGNED.astype("i4").astype("u4") % 5000 / 5000),
    "signed 16-bit DICOM": ("a.dcm", scan(), [], ((SIGNED.astype(float) + 0.5) / 1000).clip(0, 1)),
    "12-bit RGB TIFF": ("a.tif", tiff(DEEP, photometric="rgb"), ["--value-range", "0", "4095"], DEEP / 4095),
    "16-bit RGB TIFF, big-endian": ("a.tif", tiff(DEEP, photometric="rgb", byteorder=">"), [], DEEP / 65535),
    "16-bit RGB PNG": ("a.png", png(DEEP), [], DEEP / 65535),
    "red, green, blue, near infrared": ("a.tif", tiff(NIR, photometric="rgb", extrasamples=["unspecified"]), [], NIR),
    "13 bands": ("a.tif", tiff(BANDS, photometric="minisblack", planarconfig="contig"), [], BANDS / 65535),
    "13 bands, planar": ("a.tif", tiff(np.moveaxis(BANDS, 2, 0), photometric="minisblack", planarconfig="separate"), [],
                         BANDS / 65535),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHS)
def test_depths_and_bands(name, tmp_path):
    file, data, options, expected = DEPTHS[name]
    prepared(as_folder({file: data}, tmp_path / "in"), tmp_path / "out", *options)
    ((_, _, image),) = loaded(tmp_path / "out").values()
    expected = expected[..., None] if expected.ndim == 2 else expected
    assert image.shape == expected.shape and np.allclose(image, expected, atol=1.5e-5)


def test_dark_images_name_the_range(tmp_path, capsys):
    source = as_folder({"a.png": png(DEEP)}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    assert has(capsys.readouterr().out, f"up to {DEEP.max():,} of 65,535, so they are dark --value-range 0 4095")
    prepared(source, tmp_path / "two", "--value-range", "0", "4095")
    assert "so they are dark" not in capsys.readouterr().out


def avif_sequence() -> bytes:
    out = io.BytesIO()
    options = {"save_all": True, "append_images": [Image.fromarray(255 - RAMP)], "quality": 100}
    Image.fromarray(RAMP).save(out, "avif", subsampling="4:4:4", **options)
    return out.getvalue()


def test_of_several_frames_the_first(tmp_path, capsys):
    images = {"a.avif": avif_sequence()}
    for kind in ("png", "webp"):
        out = io.BytesIO()
        Image.fromarray(RAMP).save(out, kind, save_all=True, append_images=[Image.fromarray(255 - RAMP)], lossless=True)
        images[f"a.{kind}"] = out.getvalue()
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert all(np.abs(image.astype(int) - RAMP).max() <= 4 for _, _, image in found.values()) and len(found) == 3
    assert "3 pictures have several frames" in capsys.readouterr().out


def array(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels, **options)
    return out.getvalue()


REFUSED = {
    "empty.jpg": (b"", "damaged: an empty file"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image: a web page"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not an image: a Git LFS pointer"),
    "video.heic": (b"\0\0\0\x18ftypisom\0\0\2\0isommp42" + bytes(99), "not an image: not an image of a known type"),
    "deep.jpg": (imagecodecs.jpeg8_encode(DEEP, bitspersample=12), "unsupported: a 12-bit JPEG"),
    "exact.jpg": (imagecodecs.ljpeg_encode(RAMP[..., 0]), "unsupported: a lossless JPEG"),
    "xl.jpg": (imagecodecs.jpegxl_encode(RAMP), "unsupported: JPEG XL"),
    "objects.npy": (array(np.array([{}], object), allow_pickle=True), "unsupported: a .npy of Python objects"),
    "first.npy": (array(np.zeros((3, 32, 32), np.uint8)), "unsupported: has shape (3, 32, 32) channels first moveaxis"),
    "cut.png": (png(RAMP)[:-60], "damaged: not a readable image"),
}


def test_what_cannot_be_used_is_named_for_what_it_is(tmp_path, capsys):
    source = as_folder({name: data for name, (data, _) in REFUSED.items()} | files("a", "b.png"), tmp_path / "in")
    check(source, tmp_path / "out", {"a": ("train", None), "b.png": ("train", None)})  # `a`, without suffix, is a PNG
    lines = dict(line.split(": ", 1) for line in (tmp_path / "out/skipped.txt").read_text().splitlines())
    assert lines.keys() == REFUSED.keys()
    for name, (_, words) in REFUSED.items():
        assert has(lines[name], words), lines[name]
    assert "10 images were left out" in capsys.readouterr().out


def test_encrypted_members_of_a_zip_are_not_damaged(tmp_path):
    path = as_zip(files("a/1.png", "b/2.png"), tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(start) + flags] |= 1
    path.write_bytes(data)
    prepared(path, tmp_path / "out")
    assert (tmp_path / "out/skipped.txt").read_text().startswith("a/1.png: unsupported: is encrypted: unpack the zip")
    assert np.array_equal(loaded(tmp_path / "out")["b/2.png"][2], pixels(1))


def test_files_without_images_are_counted_by_type(tmp_path, capsys):
    others = {"a/x.nii.gz": b"x", "a/y.h5": b"x", "z.svs": b"x", "a/movie.mp4": b"x", "b/LICENSE": b"text"}
    expected = {"a/1.png": ("train", "a"), "b/2.png": ("train", "b")}
    source = as_folder(files(*expected) | others, tmp_path / "in")
    (source / "c").mkdir()
    check(source, tmp_path / "out", expected)
    out = capsys.readouterr().out
    assert "5 files ignored" in out
    assert all(kind in out for kind in (".nii.gz", ".h5", ".svs", ".mp4", "without a suffix"))
    assert has(out, "1 empty folder, such as c")


@pytest.mark.parametrize(("name", "start"), [("x.zip", "zip"), ("x.tar.gz", "tar.gz")])
def test_cut_archives_are_damaged(name, start, tmp_path):
    make = as_zip if start == "zip" else lambda images, path: as_tar(images, path, "w:gz")
    path = make(files("a/1.png", "b/2.png"), tmp_path / name)
    path.write_bytes(path.read_bytes()[:-40])
    message = refusal(path, tmp_path / "out")
    assert has(message, "fetch it again") and "end-of-stream" not in message, message


def test_a_second_run_says_what_was_complete(tmp_path, capsys):
    source = as_folder(files("a/1.png", "a/2.png", "b/3.png"), tmp_path / "in")
    prepared(source, tmp_path / "out", "--shard-size", "1")
    capsys.readouterr()
    (tmp_path / "out/train-000001.tar").unlink()
    prepared(source, tmp_path / "out", "--shard-size", "1")
    assert has(capsys.readouterr().out, "2 of 3 shards (2 images) are complete already")
    assert len(loaded(tmp_path / "out")) == 3
