"""Frames of a DICOM file: modality values, the window that the file shows them in, colours as RGB."""

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_rescale, apply_voi, get_decoder, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from data.reading import (
    FIRST_PAGE,
    NO_IMAGE,
    PAGES,
    TOO_LARGE,
    UNSUPPORTED,
    ImageError,
    Notes,
    Page,
    Reading,
    check_size,
    damage_as_error,
    raise_limit,
)
from data.regions import View, whole

# what decodes compressed pixels; RLE, baseline JPEG and JPEG 2000 need nothing else
CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom converts the last four to RGB
GREY = ("MONOCHROME1", "MONOCHROME2")


def read_dicom(data: bytes, reading: Reading, notes: Notes) -> Iterator[Page]:
    """Frames of a DICOM file, of which `reading.pages` decides.

    Grey values are those after the modality transform; their range is the window of the file, if it has one and
    `reading.value_range` is not given. 8-bit values without a window keep their range.

    Raises `ImageError`: damaged, no or unsupported pixels, too large, or of several frames without `reading.pages`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that do not conform to the standard
        try:
            image = pydicom.dcmread(io.BytesIO(data), force=True)
            frames = _checked_frames(image, reading)
            several = frames > 1 and reading.pages == "all"
            notes[FIRST_PAGE] += frames > 1 and not several
            for frame in range(frames if several else 1):
                page = _read_frame(image, frame, reading, notes)
                yield replace(page, number=frame + 1) if several else page
        except ImageError:
            raise
        except MemoryError:
            raise ImageError("needs more memory than there is", TOO_LARGE) from None
        except Exception:  # damaged files raise almost any exception in pydicom
            raise ImageError("not a readable image (a damaged DICOM file)") from None


def dicom_views(file: BinaryIO, reading: Reading, notes: Notes) -> Iterator[View]:
    """Frames as `read_dicom`, decoded one after the other when they are opened."""
    with damage_as_error("a damaged DICOM file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = pydicom.dcmread(file, force=True, defer_size="1 KB")  # without the pixels
        frames = _checked_frames(image, reading)
        size = int(image.Rows), int(image.Columns)
    several, pages = frames > 1 and reading.pages == "all", None

    def open_frame(number: int) -> tuple[int, Callable[[int, int, int, int], Page]]:
        nonlocal pages
        if pages is None:
            file.seek(0)
            pages = read_dicom(file.read(), reading, notes)
        for page in pages:
            if page.number == number:
                return whole(page)
        raise ImageError("not a readable image (a damaged DICOM file)")  # as the frames before

    for number in range(1, frames + 1) if several else (0,):
        yield View(size, partial(open_frame, number), number)


def _checked_frames(image: pydicom.Dataset, reading: Reading) -> int:
    """Number of frames. Raises `ImageError` unless they can be decoded and `reading.pages` says which ones to take."""
    if "SOPClassUID" not in image and "PixelData" not in image:  # with `force`, anything is read as a data set
        raise ImageError("not an image of a known type", NO_IMAGE)
    if "PixelData" not in image:
        raise ImageError(f"a DICOM file without pixels ({image.SOPClassUID.name})", UNSUPPORTED)
    if "TransferSyntaxUID" not in image.file_meta:  # a bare data set, as before part 10 of the standard
        implicit, _ = image.original_encoding
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    syntax, colours = image.file_meta.TransferSyntaxUID, image.PhotometricInterpretation
    if syntax.is_encapsulated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            raise ImageError(f"DICOM compression {syntax.name} is not supported: decompress it", UNSUPPORTED) from None
        if not available:
            raise ImageError(f"DICOM compression {syntax.name} needs a codec: {CODECS}", UNSUPPORTED)
    if colours not in (*COLOURS, *GREY, "PALETTE COLOR"):
        raise ImageError(f"a DICOM file with {colours} colours is not supported: convert it", UNSUPPORTED)
    pixel_bytes = image.SamplesPerPixel * (4 if colours in GREY and image.BitsAllocated > 8 else 1)
    advice = f": add --max-pixels {raise_limit(image.Rows, image.Columns, pixel_bytes)}"
    check_size(image.Rows, image.Columns, pixel_bytes, reading.max_pixels, advice)
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1 and reading.pages is None:
        raise ImageError(f"has {frames:,} frames: add --pages first or --pages all", PAGES)
    return frames


def _read_frame(image: pydicom.Dataset, frame: int, reading: Reading, notes: Notes) -> Page:
    colours, frames = image.PhotometricInterpretation, int(image.get("NumberOfFrames") or 1)
    pixels = pixel_array(image, index=frame if frames > 1 else None)
    if colours == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, image)
        eight_bit = pixels.dtype == np.uint16 and pixels.max() > 255 and not (pixels & 255).any()
        return Page((pixels >> 8).astype(np.uint8) if eight_bit else pixels)
    if colours not in GREY:
        return Page(pixels)
    padding = image.get("PixelPaddingValue")
    outside = None if padding is None else pixels == padding
    tags = _frame_tags(image, frame)
    values = apply_rescale(pixels, tags)
    values = pixels if np.array_equal(values, pixels) else values
    if values.dtype.kind == "f" and (values == np.rint(values)).all() and np.abs(values).max() < 1 << 31:
        values = values.astype(np.int32)  # whole values, as Hounsfield units are
    values, limits = _windowed(values, tags, reading, notes)
    if limits is None and values.dtype == np.uint16:
        values = values.astype(np.int32)  # its range is not that of the type
    if outside is not None and outside.any():
        values = np.where(outside, values[~outside].min() if not outside.all() else 0, values).astype(values.dtype)
        notes["{:,} DICOM images have padding: it became their lowest value"] += 1
    return Page(values[..., None], limits, inverted=colours == "MONOCHROME1")


def _frame_tags(image: pydicom.Dataset, frame: int) -> pydicom.Dataset:
    """Tags of rescale and window, which enhanced files have in groups for all frames or for each."""
    tags = pydicom.Dataset()
    tags.update({element.tag: element for element in image if element.keyword.startswith(("Rescale", "Window"))})
    for keyword in ("ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "PixelRepresentation", "BitsStored"):
        if keyword in image:
            setattr(tags, keyword, image[keyword].value)
    groups = list(image.get("SharedFunctionalGroupsSequence", []))
    groups += list(image.get("PerFrameFunctionalGroupsSequence", []))[frame : frame + 1]
    for group in groups:
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(sequence, []):
                tags.update(item)
    return tags


def _windowed(
    values: np.ndarray, tags: pydicom.Dataset, reading: Reading, notes: Notes
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Grey values and those that are black and white by the file's window; None without one."""
    centres, widths = tags.get("WindowCenter"), tags.get("WindowWidth")
    table = "VOILUTSequence" in tags
    if reading.value_range is not None or (centres is None and not table):
        if reading.value_range and (centres is not None or table):
            notes["{:,} DICOM images have a window that --value-range replaces"] += 1
        return values, None
    if table:
        notes["{:,} DICOM images were mapped by their VOI table"] += 1
        bits = tags.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(values, tags), (0, (1 << bits) - 1)
    several = isinstance(centres, pydicom.multival.MultiValue)
    centre, width = (float(x[0] if several else x) for x in (centres, widths))
    which = "the first of their windows" if several and len(centres) > 1 else "their window"
    notes[f"{{:,}} DICOM images were mapped by {which}"] += 1
    function = tags.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return (1 / (1 + np.exp(-4 * (values - centre) / width))).astype(np.float32), (0, 1)
    if function == "LINEAR":  # DICOM PS3.3 C.11.2.1.2.1
        centre, width = centre - 0.5, max(width - 1, 1)
    low, high = centre - width / 2, centre + width / 2
    whole = values.dtype == np.uint8 and low <= 0.5 and high >= 254.5 and high - low < 257
    return values, None if whole else (low, high)
