"""DICOM: modality values, windows, colours, frames, compression, and files that hide what they are."""

import io
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, generate_uid

from configs.errors import UserError
from data.decode import decode
from data.reading import NO_IMAGE, PAGES, UNSUPPORTED, ImageError, Notes, Reading
from data.reencode import reencode, reencode_all
from tests.data.helpers import as_folder, as_tar, as_zip, picture
from tests.data.test_prepare import content, prepared

RNG = np.random.default_rng(0)
SCAN = RNG.integers(0, 4096, (20, 16)).astype(np.uint16)
WINDOW = {"WindowCenter": 40, "WindowWidth": 400}


def dicom(pixels: np.ndarray, colours: str = "MONOCHROME2", frames: int = 1, compress: bool = False, **tags) -> bytes:
    """A file with pixels [H, W], [H, W, 3] or, for several frames, with one axis more."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = CTImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = generate_uid()
    shape = pixels.shape[1:] if frames > 1 else pixels.shape
    image.Rows, image.Columns = shape[:2]
    image.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    if image.SamplesPerPixel > 1:
        image.PlanarConfiguration = 0
    image.PhotometricInterpretation = colours
    image.BitsAllocated = image.BitsStored = 8 * pixels.dtype.itemsize
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames > 1:
        image.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(image, name, value)
    image.PixelData = pixels.tobytes()
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compress:
            image.compress(RLELossless)
        image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def unit(data: bytes, **reading) -> np.ndarray:
    """The picture [H, W, C] as the model gets it, from 0 to 1."""
    found = decode(reencode(data, "a.dcm", reading=Reading(**reading))[1]).permute(1, 2, 0).numpy()
    return found / 255 if found.dtype == np.uint8 else found


@pytest.mark.parametrize("compress", [False, True])
def test_hounsfield_units_in_the_window_of_the_file(compress):
    notes, scan = Notes(), dicom(SCAN, RescaleSlope=1, RescaleIntercept=-1024, compress=compress, **WINDOW)
    kind, data = reencode(scan, "a.dcm", notes=notes)
    low, high = 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2  # PS3.3 C.11.2.1.2.1
    expected = ((SCAN.astype(float) - 1024 - low) / (high - low)).clip(0, 1)
    assert kind == "npy" and np.load(io.BytesIO(data)).dtype == np.uint16
    assert np.allclose(decode(data, 1)[0].numpy(), expected, atol=1e-5)
    assert any("window" in note for note in notes) and any("clipped" in note for note in notes)


def test_without_a_window_the_range_is_asked_for(tmp_path):
    data = dicom(SCAN, RescaleSlope=1, RescaleIntercept=-1024)
    low, high = int(SCAN.min()) - 1024, int(SCAN.max()) - 1024
    with pytest.raises(
        UserError, match=rf"a\.dcm has int32 values from {low} to {high}: add --value-range {low} {high}"
    ):
        prepared(as_folder({"a.dcm": data}, tmp_path / "in"), tmp_path / "out")
    expected = (SCAN.astype(float) - 1024 + 1000) / 2000
    assert np.allclose(unit(data, value_range=(-1000, 1000))[..., 0], expected.clip(0, 1), atol=1e-5)


def test_the_range_of_the_user_replaces_the_window():
    notes, data = Notes(), dicom(SCAN, **WINDOW)
    reading = Reading(value_range=(0, 4095))
    found = decode(reencode(data, "a.dcm", reading=reading, notes=notes)[1])[0].numpy()
    assert np.allclose(found, SCAN / 4095, atol=1e-5)
    assert any("--value-range replaces" in note for note in notes)


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions(function):
    found = unit(dicom(SCAN, VOILUTFunction=function, WindowCenter=2000, WindowWidth=1000))[..., 0]
    x = (SCAN.astype(float) - 2000) / 1000
    expected = (x + 0.5).clip(0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * x))
    assert np.allclose(found, expected, atol=1e-4)


def test_monochrome1_is_inverted():
    plain, inverted = (unit(dicom(SCAN, colours, WindowCenter=2048, WindowWidth=4096)) for colours in
                       ("MONOCHROME2", "MONOCHROME1"))  # fmt: skip
    assert np.allclose(plain + inverted, 1, atol=1e-4) and plain.std() > 0.2
    grey = (SCAN >> 4).astype(np.uint8)
    assert np.array_equal(np.rint(unit(dicom(grey, "MONOCHROME1"))[..., 0] * 255), 255 - grey)


def test_padding_becomes_the_lowest_value():
    scan = SCAN.astype(np.int16) + 10
    scan[0, 0] = -2000
    found = unit(dicom(scan, PixelPaddingValue=-2000), value_range=(0, 5000))[..., 0]
    assert np.isclose(found[0, 0], (SCAN.ravel()[1:].min() + 10) / 5000, atol=1e-4)


def test_colours():
    rgb = RNG.integers(0, 256, (20, 16, 3)).astype(np.uint8)
    kind, data = reencode(dicom(rgb, "RGB"), "a.dcm")
    assert kind == "png" and np.array_equal(decode(data).permute(1, 2, 0).numpy(), rgb)
    ybr = np.broadcast_to(np.uint8([150, 128, 128]), rgb.shape).copy()
    assert np.array_equal(np.rint(unit(dicom(ybr, "YBR_FULL")) * 255), np.full(rgb.shape, 150))


def test_a_palette():
    indices = RNG.integers(0, 256, (20, 16)).astype(np.uint8)
    tables = RNG.integers(0, 256, (3, 256)).astype(np.uint16) << 8
    tags = {}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    kind, data = reencode(dicom(indices, "PALETTE COLOR", **tags), "a.dcm")
    assert kind == "png" and np.array_equal(
        decode(data).permute(1, 2, 0).numpy(), np.moveaxis(tables >> 8, 0, -1)[indices]
    )


def test_frames():
    frames = RNG.integers(0, 256, (3, 20, 16)).astype(np.uint8)
    data = dicom(frames, frames=3)
    with pytest.raises(ImageError, match="has 3 frames: add --pages first or --pages all") as error:
        reencode(data, "a.dcm")
    assert error.value.kind == PAGES
    found = list(reencode_all(data, "a.dcm", None, None, Reading(pages="all"), Notes()))
    assert [name for name, _ in found] == ["a.dcm#1", "a.dcm#2", "a.dcm#3"]
    for (_, (_, encoded)), frame in zip(found, frames, strict=True):
        assert np.array_equal(decode(encoded)[0].numpy(), frame)
    assert np.array_equal(decode(reencode(data, "a.dcm", reading=Reading(pages="first"))[1])[0].numpy(), frames[0])


def test_a_missing_codec_is_named():
    image = pydicom.dcmread(io.BytesIO(dicom(SCAN)))
    image.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    image.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
    out = io.BytesIO()
    image.save_as(out)
    with pytest.raises(ImageError) as error:
        reencode(out.getvalue(), "a.dcm")
    available = pydicom.pixels.get_decoder(JPEGLosslessSV1).is_available
    assert ("damaged" if available else "pylibjpeg") in str(error.value)
    assert available or error.value.kind == UNSUPPORTED


@pytest.mark.parametrize("maker", [as_folder, as_tar, as_zip])
def test_content_decides_not_the_suffix(maker, tmp_path):
    grey = (SCAN >> 4).astype(np.uint8)
    files = {"IM0001": grey, "1.2.840.77": grey + 1, "scan.jpg": grey + 2}
    images = {name: dicom(pixels) for name, pixels in files.items()}
    source = maker(images | {"README": b"text", "notes.dcm": b"not DICOM", "b.png": picture(0)}, tmp_path / "x")
    prepared(source, tmp_path / "out")
    found = {decode(data)[0, 0, 0].item() for data in content(tmp_path / "out") if not data.startswith(b"\xff")}
    assert found == {pixels[0, 0] for pixels in files.values()}
    assert (tmp_path / "out/skipped.txt").read_text().startswith(f"notes.dcm: {NO_IMAGE}: ")


def test_files_without_pixels_and_damage():
    image = pydicom.dcmread(io.BytesIO(dicom(SCAN)))
    del image.PixelData
    out = io.BytesIO()
    image.save_as(out)
    for data, kind, pattern in (
        (out.getvalue(), UNSUPPORTED, "without pixels"),
        (dicom(SCAN)[:-100], "damaged", "damaged DICOM"),
        (bytes(128) + b"DICM" + bytes(30), NO_IMAGE, "not an image"),
    ):
        with pytest.raises(ImageError, match=pattern) as error:
            reencode(data, "a.dcm", reading=Reading(value_range=(0, 4095)))
        assert error.value.kind == kind and "pydicom" not in str(error.value)
