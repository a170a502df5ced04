"""Time data/prepare.py on photographs beside img2dataset and a plain tar, on one and two cores.

python -m venv /tmp/img2dataset && /tmp/img2dataset/bin/pip install img2dataset
python bench/prepare.py photos/ --img2dataset /tmp/img2dataset/bin/img2dataset

All write the same images to tars of 1,000, from and to the same disk: as they are, and shrunk to a shorter side of
224 px as JPEG of quality 95. Times are of whole commands; on a busy machine, compare those of the CPU. prepare also
surveys the collection and writes checksums; img2dataset reads file:// URLs; tar only copies, which no tool can beat.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import ROOT
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import argument, option


@dataclass(frozen=True)
class Options:
    """The command line."""

    photos: Path = argument("folder of JPEGs")
    img2dataset: Path | None = option(None, "its command, in an environment of its own")
    copies: PositiveInt = option(10, "copies of each photograph; trailing zeros make them differ")
    cores: tuple[PositiveInt, ...] = option((1, 2), "numbers of cores")
    rounds: PositiveInt = option(3, "rounds")


def replicate(photos: Path, folder: Path, copies: int) -> list[Path]:
    """Copies of the photographs in one folder."""
    files = [path for path in sorted(photos.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")] * copies
    if not files:
        raise UserError(f"{photos} has no .jpg or .jpeg: give a folder of photographs")
    for number, path in enumerate(files):
        (folder / f"{number:09}.jpg").write_bytes(path.read_bytes() + bytes(number))
    return sorted(folder.iterdir())


def commands(img2dataset: Path | None, source: Path, out: Path, cores: int) -> dict[str, list[object]]:
    """Command lines by name; each writes to `out`."""
    ours = [sys.executable, ROOT / "data/prepare.py", source, out, "--no-labels", "--no-plan", "--shard-size", 1000]
    ours += ["--workers", cores]
    found = {"tar": ["tar", "cf", f"{out}.tar", source], "prepare": ours, "prepare, 224 px": [*ours, "--resize", 224]}
    if img2dataset:
        theirs = [img2dataset, "--url_list", f"{source}.csv", "--input_format", "csv", "--url_col", "url"]
        theirs += ["--output_folder", out, "--output_format", "webdataset", "--number_sample_per_shard", 1000]
        theirs += ["--processes_count", cores, "--thread_count", 16, "--encode_quality", 95]
        shrunk = ["--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True", "--image_size", 224]
        found |= {"img2dataset": [*theirs, "--resize_mode", "no"], "img2dataset, 224 px": [*theirs, *shrunk]}
    return found


def seconds(command: list[object], cores: int, out: Path) -> tuple[float, float, int]:
    """Time of a command on some cores, its CPU time with that of its own processes, and the bytes that it writes."""
    out.parent.mkdir()
    words = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *map(str, command)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    size = sum(path.stat().st_size for path in out.parent.rglob("*.tar"))
    shutil.rmtree(out.parent)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, size


def main() -> None:
    """Entry point."""
    options = parse_options(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "photos", Path(folder) / "out/out"
        source.mkdir()
        files = replicate(options.photos, source, options.copies)
        Path(f"{source}.csv").write_text("\n".join(["url", *(path.as_uri() for path in files), ""]))
        print(f"{len(files):,} images of {sum(path.stat().st_size for path in files) / len(files) / 1e3:.0f} KB\n")
        print("| cores | command | images/s | per second of CPU time | written |\n| --- | --- | --- | --- | --- |")
        for cores in options.cores:
            for _ in range(options.rounds):  # in turns, because the machine's speed changes
                for name, command in commands(options.img2dataset, source, out, cores).items():
                    elapsed, cpu, size = seconds(command, cores, out)
                    rates = f"{len(files) / elapsed:,.0f} | {len(files) / cpu:,.0f}"
                    print(f"| {cores} | {name} | {rates} | {size / 1e6:,.0f} MB |", flush=True)


if __name__ == "__main__":
    run_main(main)
