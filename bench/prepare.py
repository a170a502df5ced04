"""Time data/prepare.py on photographs beside img2dataset and a plain tar, on one and two cores.

python -m venv /tmp/img2dataset && /tmp/img2dataset/bin/pip install img2dataset
python bench/prepare.py photos/ --img2dataset /tmp/img2dataset/bin/img2dataset

All write the same images to tars of 1,000, from and to the same disk: as they are, and shrunk to a shorter side of
224 px as JPEG of quality 95. Times are of whole commands, start-up included; on a busy machine, compare images per
second of CPU time. prepare also surveys the collection,
decodes every image, and writes checksums; img2dataset reads file:// URLs; tar only copies, which no tool can beat.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import ROOT
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import argument, option

SIDE, SHARD = 224, 1000


@dataclass(frozen=True)
class PrepareBench:
    """The command line."""

    photos: Path = argument("folder of JPEGs")
    img2dataset: Path | None = option(None, "its command, in an environment of its own")
    copies: PositiveInt = option(10, "copies of each photograph; trailing zeros make them differ")
    cores: tuple[PositiveInt, ...] = option((1, 2), "numbers of cores")
    rounds: PositiveInt = option(3, "rounds")


def replicate(photos: Path, folder: Path, copies: int) -> list[Path]:
    """Copies of the photographs in one folder."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{photos} has no .jpg or .jpeg: give a folder of photographs")
    made = [folder / f"{copy:03}-{number:06}.jpg" for copy in range(copies) for number in range(len(files))]
    for number, path in enumerate(made):
        path.write_bytes(files[number % len(files)].read_bytes() + bytes(number))
    return made


def commands(options: PrepareBench, source: Path, out: Path, cores: int) -> dict[str, list[object]]:
    """Command lines by name; each writes to `out`."""
    ours = [sys.executable, ROOT / "data/prepare.py", source, out, "--no-labels", "--shard-size", SHARD]
    ours += ["--workers", cores]
    found = {"tar": ["tar", "cf", f"{out}.tar", source], "prepare": ours, "prepare, 224 px": [*ours, "--resize", SIDE]}
    if options.img2dataset:
        theirs = [options.img2dataset, "--url_list", f"{source}.csv", "--input_format", "csv", "--url_col", "url"]
        theirs += ["--output_folder", out, "--output_format", "webdataset", "--number_sample_per_shard", SHARD]
        theirs += ["--processes_count", cores, "--thread_count", 16, "--encode_quality", 95]
        found["img2dataset"] = [*theirs, "--resize_mode", "no"]
        shrunk = ["--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True", "--image_size", SIDE]
        found["img2dataset, 224 px"] = [*theirs, *shrunk]
    return found


def cpu_seconds() -> float:
    """CPU time of all commands so far, with their own processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(command: list[object], cores: int, out: Path) -> tuple[float, float, int]:
    """Time of a command on some cores, its CPU time, and the bytes that it has written."""
    pin = partial(os.sched_setaffinity, 0, sorted(os.sched_getaffinity(0))[:cores])
    start, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(list(map(str, command)), preexec_fn=pin, capture_output=True, text=True)
    elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    size = sum(path.stat().st_size for path in out.parent.rglob("*.tar"))
    shutil.rmtree(out, ignore_errors=True)
    Path(f"{out}.tar").unlink(missing_ok=True)
    return elapsed, cpu, size


def main() -> None:
    """Entry point."""
    options = parse_options(PrepareBench, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "photos", Path(folder) / "out/out"
        source.mkdir()
        out.parent.mkdir()
        files = replicate(options.photos, source, options.copies)
        Path(f"{source}.csv").write_text("\n".join(["url", *(path.as_uri() for path in files), ""]))
        print(f"{len(files):,} images of {sum(path.stat().st_size for path in files) / len(files) / 1e3:.0f} KB")
        print("| cores | command | images/s | images per second of CPU time | written |")
        for cores in options.cores:
            runs = commands(options, source, out, cores)
            for _ in range(options.rounds):  # in turns, because the machine's speed changes
                for name, command in runs.items():
                    elapsed, cpu, size = seconds(command, cores, out)
                    rates = f"{len(files) / elapsed:,.0f} | {len(files) / cpu:,.0f}"
                    print(f"| {cores} | {name} | {rates} | {size / 1e6:,.0f} MB |", flush=True)


if __name__ == "__main__":
    run_main(main)
