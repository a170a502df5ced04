"""What a source contains: every file is an image, a file that may hold labels, or counted."""

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from configs.errors import counted, few
from configs.log import say
from data.reading import HEAD_BYTES, sniff
from data.sources import Item
from data.tars import READABLE

TABLES = ("csv", "tsv", "jsonl", "ndjson", "parquet")  # files that may hold labels of many images
SIDECARS = ("cls", "json")  # of one image: WebDataset's
LABEL_FILES = (*TABLES, *SIDECARS, "txt", "mat", "xml", "yaml", "yml")
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
HIDDEN = {
    "__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "#recycle", "lost+found",
    "system volume information", "__pycache__",
}  # fmt: skip
PROGRESS = 250_000  # files between two lines while listing


@dataclass
class Listing:
    """The files of a source."""

    source: str  # as the user named it
    folder: str = ""  # put before the names: of an archive in the source
    images: list[Item] = field(default_factory=list)
    label_files: dict[str, Item] = field(default_factory=dict)  # by name
    archives: list[Item] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)  # files of other types, by suffix
    hidden: set[str] = field(default_factory=set)
    repeats: list[tuple[str, str]] = field(default_factory=list)  # name of a link, name of the same file
    empty: list[str] = field(default_factory=list)  # folders without a file
    broken: list[str] = field(default_factory=list)  # links without a file
    damaged: list[str] = field(default_factory=list)  # archives in the source, each with the reason
    shards: set[str] = field(default_factory=set)  # archives that are numbered parts, not classes
    sidecars: bool = False  # labels are from files beside the images
    rows: list[dict] | None = None  # of the table that is the source
    files: int = 0  # that were added, of any type
    hidden_folders: dict[str, str | None] = field(default_factory=dict)  # folder: its first hidden part, if any

    def add(self, item: Item) -> bool:
        """Sort a file by its name. Returns whether it is an image."""
        self.files += 1
        if self.files % PROGRESS == 0:
            say(f"  listed {self.files:,} files")
        if hidden := self._hidden_part(item.name):
            self.hidden.add(hidden)
            return False
        kind = suffix(item.name)
        if kind in READABLE or ((not kind or kind.isdigit()) and sniff(item.head(HEAD_BYTES))):  # DICOM: 1.2.840.1
            self.images.append(item)
            return True
        if kind in LABEL_FILES:
            self.label_files[item.name] = item
        elif item.name.lower().endswith(ARCHIVES):
            self.archives.append(item)
        else:
            kind = f"{suffix(item.name[:-3])}.gz".strip(".") if kind == "gz" else kind  # .nii.gz
            self.ignored[f".{kind}" if kind else "without a suffix"] += 1
        return False

    def add_member(self, name: str, path: str, offset: int, size: int, crc: int | None = None) -> bool:
        """Sort a member of a tar or, with its checksum, of a zip; as `add`."""
        name, stamp = name.removeprefix("./"), f"{offset} {size}" if crc is None else f"{crc}"
        name = f"{self.folder}/{name}" if self.folder else name
        return self.add(Item(name, path, stamp, offset, size, zipped=crc is not None))

    def _hidden_part(self, name: str) -> str | None:
        """The path of the first hidden folder above a file, or of the file; None if there is none."""
        folder, _, base = name.rpartition("/")
        if folder not in self.hidden_folders:
            parts = folder.split("/")
            paths = ("/".join(parts[: i + 1]) for i, part in enumerate(parts) if is_hidden(part))
            self.hidden_folders[folder] = next(paths, None)
        return self.hidden_folders[folder] or (name if is_hidden(base) else None)

    def notes(self) -> Iterator[str]:
        """What is left out, a line each."""
        counts = self.ignored + Counter(f".{suffix(name)}" for name in self.label_files)
        if counts:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
            yield f"{counted(sum(counts.values()), 'file')} ignored: {kinds}"
        if self.hidden:
            number = counted(len(self.hidden), "hidden file or folder", "hidden files or folders")
            yield f"{number} skipped: {few(sorted(set(map(posixpath.basename, self.hidden))), 5)}"
        if self.repeats:
            link, same = self.repeats[0]
            yield f"{counted(len(self.repeats), 'link')} to files of the source, counted once, such as {link} = {same}"
        if self.empty:
            yield f"{counted(len(self.empty), 'empty folder')}, such as {self.empty[0]}"
        if self.broken:
            yield f"{counted(len(self.broken), 'link')} without a file skipped, such as {self.broken[0]}"
        if self.damaged:
            yield f"{counted(len(self.damaged), 'damaged archive')} left out: {'; '.join(self.damaged)}"
        doubles = [name for name, count in Counter(item.name for item in self.images).items() if count > 1]
        if doubles:
            yield f"{counted(len(doubles), 'name')} of several images, such as {doubles[0]}: all are used"
        if self.shards:
            first = min(self.shards)
            yield f"{counted(len(self.shards), 'archive')} such as {first} taken as numbered parts, not as classes"


def suffix(name: str) -> str:
    """Type of a file from its name, in lower case, without the dot; empty without one."""
    return posixpath.splitext(name)[1][1:].lower()


def is_hidden(part: str) -> bool:
    """Whether a file or folder belongs to a system or tool, by its name."""
    return (part.startswith(".") and part not in (".", "..")) or part.lower() in HIDDEN
