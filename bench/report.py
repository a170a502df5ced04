"""Write docs/performance.md with its picture, and docs/scale.md, from bench/results/*.json.

python bench/report.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench import scale_page
from bench.common import load, table, where
from bench.encoder import SWEEP
from configs.errors import Parser, run_main
from configs.files import write_whole

PAGE, PICTURE = ROOT / "docs/performance.md", ROOT / "docs/scaling.svg"
AXES = {"mask_ratio": "mask ratio", "size": "image side, pixels (same pixels a batch)", "batch": "batch, images"}
HEAD = """# Performance

Made by `python bench/report.py` from the files in `bench/results/`; do not edit. Every figure comes from a command that
first compares outputs and gradients with plain code in fp32 and refuses to time a wrong result. Peers run in the same
process, in turn, so ratios are of one run; absolute times depend on the machine. `spread` is fastest to slowest.
"""
STEP = """
## Training step

`python bench/step.py pretrain|finetune --model NAME --batch 8`. The roofline is the greater of the least times of the
matrix products and of the memory traffic (`bench/roofline.py`), at the device's own peaks, measured in the same run.

"""
CPU = """
## On a CPU: what helped, and what is left

- The depthwise convolution works on windows, each patch with a margin of 3 tokens from its neighbours, instead of on a
  canvas of all patches: only outputs that exist are computed.
- Its weight gradient took four fifths of the depthwise backward pass in oneDNN. It is now the convolution of each
  window with the patch's gradient as kernel: 18 ms became 4 (tiny, stage 1, batch 8, two cores).
- Dense models do the same with whole images, and their input gradient is the same convolution with the kernel turned
  round, instead of oneDNN's own: backward 18 ms became 3 (100 images of 16x16 tokens, 40 channels, bf16, two cores).
- GRN's norm as a sum of squares instead of `torch.linalg.vector_norm`: 2.0 ms became .3 a call.
- glibc gives large tensors back to the system when they are freed; each page faults again when the next is written.
  Training and benchmarks keep memory (`launch/training/malloc.py`); the masked peer gains more from that than packed.
- torch.compile on the packed encoder: 0 to 2 % faster after 40 seconds of compiling. Not used.
- What is left is matrix products: 60 % of the packed encoder's time for tiny.
"""
NO_GPU = """
## GPU

**Not measured yet.** The Triton kernels (`models/kernels/`) give the plain code's outputs and gradients in Triton's
interpreter, and compile for sm_80, sm_90 and sm_100, on sm_90 without spilling registers for widths up to 1024; nothing
has been timed. Not known, therefore: packed against masked + torch.compile in a full bf16 step (atto to huge), its
share of the roofline and its peak memory, the depthwise kernel's share of the bandwidth bound, the fine-tuning step
against timm's compiled model, and whether torch.compile or CUDA graphs around the kernels help. On a machine with a
GPU, one command makes every figure:

