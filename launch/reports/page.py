"""report.html: a self-contained page with facts, curves, pictures, results and next commands of a run or of several."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from configs.errors import UserError, printable
from configs.files import write_atomic
from launch.reports.content import facts_of, next_commands, preview, results
from launch.reports.curves import Run, colour_rules, draw_plots
from launch.reports.pictures import Picture, read_pictures
from launch.training.runlog import read_log
from launch.training.summary import REPORT
from launch.training.trackers import flat

FOLDER = Path(__file__).parent
TEMPLATE, SCRIPT = FOLDER / "report.html.jinja", FOLDER / "report.js"
PLACES = ("run.name", "run.folder")  # settings that only say where a run writes
MAX_FAULTS = 10


@dataclass(frozen=True)
class Entry:
    """What the page says of one run."""

    name: str
    stage: str
    facts: dict[str, str]
    results: dict[str, str]
    commands: dict[str, str]
    figures: list[Picture]
    pictures: list[Picture]
    preview: list[str]
    faults: list[str]
    fault_count: int
    config: str
    settings: dict[str, object]
    curves: Run


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the run's files and return its path. Raises `UserError` if RUN is not a run."""
    write_page([run], run / REPORT)
    return run / REPORT


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write a page about one run, or one that compares several. Raises `UserError` if one is not a run."""
    names = short_names(runs)
    entries = [read_entry(run, name) for run, name in zip(runs, names, strict=True)]
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict).from_string(TEMPLATE.read_text())
    script = SCRIPT.read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = template.render(
        title=f"{entries[0].name}: {entries[0].stage}" if len(entries) == 1 else f"{len(entries)} runs compared",
        runs=entries,
        facts=table(entry.facts for entry in entries),
        results=table(entry.results for entry in entries),
        plots=draw_plots([entry.curves for entry in entries]),
        differences=differences([entry.settings for entry in entries]),
        colours=colour_rules(),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    write_atomic(out, page.encode(errors="backslashreplace"))


def short_names(runs: Sequence[Path]) -> list[str]:
    """Names of runs: their folders' names, or their paths if two have the same."""
    names = [run.resolve().name for run in runs]
    return [printable(name if names.count(name) == 1 else run) for name, run in zip(names, runs, strict=True)]


def table(columns: Iterable[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows (name, values) of some columns; what a column lacks is empty."""
    columns = list(columns)
    rows = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in rows]


def differences(settings: list[dict[str, object]]) -> list[tuple[str, list[str]]]:
    """Rows (key, values) of the settings in which runs differ, without those that only say where a run writes."""
    plain = [{key: json.dumps(value) for key, value in one.items() if key not in PLACES} for one in settings]
    return [(key, values) for key, values in table(plain) if len(set(values)) > 1]


def read_entry(run: Path, name: str) -> Entry:
    """What the page says of a run. Raises `UserError` if it is not one."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is not the folder of a run (no config.yaml): pass one like runs/photos")
    text, lines = (run / "config.yaml").read_text(), list(read_log(run / "log.jsonl"))
    config, starts = yaml.safe_load(text), [line["start"] for line in lines if "start" in line]
    shards = Path(config["data"]["path"])
    pictures = read_pictures(run, shards)
    faults = [line for line in lines if "skipped" in line or "damaged" in line]
    return Entry(
        name=name,
        stage="fine-tuning" if "augment" in config else "pretraining",
        facts=facts_of(config, starts),
        results=results(run, lines),
        commands=next_commands(run, config),
        figures=[picture for picture in pictures if picture.figure],
        pictures=[picture for picture in pictures if not picture.figure],
        preview=preview(shards),
        faults=[json.dumps(line) for line in faults[:MAX_FAULTS]],
        fault_count=len(faults),
        config=text,
        settings=flat(config),
        curves=Run(name, lines, starts[-1].get("steps_per_epoch", 0) if starts else 0),
    )
