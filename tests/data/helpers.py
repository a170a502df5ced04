"""Synthetic image collections of every kind of source."""

import io
import multiprocessing
import os
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable
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


def open_files(folder: Path) -> int:
    """Number of files below a folder that this process has open."""
    descriptors = list(Path("/proc/self/fd").iterdir())
    return sum(str(path.readlink()).startswith(f"{folder}/") for path in descriptors if path.is_symlink())


def killed(folder: Path, event: int, work: Callable[[Path], None]) -> bool:
    """Call `work(folder)` in a forked process that is killed, with its children, before their n-th change of a file.

    Returns:
        whether it was killed; False if there were fewer changes
    """
    changes = multiprocessing.Value("i")

    def hook(name, args):
        written = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or name in ("os.rename", "os.remove")) and str(args[0]).startswith(str(folder)):
            with changes.get_lock():
                changes.value += 1
                if changes.value == event:
                    os.killpg(0, signal.SIGKILL)

    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            sys.addaudithook(hook)
            work(folder)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0
