"""docs/scale.md: its text, and the arithmetic from what bench/scale.py measured. `python bench/report.py` writes it."""

import re
import textwrap
from dataclasses import dataclass

from bench.common import ROOT, table, where
from bench.roofline import count
from bench.scale import BATCH, EPOCH, PER_SHARD, WAYS, sent
from configs.errors import UserError
from configs.schema import PretrainModel, Run, visible_patches
from data.loader import MAX_WORKERS
from data.sampler import WINDOW
from data.shards import ROW

PAGE = ROOT / "docs/scale.md"
SCALE = """# Scale

Made by `python bench/report.py` from `bench/results/`; do not edit. What a run of many images on many GPUs costs beside
the training itself, on paper: what one machine can show is measured (`python bench/scale.py --save scale`, best of
{rounds} rounds), the rest follows from it by arithmetic that is shown. **There was no GPU, no network and no parallel
file system**; images/s of a GPU and the network's speed are assumptions, marked as such: put in your own.

Measured on {where}, load {load:g} at the start: others worked on it too. GB are 10^9 bytes.
"""
EXCHANGE = """
## Gradient exchange

Counted between two ranks of this machine, in a step of {atto} under each ZeRO stage: how many copies of all weights or
gradients DeepSpeed hands to collectives. In rings, an all-reduce passes a copy 2 (N - 1)/N times through a rank, a
gather or a scatter (N - 1)/N times, and a number of fp32 has 4 bytes. So a rank sends each step, on {ranks} ranks with
one micro batch:

{table}
- With DeepSpeed's defaults ZeRO 1 and 2 do not scatter gradients: they all-reduce them, and then gather the weights.
  They send half as much again as stage 0, which saves no memory.
- ZeRO 2 all-reduces, and ZeRO 3 gathers and scatters, in *each* micro batch: accumulation multiplies what they send.
- Gradients are reduced in fp32 under bf16 too. In stages 0 and 1 the exchange begins when the backward pass has ended:
  it hides behind nothing.
"""
RUNS = """
## Two runs

**Assumed:** {rates} (their matrix products, forward and backward, are then {flops} TFLOP/s of a GPU); nodes of
n = {node} GPUs; a network of W = {network:g} GB/s ({bits:g} Gbit/s) a node. A ring through all GPUs leaves a node once,
so a node sends what a rank sends. c = {core:.0f} images/s is what one core of {core_device} reads, decodes and crops
(`bench/loader.py`): pictures of another size take another time.

{table}
Defaults: `run.save_every {save_every}`, `run.save_minutes {save_minutes:g}`, at most {workers} loader processes a rank
(`data.workers`). Shards of {per_shard} images: `data/prepare.py --shard-size {per_shard}`.

What stands out:

- **Exchange.** With ZeRO 1 it takes {shares} of a step. What fits on a GPU without it sends less with
  `--optim.zero_stage 0`; a larger batch sends as much for more images, but changes what is learnt.
- **Opening files.** A window's {window} shards are spread over all loader processes, and each opens tar and index of
  nearly every shard: {opens} times a second, all together. Local disks do not mind, nor does the cache of a `data.path`
  that is a URL; the metadata server of a parallel file system may. Larger shards and fewer loader processes open less.
- **Start-up.** Every rank looks at every shard, all at the same time: {open} s from a local disk, but on a parallel
  file system all these calls meet in one metadata server.
- **Fine-tuning** reads all labels at its start, so every `.idx.npy`, on each rank: {shard_ms:.2f} ms each from a local
  disk, {labels:.0f} s for {most}.
- **Checkpoints** cost {stalls} of the time. The first rank alone syncs and digests all files, behind the training.
"""
UNMEASURED = """
## Not measured

- Any speed of a GPU: images/s, whether some of the exchange overlaps, checkpoints from GPU memory.
- Any network: rings over many nodes, stragglers, the algorithm that NCCL chooses.
- Any parallel file system or object store: opening and reading shards from hundreds of nodes, checkpoints that many
  ranks write at once. Files here are on a local disk, and what was just written is read from memory.
- More than two ranks at once.
"""
ROWS = (  # of the table of runs: what, formula, key of `needs`, unit
    ("shards (s)", f"I / {PER_SHARD:,}", "shards", 1, ""),
    ("`index.json`", "measured bytes a shard x s", "json", 1e6, " MB"),
    ("all `.idx.npy`", f"{ROW.itemsize} I", "rows", 1e9, " GB"),
    ("a rank opens the split in", "measured seconds a shard x s", "open", 1, " s"),
    ("looks at a file, all ranks", "2 s G", "looks", 1e6, " million"),
    ("shuffle window, images", f"{WINDOW} shards", "window", 1, ""),
    ("shuffle window, bytes", "images x b", "window bytes", 1e9, " GB"),
    ("batches of a window", "images / B", "window batches", 1, ""),
    ("steps of an epoch", "I / B, rounded down", "steps", 1, ""),
    ("steps of the run", "times epochs", "all steps", 1, ""),
    ("computing a step", "B / (G R)", "compute", 1e-3, " ms"),
    ("a rank sends a step, ZeRO 1", "3 x 4 P (G - 1)/G", "sent", 1e9, " GB"),
    ("exchange of a step, ZeRO 1", "sent / W", "exchange", 1e-3, " ms"),
    ("exchange of a step, ZeRO 0", "2 x 4 P (G - 1)/G / W", "exchange 0", 1e-3, " ms"),
    ("exchange's share of a step, ZeRO 1", "exchange / (computing + exchange)", "share", 0.01, " %"),
    ("batch at which it is a tenth", "9 x exchange x G R", "tenth", 1, ""),
    ("the run, ZeRO 1", "steps x (computing + exchange)", "time", 3600, " hours"),
    ("read, all nodes", "G R b", "read", 1e9, " GB/s"),
    ("read, a node", "n R b", "read node", 1e9, " GB/s"),
    ("processes that only read so much", "n R b / measured, from memory", "readers", 1, ""),
    ("loader cores for a GPU", "R / c", "cores", 1, ""),
    ("loader cores for a node", "n R / c", "cores node", 1, ""),
    ("files opened a second", f"2 s x {MAX_WORKERS} G / an epoch's time", "opens", 1, ""),
    ("a checkpoint", "16 P", "checkpoint", 1e9, " GB"),
    ("of that, the first rank writes", "4 P + 12 P / G", "first rank", 1e9, " GB"),
    ("training waits for it", "at the slowest bytes/s measured", "stall", 1, " s"),
    ("it counts after", "16 P, likewise", "counts", 1, " s"),
    ("interval", "an epoch, at most 30 minutes", "interval", 1, " s"),
    ("share of the time", "waits / interval", "stall share", 0.01, " %"),
)


