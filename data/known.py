"""Labels of data sets as their authors distribute them: ILSVRC2012 validation, Kaggle's CLS-LOC, Tiny-ImageNet."""

import io
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

from configs.errors import UserError, printable, reason
from data.classes import IMAGE_FOLDERS
from data.listing import Listing
from data.sources import Item
from data.tables import Row

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE = "LOC_val_solution.csv"
TINY = "val_annotations.txt"
WNID = re.compile(r"n\d{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
ILSVRC_CLASSES = 1000
DEVKIT_BYTES = 1 << 26  # of a file in the devkit, which has less than 1 MB
PARENTS_SEARCHED = 4  # of a folder: ILSVRC/Data/CLS-LOC is three below Kaggle's csv


def is_val_tar(items: list[Item]) -> bool:
    """Whether all images are named like those of the ILSVRC2012 validation set."""
    return all(VAL_IMAGE.fullmatch(PurePosixPath(item.name).name) for item in items)


def known_rows(path: Path, data: bytes | None, items: list[Item]) -> list[Row] | None:
    """Rows `path`, `label` (and `boxes`) of a known file of labels; None if it is an ordinary table.

    Args:
        path: the file, or the devkit's archive or folder
        data: its content; None for the devkit
        items: the images that it labels
    Raises:
        UserError: numbers of the ground truth cannot be translated, or there are fewer lines than images
    """
    if data is None:
        truth, meta = _devkit(path)
        return _in_order(truth, _wnids(meta, path), path, items)
    if path.name == KAGGLE:
        return [_solution(line, path) for line in data.decode("utf-8-sig").splitlines()[1:] if line.strip()]
    if path.name == TINY:
        return [_tiny(line, path) for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    if path.suffix == ".txt" and is_val_tar(items):
        lines = [line.strip() for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()]
        if not any(" " in line or "\t" in line for line in lines):
            return _in_order(lines, None, path, items)
    return None


def _in_order(lines: list[str], wnids: dict[int, str] | None, path: Path, items: list[Item]) -> list[Row]:
    """A label for the number in each image's name: line 1 is of ILSVRC2012_val_00000001.JPEG."""
    if all(line.isdecimal() for line in lines):
        wnids = wnids or _wnids(_find_meta(path, items), path)
        unknown = next((line for line in lines if int(line) not in wnids), None)
        if unknown:
            raise UserError(f"{path}: {unknown} is not the number of a class in {META}: take both from one devkit")
        lines = [wnids[int(line)] for line in lines]
    rows = []
    for item in items:
        name = PurePosixPath(item.name).name
        match = VAL_IMAGE.fullmatch(name)
        if match is None:
            raise UserError(f"{path} labels ILSVRC2012_val_00000001.JPEG and so on, not {printable(name)}")
        number = int(match[1])
        if not 1 <= number <= len(lines):
            raise UserError(f"{path} has {len(lines):,} lines, but {name} is image {number:,}: take the whole file")
        rows.append({"path": item.name, "label": printable(lines[number - 1])})
    return rows


def _find_meta(path: Path, items: list[Item]) -> bytes:
    """meta.mat beside the ground truth, or in the devkit beside it or beside the images."""
    for folder in dict.fromkeys((path.parent, Path(items[0].container).parent)):
        if (folder / META).exists():
            return (folder / META).read_bytes()
        for devkit in sorted(folder.glob("ILSVRC2012_devkit*")):
            return _devkit(devkit)[1]
    problem = "has numbers in the devkit's own order, which is not the order of the WordNet IDs"
    raise UserError(f"{path} {problem}: put {DEVKIT} or its {META} beside it, or give {DEVKIT} as the labels")


def _devkit(path: Path) -> tuple[list[str], bytes]:
    """Lines of the ground truth, and content of meta.mat, of the devkit: its archive or folder."""
    files = {}
    try:
        if path.is_dir():
            for file in (file for name in (GROUND_TRUTH, META) for file in path.rglob(name)):
                with file.open("rb") as part:
                    files[file.name] = part.read(DEVKIT_BYTES)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith((GROUND_TRUTH, META))]
                for name in names:
                    with archive.open(name) as part:
                        files[PurePosixPath(name).name] = part.read(DEVKIT_BYTES)
        else:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isreg() and (name := PurePosixPath(member.name).name) in (GROUND_TRUTH, META):
                        files[name] = tar.extractfile(member).read(DEVKIT_BYTES)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable devkit of ILSVRC2012 ({reason(error)}): fetch {DEVKIT}") from None
    for name in (GROUND_TRUTH, META):
        if name not in files:
            raise UserError(f"{path} has no {name}: give a file of labels, or {DEVKIT} of ILSVRC2012")
    return files[GROUND_TRUTH].decode().split(), files[META]


def _wnids(meta: bytes, path: Path) -> dict[int, str]:
    """WordNet ID of each number of the devkit, from its meta.mat."""
    from scipy.io import loadmat  # slow to import

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        numbers, wnids = synsets["ILSVRC2012_ID"], synsets["WNID"]
        found = {int(number): str(wnid) for number, wnid in zip(numbers.ravel(), wnids.ravel(), strict=True)}
    except Exception as error:  # loadmat raises almost any exception for a damaged file
        raise UserError(f"{path}: {META} cannot be read ({reason(error)}): fetch {DEVKIT} again") from None
    return {number: wnid for number, wnid in found.items() if number <= ILSVRC_CLASSES}  # above: inner nodes


def _solution(line: str, path: Path) -> Row:
    """A line of Kaggle's csv: `ILSVRC2012_val_00000001,n01751748 111 108 230 144`, with more boxes after it."""
    name, _, prediction = line.partition(",")
    words = prediction.split()
    if not words or len(words) % 5 or not WNID.fullmatch(words[0]):
        raise UserError(f"{path}: the line {printable(line[:80])} is not `ImageId,WNID x0 y0 x1 y1`: fetch it again")
    boxes = [[int(word) for word in words[i + 1 : i + 5]] for i in range(0, len(words), 5)]
    return {"path": name, "label": words[0], "boxes": boxes}


def _tiny(line: str, path: Path) -> Row:
    """A line of Tiny-ImageNet: name, WordNet ID and box, between tabs."""
    cells = line.split("\t")
    if len(cells) < 2:
        raise UserError(f"{path}: the line {printable(line[:80])} is not `NAME<tab>WNID<tab>box`: fetch it again")
    return {"path": cells[0], "label": cells[1].strip()}


def find_val_labels(listing: Listing) -> Item | None:
    """The known file of validation labels in a source, or in a folder above it; it is then used up."""
    for name in listing.label_files:
        if PurePosixPath(name).name in (KAGGLE, TINY, GROUND_TRUTH):
            return listing.label_files.pop(name)
    folder = Path(listing.source).absolute()
    for parent in [*folder.parents][:PARENTS_SEARCHED] if folder.is_dir() else ():
        if (parent / KAGGLE).is_file():
            return Item(KAGGLE, str(parent / KAGGLE))
    return None


def without_image_class(items: list[Item]) -> list[Item]:
    """The images without a class that is only the folder of a split's images, such as `test/images/`."""
    return [replace(item, label=None) if (item.label or "").lower() in IMAGE_FOLDERS else item for item in items]
