"""Plan a pretraining and a fine-tuning: look at the images, choose a recipe, measure a few steps on this machine.

python launch/plan.py shards/photos                      -> shards/photos/plan.yaml
python launch/plan.py photos/ --out photos.yaml          images without shards: a folder, zip or tar

The plan is a recipe with a reason for each choice: read and edit it, then train with both stages' `--config`.
data/prepare.py makes one for its shards. Make another one on the machine that will train.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.checks import check_new
from configs.command import parse_options
from configs.errors import UserError, printable, run_main
from configs.files import write_atomic
from configs.keys import argument, option
from configs.log import say
from configs.schema import Data
from data.folder import is_collection
from data.remote import is_url
from data.shard_index import read_index
from data.shards import open_folder

BUSY = 1.5  # running processes per core


@dataclass(frozen=True)
class Options:
    """The command line."""

    source: str = argument("folder of shards or its URL; or a folder, zip or tar of images")
    out: Path | None = option(None, "file to write (default: SHARDS/plan.yaml, or NAME.plan.yaml for other sources)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "to plan for; auto = a GPU if there is one")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    source, local = options.source, not is_url(options.source)
    if not is_collection(source):
        read_index(open_folder(Data(source)))  # raises unless these are shards

    name = run_name(source)
    shards = local and not is_collection(source)
    out = options.out or (Path(source) / "plan.yaml" if shards else Path(f"{name}.plan.yaml"))
    check_new(out)
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"{out.parent} is read-only: choose another place with --out")
    make_plan(source, name, out, options.device)


def run_name(path: str) -> str:
    """Name of the runs on a collection: that of its folder, or of its file without the suffix."""
    if is_url(path) or not Path(path).is_file():
        return Path(path).absolute().name or "images"
    return Path(path).name.split(".")[0] or "images"


def make_plan(source: str, name: str, out: Path, wanted: str) -> None:
    """Look, choose, measure, write and print."""
    import torch  # slow imports, after the checks

    from launch.plans.choices import choose
    from launch.plans.facts import find_facts
    from launch.plans.measure import measure, start_device
    from launch.plans.text import commands, recipe, summary
    from launch.training.summary import hardware
    from pretrain.objectives import OBJECTIVES

    say(f"planning for {printable(source)}: looking at images")
    facts, images = find_facts(source)
    device, ranks = start_device(wanted)
    machine = hardware(device, ranks, torch.get_num_threads())
    choices = choose(facts, device.type, ranks, name, out)
    say(f"measuring a few steps on {machine}, 10 to 20 seconds")
    if os.getloadavg()[0] > BUSY * len(os.sched_getaffinity(0)):
        machine += ", busy with other work while measuring"
        say("this machine is busy: measuring takes longer, and the times are too long")
    stages = list(measure(facts, choices, images, device, ranks, OBJECTIVES))
    lines = commands(out, choices, ranks > 1)
    write_atomic(out, recipe(facts, choices, stages, machine, lines).encode())
    for line in summary(facts, choices, stages):
        say(f"  {line}")
    say(f"wrote {printable(out)}: the plan, a recipe with reasons; edit it if you know better")
    say(f"ready: {lines[0]}")
    for line in lines[1:]:
        say(f"then:  {line}")


if __name__ == "__main__":
    run_main(main)