@dataclass(frozen=True)
class Plan:
    """A run on paper.

    Args:
        image_bytes: of one image, as it lies in a shard
        batch: images of a global batch
        rate: images/s that a GPU trains on, an assumption
    """

    name: str
    images: int
    image_bytes: int
    epochs: int
    model: str
    gpus: int
    batch: int
    rate: float


PLANS = (
    Plan("ImageNet-22K", 14_197_122, 110_000, 800, "convnextv2_base", 64, 4096, 2000.0),
    Plan("a billion", 1_000_000_000, 60_000, 1, "convnextv2_large", 256, 16384, 900.0),
)
NODE, NETWORK = 8, 100e9  # GPUs of a node; bytes/s that it sends, an assumption


def short(number: float) -> str:
    """A number with three digits, or all that stand before the point."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def needs(plan: Plan, scale: dict, core: float) -> dict[str, float]:
    """What a run needs, in seconds, bytes and counts.

    Args:
        scale: what bench/scale.py measured
        core: images/s of one core of the loader
    """
    index, reading, saved = scale["index"], scale["reading"], scale["checkpoints"][plan.model]
    parameters = scale["exchange"]["parameters"][plan.model]
    shards, steps = -(-plan.images // PER_SHARD), plan.images // plan.batch
    compute = plan.batch / (plan.gpus * plan.rate)
    sends = {stage: sent(parameters, plan.gpus, stage) for stage in (0, 1)}
    step = compute + sends[1] / NETWORK
    per_byte = saved["stall_s"][1] / saved["bytes"]  # the worst
    first_rank = 4 * parameters + 12 * parameters / plan.gpus
    interval = min(Run().save_every * steps * step, 60 * Run().save_minutes)
    return {
        "shards": shards,
        "json": shards * index["json_bytes"] / index["shards"],
        "rows": plan.images * ROW.itemsize,
        "open": shards * index["open_s"] / index["shards"],
        "looks": 2 * shards * plan.gpus,
        "window": WINDOW * PER_SHARD,
        "window bytes": WINDOW * PER_SHARD * plan.image_bytes,
        "window batches": WINDOW * PER_SHARD / plan.batch,
        "steps": steps,
        "all steps": steps * plan.epochs,
        "compute": compute,
        "sent": sends[1],
        "exchange": sends[1] / NETWORK,
        "exchange 0": sends[0] / NETWORK,
        "share": 1 - compute / step,
        "tenth": 9 * sends[1] / NETWORK * plan.gpus * plan.rate,
        "time": steps * plan.epochs * step,
        "read": plan.gpus * plan.rate * plan.image_bytes,
        "read node": NODE * plan.rate * plan.image_bytes,
        "readers": NODE * plan.rate * plan.image_bytes / (1e6 * reading["mb_per_s"]),
        "cores": plan.rate / core,
        "cores node": NODE * plan.rate / core,
        "opens": 2 * shards * plan.gpus * MAX_WORKERS / (steps * step),
        "checkpoint": 16 * parameters,
        "first rank": first_rank,
        "stall": first_rank * per_byte,
        "counts": 16 * parameters * saved["counts_s"][1] / saved["bytes"],
        "interval": interval,
        "stall share": first_rank * per_byte / interval,
    }


def run_table(found: list[dict[str, float]]) -> str:
    """What the runs of `PLANS` need, with the formulas."""
    heads = [f"{p.name}: I = {p.images:,} of b = {p.image_bytes / 1e3:g} KB" for p in PLANS]
    about = [f"{p.epochs}, {p.model}, {p.gpus}, {p.batch}" for p in PLANS]
    rows = [["epochs, model (P parameters), GPUs (G), batch (B)", "chosen", *about]]
    rows.append(["images/s of a GPU (R)", "**assumed**", *(short(p.rate) for p in PLANS)])
    for what, formula, key, unit, name in ROWS:
        rows.append([what, formula, *(short(each[key] / unit) + name for each in found)])
    return table(["", "formula", *heads], rows)


def runs(scale: dict, loader: dict) -> str:
    """The two runs on paper."""
    core = 1e3 * loader["images"] / loader["milliseconds"]["ours, uint8"]
    found, config = [needs(plan, scale, core) for plan in PLANS], PretrainModel()
    decoder, seen = (config.decoder_dim, config.decoder_depth), visible_patches(49, config.mask_ratio)
    flops = [p.rate * count(PretrainModel(p.model), (7, 7), seen, decoder)[0] / 1e12 for p in PLANS]
    last, shard_ms, run = found[-1], scale["index"]["shard_ms"], Run()
    return RUNS.format(
        rates=" and ".join(f"R = {short(p.rate)} images/s of a GPU for {p.model}" for p in PLANS),
        flops=both(flops, "{:.0f}"), shares=both([each["share"] for each in found], "{:.0%}"),
        opens=both([each["opens"] for each in found], "{:,.0f}"), open=both([each["open"] for each in found], "{:.2g}"),
        stalls=both([each["stall share"] for each in found], "{:.1%}"), table=run_table(found), node=NODE,
        network=NETWORK / 1e9, bits=8 * NETWORK / 1e9, core=core, core_device=loader["device"], window=WINDOW,
        save_every=run.save_every, save_minutes=run.save_minutes, workers=MAX_WORKERS, per_shard=PER_SHARD,
        shard_ms=shard_ms, labels=last["shards"] * shard_ms / 1e3, most=f"{last['shards']:,}",
    )  # fmt: skip


def both(values: list[float], form: str) -> str:
    """A figure of each run, in their order."""
    return " and ".join(form.format(value) for value in values)


def index_and_order(scale: dict) -> str:
    """What was measured of index.json and of an epoch's order."""
    index, rows = scale["index"], []
    for name, r in scale["sampler"].items():
        times = [short(value) for value in (1e3 * r["first_s"], 1e3 * r["resume_s"], r["batch_ms"], r["peak_mb"])]
        rows.append([name, f"{r['samples']:,}", *times])
    head = ["dataset", "images", "first batch, ms", f"resume in epoch {EPOCH}, ms", "later batch, ms", "peak MB"]
    return f"""
## Index

{index["shards"]:,} shards of {PER_SHARD:,} images, simulated by files of full length without content: `index.json` has
{index["json_bytes"] / 1e6:.1f} MB ({index["json_bytes"] / index["shards"]:.0f} bytes a shard), is written in
{index["write_s"]:.1f} s and read in {index["read_s"]:.1f} s. Opening the split, which looks at every tar and index,
takes {index["open_s"]:.1f} s and keeps {index["held_mb"]:.0f} MB (at most {index["peak_mb"]:.0f} MB). A shard's own
index ({ROW.itemsize} bytes an image, {index["rows_bytes"] / 1e3:.0f} KB) is read and verified in
{index["shard_ms"]:.2f} ms when a loader process first needs it.

## Order of an epoch

Global batches of {BATCH}, all on one rank; a later batch is the mean over a window. First, a window is checked to be a
permutation of its shards' images. No part grows with the epoch, and only the order of the shards with their number.

{table(head, rows)}"""


