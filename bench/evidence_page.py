"""Write docs/results.md and its pictures from the summaries in bench/results/cifar10-*/.

python bench/evidence_page.py
"""

import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

import matplotlib.ticker
from matplotlib.figure import Figure

from bench.common import RESULTS, table
from bench.evidence import ABLATIONS, BACKENDS, FEW, SCALES
from configs.errors import Parser, run_main
from configs.files import write_whole
from configs.schema import visible_patches

PAGE = ROOT / "docs/results.md"
K = "top1_k20"  # the number of neighbours that tables and pictures show
COLOURS = {"scratch": "#808080", "fcmae": "#3b6fd4", "other": "#d9822b"}
HEAD = """# Does pretraining pay?

Made by `python bench/evidence_page.py` from the runs' summaries in `bench/results/cifar10-*/`; do not edit.

CIFAR-10: 45,000 training, 5,000 validation and 10,000 test images of 32x32 pixels. Pretraining sees the 45,000 without
labels. Fine-tuning sees 1, 10 or 100 % of the labels, the same share of each class; the seed draws which, and all else
that is random. Both starts get the same steps and augmentation; each gets the learning rate that is best on validation
at the first seed, better than half and twice as much. Validation accuracy in a run chooses the epoch, and the test
images are scored once, at the end. `a to b` is the lowest and the highest of the seeds. Every run is listed.
"""
NAMES = {
    "mask-0.4": "mask ratio .4",
    "mask-0.6": "mask ratio .6",
    "mask-0.75": "mask ratio .75",
    "mask-0.9": "mask ratio .9",
    "zeroed": "ordinary convolutions, hidden patches set to zero",
    "decoder-2": "decoder of 2 blocks",
    "decoder-4": "decoder of 4 blocks",
    "without-grn": "ConvNeXt V1 blocks: layer scale, no GRN",
}
TITLES = {"cpu": "Without a GPU", "gpu": "On a GPU"}
Found = dict[str, dict]  # what is in the summaries, by name of the run


