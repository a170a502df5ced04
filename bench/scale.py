"""Measure what a run of a billion images costs beside the training itself: index, order, reads, checkpoints, exchange.

python bench/scale.py --save scale                                  every part; minutes, and 6 GB of room in --folder
python bench/scale.py --parts sampler window                        some
python bench/report.py                                              docs/scale.md from the result

The samples of `index`, `sampler` and `window` are simulated: files of the right length without content, numbers instead
of images. `reading` reads real files of random bytes; `checkpoints` saves real engines; `exchange` counts what
DeepSpeed hands to the collectives of two ranks. What can be checked is checked before it is timed: an order must be a
permutation, bytes read those written, weights loaded those saved. Times are the best of --rounds; a checkpoint's are
the best and the worst.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import add_common, check_arguments, machine, show
from configs.errors import Parser, UserError, run_main
from configs.files import sha256
from configs.schema import Optim, PretrainModel, Run
from data.sampler import WINDOW, EpochOrder, TrainBatches
from data.shards import ROW, Index, Shard, Split, index_file, index_tar, read_index, write_index
from data.writing import write_tar
from launch.training.checkpoints import Checkpoints
from launch.training.engine import build_engine, parameter_groups
from launch.training.world import free_port, start, stop
from models.fcmae import FCMAE

PER_SHARD, BATCH, EPOCHS, EPOCH = 10_000, 4096, 800, 700  # EPOCH: in which the sampler is asked to resume
SETS = {"ImageNet-1K": 128, "ImageNet-22K": 1_420, "a billion": 100_000}  # shards of PER_SHARD images
IMAGE_BYTES = 110_000
SIZES = ("atto", "tiny", "base", "large", "huge")
WAYS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    parser.add_argument("--shards", type=int, default=SETS["a billion"], help="of the index (default %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="that are read (default %(default)s)")
    parser.add_argument("--models", nargs="+", default=[f"convnextv2_{size}" for size in SIZES[:4]], help="to save")
    parser.add_argument("--folder", type=Path, help="where files are written and read (default: the system's)")
    add_common(parser, rounds=3)
    args = parser.parse_args()
    check_arguments(args)
    if min(args.shards, args.images // WINDOW) < 1:
        raise UserError(f"--shards must be at least 1, --images at least {WINDOW}")
    return args


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some runs: what else the machine does can only slow one down."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def memory(run: Callable[[], object]) -> tuple[float, float]:
    """MB that a run's result keeps, and MB that it takes at most, by tracemalloc (Python's objects and NumPy's)."""
    gc.collect()
    tracemalloc.start()
    result = run()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return held / 1e6, peak / 1e6


def index(args: argparse.Namespace, folder: Path) -> dict:
    """index.json of simulated shards: writing, reading, opening a split; and opening one shard of it."""
    shards = [Shard(f"train-{i:06}.tar", PER_SHARD, 1 << 30, f"{i:064x}", f"{i:064x}") for i in range(args.shards)]
    np.save(index_file(folder / shards[0].file), np.zeros(PER_SHARD, ROW), allow_pickle=False)
    rows = index_file(folder / shards[0].file)
    shards[0] = replace(shards[0], index_sha256=sha256(rows))
    for shard in shards:
        for path, size in ((folder / shard.file, shard.bytes), (index_file(folder / shard.file), rows.stat().st_size)):
            path.touch()
            os.truncate(path, size)  # takes no room
    write = best(lambda: write_index(folder, Index({"train": shards}, None)), args.rounds)
    if read_index(folder).splits["train"] != shards:
        raise UserError("index.json does not give back what was written: not timed")
    held, peak = memory(lambda: Split(folder, "train"))
    split = Split(folder, "train")
    return {
        "shards": args.shards,
        "samples": args.shards * PER_SHARD,
        "json_bytes": (folder / "index.json").stat().st_size,
        "rows_bytes": rows.stat().st_size,
        "write_s": write,
        "read_s": best(lambda: read_index(folder), args.rounds),
        "open_s": best(lambda: Split(folder, "train"), args.rounds),
        "shard_ms": 1e3 * best(lambda: split.fetch(0), 10 * args.rounds),  # its rows, read and verified, and its tar
        "held_mb": held,
        "peak_mb": peak,
    }


def sampler(args: argparse.Namespace, folder: Path) -> dict:
    """For each size of dataset: the first global batch, later ones, resuming far into training, memory."""
    return {name: order_of(count, args.rounds) for name, count in SETS.items()}