def shuffle_and_reading(scale: dict) -> str:
    """What was measured of the shuffle window and of reading."""
    window, reading = scale["window"], scale["reading"]
    gave, apart = window["of_a_shard_in_a_batch"], window["apart"]
    return f"""
## Shuffle

A window is {WINDOW} shards: {window["samples"]:,} images, {window["batches"]} batches of {BATCH}; which shards share
one is drawn anew each epoch. Two neighbours of a shard end up {short(apart["mean"])} images apart in the mean,
{short(apart["median"])} in the median, and in the same batch in {window["neighbours_in_a_batch"]:.2%} of all cases. A
batch has {gave["mean"]:.0f} images of a shard with a standard deviation of {gave["std"]:.1f} ({gave["least"]} to
{gave["most"]}); drawing without replacement gives {chance():.1f}. So inside a window nothing is left of the order, but
a batch knows only {WINDOW} shards. `data/prepare.py` shuffles before it cuts shards, which makes each a fair sample;
shards made elsewhere, sorted by class or source, should be shuffled before.

## Reading

One process reads {reading["images_per_s"]:,.0f} images/s of {reading["image_bytes"] / 1e3:.0f} KB,
{reading["mb_per_s"]:,.0f} MB/s (`Split.read`: read at the place, compare the checksum), in random order over {WINDOW}
shards that are in memory. Decoding takes many times as long.
"""