def load(scale: str) -> Found:
    """The summaries of one kind of machine; those of pretraining with their epochs as numbers."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / f"cifar10-{scale}").glob("*.json"))}
    for summary in found.values():
        for name in ("loss", "images_per_s", "knn", "linear", "feature_distance"):
            if name in summary:
                summary[name] = {int(epoch): value for epoch, value in summary[name].items()}
    return found


def page() -> tuple[str, dict[str, Figure]]:
    """The text, and the pictures by file name."""
    text, pictures = [HEAD], {}
    for scale, title in TITLES.items():
        found = load(scale)
        if not found:
            text.append(
                f"\n## {title}\n\n**Not measured yet.** `bash launch/evidence.sh {scale} CIFAR10 --save` does it.\n"
            )
            continue
        text.append(f"\n## {title}\n\n{about(scale, found)}")
        for section in (labels, probes, collapse, backends, ablations):
            words, figure = section(found, scale)
            text += words
            if figure:
                name = f"results-{scale}-{section.__name__}.svg"
                pictures[name] = figure
                text.append(f"\n![{figure.get_suptitle()}]({name})\n")
        text += all_runs(found)
    return "".join(text), pictures


def about(scale: str, found: Found) -> str:
    """Machine, model and command."""
    trained = [summary for summary in found.values() if "hardware" in summary]
    machines = sorted({summary["hardware"] for summary in trained})
    hours = sum(summary["seconds"] for summary in trained) / 3600
    recipes = [f"{stage}/{SCALES[scale].recipe}" for stage in ("pretrain", "finetune")]
    return (
        f"{'; '.join(machines)}. Recipes {' and '.join(f'[{name}](../configs/{name}.yaml)' for name in recipes)}. "
        f"The times of all runs add up to {hours:.1f} hours: `bash launch/evidence.sh {scale} CIFAR10`.\n"
    )


def last(by_epoch: dict):
    """The value of the last epoch."""
    return by_epoch[max(by_epoch)]


def several(values: list[float]) -> str:
    """Mean and range of accuracies, in per cent."""
    if len(values) == 1:
        return f"{values[0]:.2%} (one seed)"
    return f"{mean(values):.2%} ({min(values):.2%} to {max(values):.2%})"


def tested(found: Found, start: str, share: float) -> dict[int, float]:
    """Test accuracy of a start with a share of the labels, by seed."""
    pattern = re.compile(re.escape(f"{start}-labels-{share:g}-lr-") + r"[\d.e-]+-seed-(\d+)-test")
    matches = {name: pattern.fullmatch(name) for name in found}
    return {int(match[1]): found[name]["scores"]["top1"] for name, match in matches.items() if match}


def labels(found: Found, scale: str) -> tuple[list[str], Figure | None]:
    """Fine-tuning from both starts, with few labels and many."""
    rows, points = [], []
    for share in sorted(SCALES[scale].budgets):
        scratch, fcmae = (list(tested(found, start, share).values()) for start in ("scratch", "fcmae"))
        if not (scratch and fcmae):
            continue
        gain, spread = mean(fcmae) - mean(scratch), max(max(x) - min(x) for x in (scratch, fcmae))
        cells = [f"{share:.0%}", f"{45_000 * share:,.0f}", several(scratch), several(fcmae)]
        rows.append([*cells, f"{100 * gain:+.1f}", f"{100 * spread:.1f}", str(len(fcmae))])
        points.append((share, scratch, fcmae))
    if not rows:
        return ["\n### Fewer labels\n\nNot measured yet.\n"], None
    head = ["labels", "images", "from scratch", "from FCMAE weights", "gain, points", "larger range, points", "seeds"]
    figure, axes = plot("Test top-1 with few labels")
    for column, (start, label) in enumerate({"scratch": "from scratch", "fcmae": "from FCMAE weights"}.items()):
        middle = [mean(point[1 + column]) for point in points]
        below = [m - min(point[1 + column]) for m, point in zip(middle, points, strict=True)]
        above = [max(point[1 + column]) - m for m, point in zip(middle, points, strict=True)]
        share = [point[0] for point in points]
        axes.errorbar(share, middle, (below, above), marker="o", capsize=4, color=COLOURS[start], label=label)
    axes.set_xscale("log")
    axes.set_xticks([point[0] for point in points], [f"{point[0]:.0%}" for point in points])
    axes.set_xlabel("share of the labels")
    finish(axes)
    return ["\n### Fewer labels\n\nTop-1 on the 10,000 test images.\n\n", table(head, rows)], figure


def probes(found: Found, scale: str) -> tuple[list[str], Figure | None]:
    """Nearest neighbours and linear classifier along pretraining; epoch 0 has random weights."""
    if "fcmae" not in found:
        return ["\n### Features along pretraining\n\nNot measured yet.\n"], None
    run = found["fcmae"]
    epochs = sorted(run["knn"])
    rows = [[str(epoch), f"{run['knn'][epoch][K]:.2%}", f"{run['linear'][epoch]['top1']:.2%}"] for epoch in epochs]
    gain = 100 * (run["knn"][epochs[-1]][K] - run["knn"][0][K])
    figure, axes = plot("Features along pretraining")
    axes.plot(epochs, [run["knn"][epoch][K] for epoch in epochs], "o-", color=COLOURS["fcmae"], label="kNN, k = 20")
    linear = [run["linear"][epoch]["top1"] for epoch in epochs]
    axes.plot(epochs, linear, "s-", color=COLOURS["other"], label="linear classifier")
    axes.set_xlabel("epochs of pretraining (0: random weights)")
    finish(axes)
    text = (
        "\n### Features along pretraining\n\nTop-1 on the validation images, of the 20 nearest among the training "
        "images and of a linear classifier on the features; epoch 0 has the random weights that pretraining starts "
        f"from. kNN gains {gain:.1f} points.\n\n"
    )
    return [text, table(["epoch", "kNN, k = 20", "linear"], rows)], figure


def collapse(found: Found, scale: str) -> tuple[list[str], Figure | None]:
    """Distance of channels with GRN and without, by stage."""
    runs = {"with GRN (V2)": SCALES[scale].base, "without (V1)": "without-grn"}
    if not all(found.get(name, {}).get("feature_distance") for name in runs.values()):
        return ["\n### Feature collapse\n\nNot measured yet.\n"], None
    stages = [f"stage_{i}" for i in (1, 2, 3, 4)]
    figure, axes = plot("Feature collapse: distance of channels at the end")
    rows = []
    for (label, name), colour in zip(runs.items(), ("fcmae", "other"), strict=True):
        distance = found[name]["feature_distance"]
        rows += [[label, str(epoch), *(f"{distance[epoch][stage]:.3f}" for stage in stages)] for epoch in distance]
        axes.plot((1, 2, 3, 4), [last(distance)[stage] for stage in stages], "o-", color=COLOURS[colour], label=label)
    axes.set_xticks((1, 2, 3, 4))
    axes.set_xlabel("stage")
    axes.set_ylim(0, 0.55)
    finish(axes, percent=False)
    text = (
        "\n### Feature collapse\n\nMean cosine distance of two channels of the MLPs' expanded layers (figure 3 of "
        "2301.00808): 0 = all channels are alike, .5 = they are unrelated.\n\n"
    )
    return [text, table(["blocks", "epoch", *(f"stage {i}" for i in (1, 2, 3, 4))], rows)], figure


def backends(found: Found, scale: str) -> tuple[list[str], Figure | None]:
    """The same pretraining, on each backend."""
    runs = {backend: found[f"backend-{backend}"] for backend in BACKENDS if f"backend-{backend}" in found}
    if len(runs) < 2:
        return ["\n### Backends\n\nNot measured yet.\n"], None
    base = runs["packed"]["loss"]
    figure, axes = plot("Pretraining loss on each backend")
    rows = []
    for (backend, run), style in zip(runs.items(), ("-", "--", ":"), strict=False):
        apart = max(abs(run["loss"][epoch] - base[epoch]) / base[epoch] for epoch in base)
        speed = mean(run["images_per_s"].values())
        rows.append([backend, f"{last(run['loss']):.6f}", f"{apart:.1e}", f"{speed:,.0f}"])
        axes.plot(list(run["loss"]), list(run["loss"].values()), style, lw=2, label=backend)
    axes.set_xlabel("epochs")
    finish(axes, percent=False)
    steps = runs["packed"]["steps"]
    text = (
        f"\n### Backends\n\nThe same {steps} steps in fp32, on 5,000 images, from the same weights, with the same "
        "masks: mean loss of the last epoch, and the greatest relative difference of an epoch's loss from packed's.\n\n"
    )
    return [text, table(["backend", "loss", "difference", "images/s"], rows)], figure


def ablations(found: Found, scale: str) -> tuple[list[str], Figure | None]:
    """Pretrainings that differ in one thing."""
    rows = []
    for name in (name for name in ABLATIONS if name in found):
        run, tuned = found[name], re.compile(re.escape(f"{name}-labels-{FEW:g}-lr-") + r"[\d.e-]+-seed-\d+")
        top1 = [found[other]["best"]["top1"] for other in found if tuned.fullmatch(other)]
        settings = run["config"]["model"] | run["config"].get("objective", {})  # older results: under model
        hidden = 1 - visible_patches(16, settings["mask_ratio"]) / 16
        title = f"**{NAMES[name]}, the recipe**" if name == SCALES[scale].base else NAMES[name]
        cells = [title, f"{hidden:.1%}", f"{last(run['loss']):.3f}", f"{last(run['knn'])[K]:.2%}"]
        rows.append([*cells, f"{last(run['linear'])['top1']:.2%}", several(top1) if top1 else "-"])
    if not rows:
        return ["\n### What matters in pretraining\n\nNot measured yet.\n"], None
    epochs = ", ".join(sorted({str(found[name]["epochs"]) for name in ABLATIONS if name in found}))
    text = (
        f"\n### What matters in pretraining\n\nPretrainings of {epochs} epochs that differ from the recipe in "
        f"one thing; then fine-tuning with {FEW:.0%} of the labels, all with the same learning rate. Accuracies on the "
        "validation images. Losses of different mask ratios are of different tasks.\n\n"
    )
    head = ["pretraining", "really hidden", "loss", "kNN, k = 20", "linear", "fine-tuned"]
    return [text, table(head, rows)], None


def all_runs(found: Found) -> list[str]:
    """Two tables: every pretraining, every fine-tuning."""
    pretrained, tuned = [], []
    for name, run in found.items():
        if name.endswith("-test"):
            continue
        time = str(timedelta(seconds=run["seconds"]))
        if run["stage"] == "pretraining":
            knn = [
                f"{last(run[kind])[key]:.2%}" if run[kind] else "-" for kind, key in (("knn", K), ("linear", "top1"))
            ]
            speed = f"{mean(run['images_per_s'].values()):,.0f}"
            loss = f"{last(run['loss']):.4f}"
            pretrained.append([name, str(run["epochs"]), loss, *knn, speed, time, run["hardware"]])
        else:
            config, score = run["config"], found.get(f"{name}-test")
            share = (config | config.get("task", {}))["label_share"]  # older results: at the top
            cells = [name, f"{share:.0%}", f"{config['optim']['lr']:g}", str(config["run"]["seed"])]
            cells += [f"{run['best']['top1']:.2%}", f"{score['scores']['top1']:.2%}" if score else "-"]
            tuned.append([*cells, time, run["hardware"]])
    text = ["\n### Every run\n"]
    if pretrained:
        head = ["pretraining", "epochs", "loss", "kNN", "linear", "images/s", "time", "hardware"]
        text += ["\n", table(head, pretrained)]
    if tuned:
        head = ["fine-tuning", "labels", "base lr", "seed", "validation", "test", "time", "hardware"]
        text += ["\n", table(head, tuned)]
    return text


def plot(title: str):
    """A figure with one set of axes."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.add_subplot()


def finish(axes, percent: bool = True) -> None:
    """Grid, legend and units."""
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    if percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))


def write() -> None:
    """Write the page and its pictures."""
    text, pictures = page()
    write_whole(PAGE, text.encode())
    for name, figure in pictures.items():
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # the same bytes again
            figure.savefig(PAGE.with_name(name), metadata={"Date": None, "Creator": None})
    print(f"wrote {PAGE.relative_to(ROOT)}" + "".join(f", docs/{name}" for name in pictures))


if __name__ == "__main__":
    Parser(description=__doc__).parse_args()
    run_main(write)
