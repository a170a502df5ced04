"""Kill ranks and machines of one run at random, and compare its result with that of an undisturbed run.

python -m tests.launch.soak FOLDER --kills 20

Two emulated machines with a rank each pretrain on digits (`configs/pretrain/digits.yaml`). A rank gets SIGKILL, or all
processes of the second machine do; its command is then started again, as a scheduler does. Needs root, for namespaces.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import run
from tests.launch.machines import ADDRESSES, Machine, two_machines
from tests.launch.training.helpers import logged, saved

PATIENCE = 600  # seconds for a restart on a busy machine


def words(shards: Path, folder: Path, *more: object) -> list[str]:
    """The command that each machine runs."""
    run = ["--data.path", shards, "--run.folder", folder.parent, "--run.name", folder.name]
    always = ["--data.workers", "1", "--run.device", "cpu", "--run.log_every", "1", "--run.save_minutes", ".05"]
    return ["bash", "launch/nodes/torchrun.sh", "pretrain/main.py", *map(str, [*run, *always, *more])]


def start(machine: Machine, number: int, command: list[str], nodes: str = "1:2", ranks: int = 1) -> psutil.Popen:
    """Start a machine's command; `number` is its own."""
    variables = {"NODES": nodes, "NODE_RANK": str(number), "MASTER_ADDR": ADDRESSES[0], "RANKS": str(ranks)}
    return machine.start(command, **variables)


def until(condition: Callable[[], object], machines: list[Machine], seconds: float = PATIENCE) -> float:
    """Wait for a condition; fails with the machines' output. Returns the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "\n".join(machine.text()[-2000:] for machine in machines)
        time.sleep(0.1)
    return time.monotonic() - started


def ranks_of(machine: Machine) -> list[psutil.Process]:
    """The processes of the ranks, without agent and loaders."""
    return [process for process in machine.processes() if _is_rank(process)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return parent is not None and any(word.endswith("agent.py") for word in parent.cmdline()[:4])
    except psutil.Error:
        return False


def soak(shards: Path, folder: Path, kills: int, *more: object, seed: int = 0) -> list[tuple[str, float]]:
    """Train `folder` with so many kills. Returns what was killed, and the seconds until the run has resumed."""
    draw, events = random.Random(seed), []
    command = words(shards, folder, "--restarts", 2 * kills, *more)
    with two_machines(folder.parent) as machines:
        first, second = machines
        main = start(first, 0, command)
        start(second, 1, command)
        last = 0
        for _ in range(kills):
            until(lambda: saved(folder) and saved(folder)[-1] > last, machines)  # noqa: B023
            time.sleep(draw.random())
            last, resumed = saved(folder)[-1], _resumed(machines)
            started, alive = time.monotonic(), [machine for machine in machines if ranks_of(machine)]
            if draw.random() < 0.3:
                what = "machine 1"
                second.die()
            else:
                victim = draw.choice(alive)
                what = f"rank of machine {machines.index(victim)}"
                ranks_of(victim)[0].kill()
            until(lambda: _resumed(machines) > resumed, machines)  # noqa: B023
            if what == "machine 1":
                start(second, 1, command)
            events.append((what, time.monotonic() - started))
            print(f"{len(events)} of {kills}: {what}, resumed after {events[-1][1]:.0f} s", flush=True)
        assert main.wait(PATIENCE) == 0, first.text()[-2000:]
    steps = [step for step, _ in logged(folder)]
    assert steps == list(range(1, len(steps) + 1)), "steps missing or repeated"
    return events


def _resumed(machines: list[Machine]) -> int:
    """How often the run has resumed."""
    return sum(machine.text().count("resuming from") for machine in machines)


def accuracy(shards: Path, folder: Path) -> float:
    """kNN top-1 (k = 20) of a run's encoder on the split val."""
    run("python", "finetune/probe.py", folder / "fcmae.pt", shards, "--out", folder / "probe.json")
    return json.loads((folder / "probe.json").read_text())["knn"]["20"]["top1"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    shards = given.folder / "digits"
    run("python", "data/prepare.py", "--no-plan", "digits", shards)
    events = soak(shards, given.folder / "killed", given.kills)
    quiet = words(shards, given.folder / "quiet")[2:]
    run("python", *quiet)
    seconds = sorted(seconds for _, seconds in events)
    print(f"{len(events)} kills; seconds until resumed: median {seconds[len(seconds) // 2]:.0f}, max {seconds[-1]:.0f}")
    for name in ("killed", "quiet"):
        print(f"{name}: loss {logged(given.folder / name)[-1][1]}, kNN {accuracy(shards, given.folder / name):.1%}")


if __name__ == "__main__":
    main()