```bash
bash bench/gpu.sh
```
"""


def encoder(results: list[dict]) -> str:
    """Forward + backward of the encoder on visible patches."""
    rows = []
    for r in results:
        fastest = r["milliseconds"]["packed"]
        for name, ms in r["milliseconds"].items():
            low, high = r["spread"][name]
            factor = f"{ms / fastest:.2f}x faster" if name != "packed" else ""
            memory = f"{r['peak_gib'][name]:.2f}" if "peak_gib" in r else ""
            shown = [r["model"], str(r["batch"]), r["precision"], name, f"{ms:.1f}", f"{low:.1f} to {high:.1f}"]
            rows.append([*shown, f"{1e3 * r['batch'] / ms:.1f}", factor, memory])
    head = ["encoder", "batch", "precision", "backend", "ms", "spread", "images/s", "packed is", "GiB"]
    return table(head, rows)


def step(results: list[dict]) -> str:
    """A whole training step and its parts."""
    rows = []
    for r in results:
        parts = r["parts"]
        for name in parts["step"]["milliseconds"]:
            ms = [f"{parts[part]['milliseconds'][name]:.1f}" for part in parts]
            factor = parts["step"]["speedup"].get(name)
            memory = f"{r['peak_gib'][name]:.2f}" if "peak_gib" in r else ""
            what = f"{r['model']}, batch {r['batch']}, {r['precision']}, recompute {r['recompute']}"
            share = f"{r['roofline_share'][name]:.0%}"
            rows.append([r["stage"], what, name, *ms, f"{factor:.2f}x faster" if factor else "", share, memory])
    head = [
        "stage",
        "model",
        "code",
        "forward",
        "+ backward",
        "+ optimizer, ms",
        "ours is faster",
        "roofline",
        "peak GiB",
    ]
    return table(head, rows)


def kernels(results: list[dict]) -> str:
    """Kernels alone."""
    rows = [
        [
            *(str(case[key]) for key in ("model", "operation", "where", "stage")),
            f"{case['milliseconds']['kernel']:.3f}",
            f"{case['speedup']['plain']:.2f}x",
            f"{case['bandwidth_share']:.0%}",
        ]
        for r in results
        for case in r["cases"]
    ]
    return table(["model", "kernel", "tokens", "stage", "ms", "faster than plain", "of the bandwidth bound"], rows)


def loader(results: list[dict]) -> str:
    """One core of the loader."""
    rows = []
    for r in results:
        for name, ms in r["milliseconds"].items():
            factor = f"{r['speedup'][name]:.2f}x" if name in r["speedup"] else ""
            rows.append([name, f"{r['images']} to {r['size']} px", f"{1e3 * r['images'] / ms:.0f}", factor])
    difference = max(r["grey_levels"] for r in results)
    note = f"\nThe same crop of the same picture differs from PIL's by {difference:.2f} grey levels in the mean.\n"
    return table(["one core", "pictures", "images/s", "ours takes less time by"], rows) + note


def draw(sweeps: list[dict]) -> None:
    """Images/s against mask ratio, image size and batch."""
    plt.rcParams |= {"svg.hashsalt": "performance", "svg.fonttype": "none", "font.size": 10}
    figure, axes = plt.subplots(len(sweeps), 3, figsize=(12, 3.6 * len(sweeps)), squeeze=False, layout="constrained")
    for row, result in zip(axes, sweeps, strict=True):
        points, start = result["sweep"], 0
        for axis, (key, values) in zip(row, SWEEP.items(), strict=True):
            part, start = points[start : start + len(values)], start + len(values)
            for name, colour in (("packed", "#d97706"), ("masked", "#64748b")):
                rate = [1e3 * point["batch"] / point["milliseconds"][name] for point in part]
                axis.plot([point[key] for point in part], rate, "o-", color=colour, label=name)
            axis.set(xlabel=AXES[key], ylim=(0, None))
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{result['model']}\nimages/s, forward + backward")
        row[0].legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def page(results: list[dict]) -> str:
    """docs/performance.md."""
    results = [r for r in results if r["bench"] != "scale"]
    kinds = {kind: [r for r in results if r["bench"] == kind] for kind in ("encoder", "step", "kernels", "loader")}
    sweeps = [r for r in kinds["encoder"] if "sweep" in r]
    sections = [HEAD]
    sections.append("\n## Encoder: forward + backward, 224 px, 19 of 49 patches visible\n\n")
    sections.append("`python bench/encoder.py --model NAME --batch 8 --peers masked compiled minkowski`\n\n")
    sections.append(encoder([r for r in kinds["encoder"] if "sweep" not in r]))
    if kinds["step"]:
        sections.append(STEP + step(kinds["step"]))
    if kinds["kernels"]:
        sections.append("\n## Kernels\n\n`python bench/kernels.py`\n\n" + kernels(kinds["kernels"]))
    if kinds["loader"]:
        sections.append("\n## Loader\n\n`python bench/loader.py SHARDS`\n\n" + loader(kinds["loader"]))
    if sweeps:
        sections.append("\n## How cost grows\n\n`python bench/encoder.py --model NAME --sweep`\n\n")
        sections.append(
            "![Images per second against mask ratio, image size and batch, packed and masked](scaling.svg)\n"
        )
    sections.append(CPU)
    if not any("NVIDIA" in r["device"] for r in results):
        sections.append(NO_GPU)
    sections.append("\n## Machines\n\n" + "".join(f"- {line}\n" for line in sorted({where(r) for r in results})))
    return "".join(sections)


def main() -> None:
    """Entry point."""
    Parser(description=__doc__).parse_args()
    results = load()
    sweeps = [r for r in results if "sweep" in r]
    if sweeps:
        draw(sweeps)
    write_whole(PAGE, page(results).encode())
    write_whole(scale_page.PAGE, scale_page.page(results).encode())
    print(f"wrote {PAGE.relative_to(ROOT)} and {scale_page.PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
