"""Measure what a large run costs beside training itself: index, order of an epoch, reading, checkpoints.

python bench/scale.py                                everything docs/scale.md measures; minutes, and 6 GB in --folder
python bench/scale.py --parts index sampler          some parts

`index` has sparse files of full length, `sampler` numbers instead of images; `reading` reads real shards of random
bytes (checksums are verified), `checkpoints` saves real engines (hashes are verified). Times are those of the fastest
round; for checkpoints, of the fastest and the slowest.
"""

import json
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import Options, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import option

PARTS = ("index", "sampler", "reading", "checkpoints")
PER_SHARD, BATCH, EPOCHS, EPOCH = 10_000, 4096, 800, 700  # EPOCH: where the sampler resumes
DATASETS = {"ImageNet-1K": 128, "ImageNet-22K": 1_420, "a billion": 100_000}  # shards of PER_SHARD images
IMAGE_BYTES, TAR_BYTES = 110_000, 1 << 30
MODELS = tuple(f"convnextv2_{size}" for size in ("atto", "tiny", "base", "large"))


@dataclass(frozen=True)
class ScaleOptions(Options):
    """The command line."""

    parts: tuple[Literal[PARTS], ...] = option(PARTS, "what to measure")
    shards: PositiveInt = option(100_000, "shards in the index")
    images: PositiveInt = option(128, "images read per shard")
    models: tuple[str, ...] = option(MODELS, "models to save")
    folder: Path | None = option(None, "folder for temporary files (default: the system's)")
    rounds: PositiveInt = option(3, "timed rounds")


