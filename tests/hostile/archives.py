"""Makers of hostile zips and tars."""

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.data.helpers import picture

JPEG, OTHER = picture(1), picture(2)
EVIL_NAMES = {
    "up": "../../../outside/evil.jpg",
    "absolute": "/outside/evil.jpg",
    "root twice": "//outside/evil.jpg",
    "Windows": "..\\..\\evil.jpg",
    "drive": "C:\\evil\\evil.jpg",
    "dot dot as class": "../evil.jpg",
    "dot as class": "./././evil.jpg",
    "escape": "a\x1b[2J\x1b]0;title\x07/evil.jpg",
    "line break": "a\nerror: evil/evil.jpg",
    "right to left": "a\u202egpj/evil.jpg",
    "formula": "=cmd|' /C calc'!A0/@evil.jpg",
    "long": "a" * 3000 + "/evil.jpg",
    "deep": "a/" * 2000 + "evil.jpg",
    "only spaces": "   /evil.jpg",
    "quotes": "a'; touch evil; '/\"$(touch evil)\".jpg",
    "markup": "<script>alert(1)</script>/[bold]evil.jpg",
    "surrogate": "caf\udce9/\udcff.jpg",
}


def good(extra: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """A small collection of two classes, and more members."""
    return {"cat/1.jpg": JPEG, "cat/2.jpg": OTHER, "dog/1.jpg": picture(3), "dog/2.jpg": picture(4), **(extra or {})}


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name.encode("utf-8", "surrogateescape").decode("cp437")), data, method)
    return path


def bomb(path: Path, method: int, megabytes: int, name: str = "cat/bomb.png") -> Path:
    """A zip of good images, and a member of zeros, written a megabyte at a time."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for one, data in good().items():
            archive.writestr(one, data)
        with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
            for _ in range(megabytes):
                member.write(bytes(1 << 20))
    return path


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def in_directory(at: int, kind: str, value: int) -> Callable[[bytearray], None]:
    """Change a field of the last entry in a zip's directory."""
    return lambda data: struct.pack_into(kind, data, data.rindex(b"PK\x01\x02") + at, value)


def in_header(at: int, kind: str, value: int) -> Callable[[bytearray], None]:
    """Change a field of the last member's own header in a zip."""
    return lambda data: struct.pack_into(kind, data, data.rindex(b"PK\x03\x04") + at, value)


def both(*changes: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    return lambda data: [change(data) for change in changes]


def declared_small(path: Path, method: int) -> Path:
    """A zip whose last member declares 100 bytes and unpacks to 400 MB."""
    path = bomb(path, method, 400)
    return patched(path, both(in_directory(24, "<I", 100)))


def doubled(path: Path) -> Path:
    """Two members of one name."""
    import warnings

    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for name, data in good().items():
                archive.writestr(name, data)
    return path


def nested(path: Path, depth: int) -> Path:
    data = zipped(path, good()).read_bytes()
    for _ in range(depth):
        zipped(path, {"inner.zip": data})
        data = path.read_bytes()
    return path


def linked(path: Path) -> Path:
    """A zip with a symbolic link."""
    with zipfile.ZipFile(zipped(path, good()), "a") as archive:
        link = zipfile.ZipInfo("cat/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


def tarred(path: Path, members: dict[str, bytes], mode: str = "w", **fields: object) -> Path:
    """A tar of files; `fields` are those of a last member without content."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if fields:
            member = tarfile.TarInfo("cat/evil.jpg")
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member)
    return path


def with_header(path: Path, **fields: object) -> Path:
    """A tar whose second header has wrong fields, with a right checksum."""
    data = bytearray(tarred(path, good()).read_bytes())
    start = data.index(b"cat/2.jpg")
    member = tarfile.TarInfo("cat/2.jpg")
    for key, value in fields.items():
        setattr(member, key, value)
    data[start : start + 512] = member.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(data)
    return path


def huge_name(path: Path, kind: bytes) -> Path:
    """A compressed tar with a header of 250 MB that holds a name or attributes."""
    import gzip

    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, 250 << 20
    with gzip.open(path, "wb", 1) as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        for _ in range(250):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    return path


def packed_zeros(path: Path, module: object, gigabytes: float) -> Path:
    with module.open(path, "wb", **({"preset": 0} if module.__name__ == "lzma" else {"compresslevel": 1})) as file:
        member = tarfile.TarInfo("cat/0.jpg")
        member.size = int(gigabytes * (1 << 30))
        file.write(member.tobuf())
        for _ in range(int(gigabytes * 64)):
            file.write(bytes(1 << 24))
        file.write(bytes(1024))
    return path
