"""Image collections of every kind, made on the spot."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB", kind: str = "jpeg") -> bytes:
    """Bytes of a random picture."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(out, kind)
    return out.getvalue()


def collection(classes: dict[str, int]) -> dict[str, bytes]:
    """Name -> bytes of `classes` (folder -> number of images)."""
    names = [f"{folder}/{i}.jpg".removeprefix("/") for folder, number in classes.items() for i in range(number)]
    return {name: picture(i) for i, name in enumerate(names)}


def as_folder(images: dict[str, bytes], path: Path) -> Path:
    for name, data in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_zip(images: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    return path


def as_tar(images: dict[str, bytes], path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def as_ilsvrc(images: dict[str, bytes], path: Path) -> Path:
    """A tar of tars: one a class, named after it."""
    inner: dict[str, dict[str, bytes]] = {}
    for name, data in images.items():
        label, file = name.split("/")
        inner.setdefault(label, {})[f"{label}_{file}"] = data
    tars = {}
    for label, members in inner.items():
        tars[f"{label}.tar"] = as_tar(members, path.with_suffix(".inner")).read_bytes()
    return as_tar(tars, path)