parse = partial(parse_options, ScaleOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import numpy as np
import torch

from bench.timing import fastest, machine, prepare
from configs.files import sha256
from configs.schema import FCMAESettings, Optim, PretrainModel, Run
from data.sampler import WINDOW, EpochOrder, TrainBatches
from data.shard_index import Index, Shard, index_file, read_index, write_index
from data.shards import Split, index_tar
from data.tars import ROW
from data.writing import write_tar
from launch.training.checkpoints import Checkpoints
from launch.training.engine import Engine
from launch.training.parameter_groups import parameter_groups
from launch.training.world import destroy_world, init_world
from models.fcmae import FCMAE


def peak_mb(run: Callable[[], object]) -> float:
    """Peak memory of Python objects and arrays in a run, MB."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def index(options: ScaleOptions, folder: Path) -> dict:
    """index.json of simulated shards: its size, writing, reading, opening the split, opening one shard."""
    rows = index_file(folder / "train-000000.tar")
    np.save(rows, np.zeros(PER_SHARD, ROW), allow_pickle=False)
    size, digest = rows.stat().st_size, sha256(rows)
    shards = [Shard(f"train-{i:06}.tar", PER_SHARD, TAR_BYTES, f"{i:064x}", digest) for i in range(options.shards)]
    for tar in (folder / shard.file for shard in shards):
        for path, length in ((tar, TAR_BYTES), (index_file(tar), size)):
            path.touch()
            os.truncate(path, length)  # a sparse file
    write = fastest(lambda: write_index(folder, Index({"train": shards}, None)), options.rounds)
    split, read = Split(folder, "train"), fastest(lambda: read_index(folder), options.rounds)
    opened = fastest(lambda: Split(folder, "train"), options.rounds)
    shard = fastest(lambda: split.fetch_shard(0), 10 * options.rounds)  # verifies the index
    sizes = {"json_bytes": (folder / "index.json").stat().st_size, "rows_bytes": size}
    times = {"write_s": write, "read_s": read, "open_s": opened, "shard_ms": 1e3 * shard}
    return {"shards": options.shards} | sizes | times | {"peak_mb": peak_mb(lambda: Split(folder, "train"))}


def sampler(options: ScaleOptions, folder: Path) -> dict:
    """For each dataset: the first global batch, later ones, resuming deep into training, memory."""
    return {name: sampling(shards, options.rounds) for name, shards in DATASETS.items()}


def sampling(shards: int, rounds: int) -> dict:
    """Times and memory of `TrainBatches`. Raises `UserError` if a window is not a permutation of its shards' images."""
    counts, samples, window = np.full(shards, PER_SHARD, np.int64), shards * PER_SHARD, min(WINDOW, shards) * PER_SHARD
    order = EpochOrder(counts, seed=0)
    ids = np.unique(order.ids(EPOCH, 0, window))
    if len(ids) < window or {*(ids // PER_SHARD).tolist()} != {*order.shards(EPOCH, 0)}:
        raise UserError("a window is not a permutation of its shards' images: not timed")

    def batches(step: int = 0) -> Iterator:
        return iter(TrainBatches(EpochOrder(counts, seed=0), BATCH, BATCH, 0, 1, EPOCHS).iterate(step))

    middle, steps, running = int((EPOCH + 0.5) * (samples // BATCH)), window // BATCH, batches()
    first = fastest(lambda: next(batches()), rounds)
    next(running)
    batch = fastest(lambda: [next(running) for _ in range(steps)], rounds) / steps
    resume = fastest(lambda: next(batches(middle)), rounds)
    times = {"first_s": first, "batch_ms": 1e3 * batch, "resume_s": resume}
    return {"shards": shards, "samples": samples} | times | {"peak_mb": peak_mb(lambda: next(batches(middle)))}


def reading(options: ScaleOptions, folder: Path) -> dict:
    """`Split.read` in the order of an epoch: real files in the page cache, one process, no decoding."""
    rng, tars = np.random.default_rng(0), [folder / f"train-{i:06}.tar" for i in range(WINDOW)]
    for tar in tars:
        write_tar(tar, ({"__key__": f"{i:06}", "jpg": rng.bytes(IMAGE_BYTES)} for i in range(options.images)))
    write_index(folder, Index({"train": [index_tar(tar) for tar in tars]}, None))
    split = Split(folder, "train")
    ids = EpochOrder(split.counts, seed=0).ids(0, 0, len(split)).tolist()
    rate = len(ids) / fastest(lambda: [split.read(sample) for sample in ids], 3 * options.rounds)
    return {"images": len(ids), "image_bytes": IMAGE_BYTES, "images_per_s": rate, "mb_per_s": rate * IMAGE_BYTES / 1e6}


def checkpoints(options: ScaleOptions, folder: Path) -> dict:
    """Checkpoints of one rank with ZeRO 1: size, how long training waits, until committed, resuming."""
    world, optim, result = init_world(Run(device=options.device)), Optim(batch_size=1, zero_stage=1), {}
    image, visible = torch.rand(1, 3, 64, 64), torch.tensor([[[True, False], [False, False]]])
    for name in options.models:
        model = FCMAE(PretrainModel(name), FCMAESettings())
        engine = Engine(model, parameter_groups(model, optim), optim, world)
        engine.step(engine(image.to(world.device), visible.to(world.device)))
        saver = Checkpoints(folder / name, engine, {"optim": {"zero_stage": 1}}, world, keep=1)
        stalls, commits = [], []
        for step in range(options.rounds):
            stalls.append(saver.save(step, {}))
            commits.append(fastest(saver.wait, 1))
        result[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "resume_s": fastest(lambda saver=saver: saver.resume("must"), 1),
            "bytes": sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()),
            "stall_s": [min(stalls), max(stalls)],
            "counts_s": [min(commits), max(commits)],
        }
        engine.close()
    destroy_world()
    return result


def main() -> None:
    """Entry point."""
    options, parts = parse(), dict(zip(PARTS, (index, sampler, reading, checkpoints), strict=True))
    prepare(options.device)
    result = {"bench": "scale", "rounds": options.rounds} | machine(options.device)
    result["load"] = round(os.getloadavg()[0], 1)  # before the first part
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, redirect_stdout(sys.stderr):
            result[part] = parts[part](options, Path(folder))
    result = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    report(result, [f"{part}\n{json.dumps(result[part], indent=1)}" for part in options.parts], options)


if __name__ == "__main__":
    run_main(main)
