"""A plan as a commented recipe, and its summary for the console."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from configs.errors import counted, printable
from configs.shell import command
from launch.plans.choices import Choices, Entries
from launch.plans.facts import Facts
from launch.plans.measure import Stage
from launch.training.memory import GIB

COLUMN = 36  # of the comments


def commands(plan: Path, choices: Choices, several: bool) -> list[str]:
    """The commands of a plan; `several` GPUs need a launcher."""
    launcher = "deepspeed" if several else "python"
    found = [command("pretrain/main.py", "--config", plan, launcher=launcher)]
    if choices.finetune:
        values = choices.pretrain.values()
        weights = Path("runs") / values["run.name"] / "fcmae.pt"
        found.append(command("finetune/main.py", "--config", plan, "--init", weights, launcher=launcher))
    return found


def recipe(facts: Facts, choices: Choices, stages: list[Stage], hardware: str, lines: list[str]) -> str:
    """The text of a plan: a recipe for both stages, with reasons. `lines` are its commands."""
    head = [f"A plan for {counted(facts.images, 'image')} by launch/plan.py: read it, edit it, run it."]
    head += [_titled(i, "Command", line) for i, line in enumerate(lines)]
    head.append(f"Hardware:  {hardware}; on other hardware, make another plan")
    head += [_titled(i, "Expect", f"{s.title} {duration(s.seconds)}, {s.size}") for i, s in enumerate(stages)]
    head.append("           the loss of pretraining starts at 1 to 2 and falls; see docs/guide/own-images.md")
    head += [_titled(i, "Measured", measured(stage)) for i, stage in enumerate(stages)]
    text = [f"# {line}" for line in head]
    text += _sections(choices.common, "")
    text += [
        "  # hflip: 0                        # where left and right differ, as in letters and chest X-rays",
        "  # vflip: 0.5                      # for images without a fixed orientation: aerial, microscopic",
    ]
    text += [
        "",
        "pretrain:  # with --init WEIGHTS of others, use their mean and std, or null",
        *_sections(choices.pretrain, "  "),
    ]
    if choices.finetune:
        text += ["", "finetune:  # channels, mean and std are those of --init", *_sections(choices.finetune, "  ")]
    else:
        text += ["", f"# {choices.problem}"]
    return "\n".join([*text, ""])


def _sections(entries: Entries, indent: str) -> Iterable[str]:
    """Lines of a block: keys without a section, then the sections, in the order of their first keys."""
    sections = defaultdict(list)
    for key, (value, why) in entries.keys.items():
        section, _, name = key.rpartition(".")
        sections[section].append((name, value, why))
    for section in sorted(sections, key=bool):  # stable
        inner = indent
        if section:
            yield f"{indent}{section}:"
            inner = f"{indent}  "
        for name, value, why in sections[section]:
            line = f"{inner}{name}: {_scalar(value)}"
            yield f"{line:<{COLUMN - 1}} # {why}" if why else line


def _scalar(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def measured(stage: Stage) -> str:
    """What the expected time and memory of a stage come from."""
    cost, unit = stage.cost, stage.unit
    memory = f"about {cost.room.need.bytes(cost.batch) / GIB:.2g} GiB"
    steps = f"{counted(cost.steps, 'step')} of {counted(cost.batch, unit)}, {memory}, {1 / cost.step:,.0f} {unit}s/s"
    return f"{stage.title}, {steps}; its loader {1 / cost.load:,.0f} {unit}s/s per core"


def _titled(number: int, title: str, text: str) -> str:
    """A line of the head; only the first of several has a title."""
    return f"{'' if number else title + ':':<10} {text}"


def summary(facts: Facts, choices: Choices, stages: list[Stage]) -> list[str]:
    """Lines for the console."""
    values = choices.common.values() | choices.pretrain.values()
    kind = {1: "grey", 3: "colour"}.get(facts.channels, f"{facts.channels} channels")
    numbers = [", ".join(f"{x:g}" for x in values[f"data.{key}"]) for key in ("mean", "std")]
    bits = "more than 8" if facts.deep else "8"
    stem = f"stem stride {values['model.stem_stride']}: {choices.common.keys['data.size'][1]}"
    lines = [
        f"images    {facts.images:,} of split {printable(facts.split)}, {kind}, {bits} bits",
        f"values    mean {numbers[0]}, std {numbers[1]}",
        f"size      {values['data.size']} pixels, {stem}",
        f"model     {values['model.name']}, {stages[0].cost.parameters / 1e6:.1f}M parameters with the decoder",
    ]
    lines += [f"time      {stage.title} {duration(stage.seconds)}: {stage.size}" for stage in stages]
    return lines if choices.finetune else [*lines, f"labels    {choices.problem}"]


def duration(seconds: float) -> str:
    """Seconds in words, rounded."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}" if seconds >= 10 * length else f"{seconds / length:.1f} {unit}"
    return f"{max(1, seconds):.0f} seconds"