def checkpoints(scale: dict) -> str:
    """What was measured of checkpoints."""
    rows = []
    for name, r in scale["checkpoints"].items():
        size = [f"{r['parameters'] / 1e6:.1f}M", short(r["bytes"] / 1e6), f"{r['bytes'] / r['parameters']:.2f}"]
        times = ["{:.2f} to {:.2f}".format(*r[key]) for key in ("stall_s", "counts_s")]
        rows.append([name, *size, *times, f"{r['resume_s']:.2f}", short(r["bytes"] / r["stall_s"][1] / 1e6)])
    head = ["model", "parameters", "MB", "bytes/parameter", "waits, s", "counts after, s", "resume, s", "MB/s"]
    return f"""
## Checkpoints

One rank, ZeRO 1, to a local disk: 4 bytes a parameter for the weights, 12 for AdamW's moments and ZeRO's own copy of
the weights. Training waits while files are written, mostly to memory (MB/s is of the slowest); then they are synced and
digested behind it until the checkpoint counts. A resume, timed once, verifies all digests, then loads. Fastest to
slowest of {scale["rounds"]}; the system's buffers, the disk and whoever else uses them make that much of a difference.

{table(head, rows)}"""


def chance() -> float:
    """Standard deviation of one shard's images in a batch that is drawn from a window without replacement."""
    total, share = WINDOW * PER_SHARD, 1 / WINDOW
    return (BATCH * share * (1 - share) * (total - BATCH) / (total - 1)) ** 0.5


def exchange(scale: dict, ranks: int) -> str:
    """What DeepSpeed hands to collectives, and the bytes that a rank sends."""
    models = [f"convnextv2_{size}" for size in ("tiny", "base", "huge")]
    parameters, rows = scale["exchange"]["parameters"], []
    for stage in range(4):
        one, two = (case for case in scale["exchange"]["counted"] if case["stage"] == stage)
        copies = [f"{one[way]:.2f}, {two[way]:.2f}" for way in WAYS.values()]
        rows.append([str(stage), *copies, *(f"{sent(parameters[m], ranks, stage) / 1e9:.2f} GB" for m in models)])
    ways = ["all-reduce: with one, two micro batches", "all-gather", "reduce-scatter"]
    made = table(["ZeRO", *ways, *(f"{m}, {parameters[m] / 1e6:.0f}M" for m in models)], rows)
    return EXCHANGE.format(atto="convnextv2_atto", ranks=ranks, table=made)


def fold(text: str) -> str:
    """Paragraphs and list items folded to 120 columns; tables and headings as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(("#", "|")):
            items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", block)]
            indent = "  " if block.startswith("- ") else ""
            fill = {"width": 120, "subsequent_indent": indent, "break_on_hyphens": False, "break_long_words": False}
            block = "\n".join(textwrap.fill(item, **fill) for item in items)
        blocks.append(block.strip("\n"))
    return "\n\n".join(blocks) + "\n"


def page(results: list[dict]) -> str:
    """docs/scale.md. Raises `UserError` where a result is missing."""
    kinds = {kind: [r for r in results if r["bench"] == kind] for kind in ("scale", "loader")}
    if not all(kinds.values()):
        raise UserError(f"{PAGE} needs results of bench/scale.py and bench/loader.py: run both with --save NAME")
    scale, loader = kinds["scale"][0], kinds["loader"][0]
    head = SCALE.format(rounds=scale["rounds"], where=where(scale), load=scale["load"])
    measured = (index_and_order(scale), shuffle_and_reading(scale), checkpoints(scale))
    return fold("\n".join([head, *measured, exchange(scale, PLANS[0].gpus), runs(scale, loader), UNMEASURED]))
