"""The part of docs/results.md on segmentation and detection."""

from fnmatch import filter as matching
from statistics import mean

from bench.dense_evidence import DOMAINS
from bench.experiments import SEEDS
from bench.tables import at_best_rate, load, mean_and_range, recipe_links, table

STARTS = {
    "scratch": "from scratch",
    "fcmae": "FCMAE on the same images",
    "muon": "FCMAE with Muon",
    "lejepa": "FCMAE and LeJEPA with Muon",
    "fcmae-others": "FCMAE on other photographs",
}


def dense() -> str:
    """Text and tables of all domains."""
    return "".join(f"\n## {domain.title} without a GPU: {name}\n\n{_domain(name)}" for name, domain in DOMAINS.items())


def _domain(name: str) -> str:
    """Scores by share of the labels and start, then every run."""
    domain = DOMAINS[name]
    runs = load(name)
    if not runs:
        return f"**Not measured yet.** Run `bash launch/evidence.sh {name} {name}/ --save`.\n"
    starts = [start for start in STARTS if matching(runs, f"{start}-labels-*")]
    rows = [row for share in sorted(domain.budgets) if (row := _row(runs, name, share, starts))]
    hardware = "; ".join(sorted({run["hardware"] for run in runs.values()}))
    steps = "; ".join(
        f"{share:.0%} of the labels: {epochs} epochs" for share, (epochs, _) in sorted(domain.budgets.items())
    )
    text = (
        f"{hardware}. Recipes {recipe_links(domain.recipe)}; {steps}. Scores are {domain.title} on the validation "
        "images, of the best evaluation of a run. The learning rate of each start is the best at the first seed; other "
        f"photographs take that of the same images. Pretraining took {_minutes(runs, starts)}.\n\n"
    )
    head = ["labels", *(STARTS[start] for start in starts), "gain of FCMAE on the same images, points"]
    return text + table(head, rows) + "\n" + table(["run", "base lr", "score"], _all(runs, domain.metric))


def _minutes(runs: dict, starts: list[str]) -> str:
    """Times of the pretrainings."""
    pretrained = {STARTS[start]: runs[start] for start in starts if start in runs}
    return "; ".join(
        f"{run['seconds'] / 60:.0f} minutes ({title}, {run['hardware']})" for title, run in pretrained.items()
    )


def _row(runs: dict, name: str, share: float, starts: list[str]) -> list[str] | None:
    """The scores of all seeds of each start at its best learning rate."""
    metric, values = DOMAINS[name].metric, {}
    for start in starts:
        if found := at_best_rate(runs, start, share, metric):
            values[start] = found
    if not {"scratch", "fcmae"} <= values.keys():
        return None
    cells = [
        f"{mean_and_range(values[start][0])}, lr {values[start][1]}" if start in values else "-" for start in starts
    ]
    scratch, fcmae = values["scratch"][0], values["fcmae"][0]
    done = len(scratch) == len(fcmae) == len(SEEDS)
    return [f"{share:.0%}", *cells, f"{100 * (mean(fcmae) - mean(scratch)):+.1f}" if done else "unfinished"]


def _all(runs: dict, metric: str) -> list[list]:
    """Name, learning rate and score of each fine-tuning."""
    tuned = {name: run for name, run in runs.items() if run["stage"] == "fine-tuning"}
    return [[name, f"{run['config']['optim']['lr']:g}", f"{run['best'][metric]:.2%}"] for name, run in tuned.items()]