def order_of(shards: int, rounds: int) -> dict:
    """Times and memory of an epoch's order over so many shards. Raises `UserError` if it is no permutation."""
    counts = np.full(shards, PER_SHARD, np.int64)
    order = EpochOrder(counts, seed=0)
    size = min(WINDOW, shards) * PER_SHARD
    owners = np.sort(order.ids(EPOCH, 0, size)).reshape(-1, PER_SHARD)
    first = np.sort(order.shards(EPOCH, 0))[:, None] * PER_SHARD
    if not np.array_equal(owners, first + np.arange(PER_SHARD)):
        raise UserError("a window is not a permutation of its shards' samples: not timed")

    def batches(step: int = 0) -> Iterator[list[tuple[int, int, int]]]:
        found = TrainBatches(EpochOrder(counts, seed=0), BATCH, BATCH, 0, 1, EPOCHS)
        return found.iterate(EPOCH * found.steps_per_epoch + step if step else 0)

    middle = int(np.random.default_rng(0).integers(1, shards * PER_SHARD // BATCH))
    running, steps = batches(), size // BATCH  # a window's
    next(running)
    return {
        "shards": shards,
        "samples": shards * PER_SHARD,
        "first_s": best(lambda: next(batches()), rounds),
        "batch_ms": 1e3 * best(lambda: [next(running) for _ in range(steps)], rounds) / steps,
        "resume_s": best(lambda: next(batches(middle)), rounds),
        "peak_mb": memory(lambda: next(batches(middle)))[1],
    }


def window(args: argparse.Namespace, folder: Path) -> dict:
    """How well a window shuffles: where neighbours of a shard end up, what share of a batch one shard has."""
    shards = SETS["ImageNet-22K"]
    order = EpochOrder(np.full(shards, PER_SHARD, np.int64), seed=0)
    ids = order.ids(0, 0, WINDOW * PER_SHARD)
    place = np.argsort(ids).reshape(WINDOW, PER_SHARD)  # where each sample ended up, by shard and number in it
    apart = np.abs(np.diff(place))
    whole = ids[: len(ids) // BATCH * BATCH].reshape(-1, BATCH) // PER_SHARD
    shares = np.array([np.unique(batch, return_counts=True)[1] for batch in whole])
    return {
        "samples": len(ids),
        "apart": {"mean": float(apart.mean()), "median": float(np.median(apart)), "least": int(apart.min())},
        "neighbours_in_a_batch": float((place[:, 1:] // BATCH == place[:, :-1] // BATCH).mean()),
        "of_a_shard_in_a_batch": {"least": int(shares.min()), "mean": float(shares.mean()), "std": float(shares.std()),
                                  "most": int(shares.max())},
        "batches": len(whole),
    }  # fmt: skip


def reading(args: argparse.Namespace, folder: Path) -> dict:
    """`Split.read` in an epoch's order: real files in the page cache, one process, no decoding."""
    rng, each = np.random.default_rng(0), args.images // WINDOW
    pictures = [rng.bytes(IMAGE_BYTES) for _ in range(each)]  # the same in every shard
    tars = [folder / f"train-{i:06}.tar" for i in range(WINDOW)]
    for tar in tars:
        write_tar(tar, ({"__key__": f"{i:06}", "jpg": data} for i, data in enumerate(pictures)))
    write_index(folder, Index({"train": [index_tar(tar) for tar in tars]}, None))
    split = Split(folder, "train")
    ids = EpochOrder(split.counts, seed=0).ids(0, 0, len(split)).tolist()
    if any(split.read(sample)[0] != pictures[sample % each] for sample in ids):
        raise UserError("what is read is not what was written: not timed")
    seconds = best(lambda: [split.read(sample) for sample in ids], 3 * args.rounds)
    rate = len(ids) / seconds
    return {"images": len(ids), "image_bytes": IMAGE_BYTES, "images_per_s": rate, "mb_per_s": rate * IMAGE_BYTES / 1e6}


def a_step(engine) -> None:
    """One micro batch, forward and backward, and the optimizer's step if one is due."""
    image, visible = torch.rand(1, 3, 64, 64), torch.tensor([[[True, False], [False, False]]])
    engine.backward(engine(image.to(engine.device), visible.to(engine.device)))
    engine.step()


def checkpoints(args: argparse.Namespace, folder: Path) -> dict:
    """Checkpoints of a single rank under ZeRO 1: bytes, how long training waits, until one counts, until it is back."""
    world, found = start(Run(device=args.device)), {}
    for name in args.models:
        model = FCMAE(PretrainModel(name))
        optim = Optim(batch_size=1, zero_stage=1)
        engine = build_engine(model, parameter_groups(model, optim), optim, world)
        a_step(engine)
        saver = Checkpoints(folder / name, engine, {"optim": {"zero_stage": 1}}, world, keep=1)
        stalls, counts = [], []
        for step in range(args.rounds):
            stalls.append(saver.save(step, {}))
            counts.append(best(saver.wait, 1))
        weight = next(model.parameters()).data
        saved = weight.clone()
        weight.zero_()
        resume = best(lambda saver=saver: saver.resume("must"), 1)
        if not torch.equal(weight, saved):
            raise UserError(f"{name}: the weights loaded are not those saved")
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        parameters = sum(p.numel() for p in model.parameters())
        spread = {"stall_s": [min(stalls), max(stalls)], "counts_s": [min(counts), max(counts)]}  # the disk has moods
        found[name] = {"parameters": parameters, "bytes": size, "resume_s": resume} | spread
        engine.destroy()
        del engine, model, saver, weight, saved
    stop()
    return found


class Counted(TorchDispatchMode):
    """While entered, counts the elements handed to each collective; of a gather or scatter, those of the whole."""

    def __init__(self):
        super().__init__()
        self.elements = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sizes = [sum(x.numel() for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args]
            name = function._schema.name.partition("::")[2]
            self.elements[WAYS.get(name, name)] += max(sizes)
        return function(*args, **(kwargs or {}))


def exchange(args: argparse.Namespace, folder: Path) -> dict:
    """What two ranks hand to collectives in a step of each ZeRO stage, with one and with two micro batches."""
    torch.multiprocessing.spawn(_count, (free_port(), folder / "counted.json"), nprocs=2)
    counted = json.loads((folder / "counted.json").read_text())
    for case in counted:
        for way, copies in payload(case["stage"], case["micro_batches"]).items():
            if abs(case[way] - copies) > 0.1:
                raise UserError(
                    f"ZeRO {case['stage']} hands {case[way]:.2f} copies to {way}, not {copies}: see payload"
                )
    with torch.device("meta"):
        models = {f"convnextv2_{size}": FCMAE(PretrainModel(f"convnextv2_{size}")) for size in SIZES}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {"counted": counted, "parameters": parameters}


def _count(rank: int, port: int, path: Path) -> None:
    """One of the two ranks; the first writes what it counted."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    world, cases = start(Run(device="cpu")), []
    for stage, micro_batches in product(range(4), (1, 2)):
        model = FCMAE(PretrainModel("convnextv2_atto"))
        parameters = sum(p.numel() for p in model.parameters())
        optim = Optim(batch_size=2 * micro_batches, micro_batch=1, zero_stage=stage)
        engine = build_engine(model, parameter_groups(model, optim), optim, world)
        for _ in range(2):  # what the first step alone does does not count
            with Counted() as counted:
                for _ in range(micro_batches):
                    a_step(engine)
        copies = {way: round(counted.elements[way] / parameters, 4) for way in WAYS.values()}
        cases.append({"stage": stage, "micro_batches": micro_batches} | copies)
        engine.destroy()
    if world.first:
        path.write_text(json.dumps(cases))
    stop()


def payload(stage: int, micro_batches: int) -> dict[str, int]:
    """Copies of all weights or gradients that DeepSpeed 0.19 hands to collectives in a step, as `exchange` counts them.

    With its default of multi-rank buckets, ZeRO 1 and 2 do not scatter gradients, they all-reduce them: once a step, 2
    once a micro batch. ZeRO 3 gathers the weights of a model below a billion parameters once a micro batch.
    """
    reduced = {0: 1, 1: 1, 2: micro_batches, 3: 0}[stage]
    gathered = {0: 0, 1: 1, 2: 1, 3: micro_batches}[stage]
    return {"all_reduce": reduced, "all_gather": gathered, "reduce_scatter": micro_batches if stage == 3 else 0}


def sent(parameters: int, ranks: int, stage: int, micro_batches: int = 1) -> float:
    """Bytes that a rank sends each step in rings, fp32: a gather or scatter passes (N - 1)/N, an all-reduce twice."""
    copies = payload(stage, micro_batches)
    passes = 2 * copies["all_reduce"] + copies["all_gather"] + copies["reduce_scatter"]
    return 4 * parameters * passes * (ranks - 1) / ranks


PARTS = {part.__name__: part for part in (index, sampler, window, reading, checkpoints, exchange)}


def main() -> None:
    """Entry point."""
    args = parse()
    result = {"bench": "scale", "rounds": args.rounds} | machine(args.device)
    result["load"] = round(os.getloadavg()[0], 1)  # of the last minute, before the first part
    for part in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, redirect_stdout(sys.stderr):
            result[part] = PARTS[part](args, Path(folder))
    result = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    lines = [f"{part}\n{json.dumps(result[part], indent=1)}" for part in args.parts]
    show(result, lines, args)


if __name__ == "__main__":
    run_main(main)
