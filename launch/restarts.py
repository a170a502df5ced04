"""`--restarts N`: the command becomes torchrun's agent of its machine (launch/agent.py), which restarts lost ranks."""

import json
import os
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.command import dry_run, restarts
from configs.errors import UserError

AGENT = Path(__file__).with_name("agent.py")
# variables of the launcher that would confuse the ranks, whose agent sets their own
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")


@dataclass(frozen=True)
class Place:
    """This machine's place in a run that restarts by itself."""

    min_nodes: int
    max_nodes: int
    ranks: str  # of this machine; gpu = one per GPU
    first: bool  # keeps the list of the machines: without it, the others wait for its return
    address: str  # of the first machine
    port: int  # 0 = any, if it is the only machine
    restarts: int
    lost: float = 0.0  # time at which the connection to the first machine was lost; 0 = never


def start_agent(argv: list[str] | None = None) -> None:
    """With `--restarts N`, replace this process by the agent of its machine. Returns if the option is not given.

    Works under `deepspeed`, srun, launch/nodes/torchrun.sh and without a launcher. Those start a process for each rank:
    the first of a machine becomes the agent, the others exit.

    Raises:
        UserError: torchrun started this process, whose agent restarts ranks itself
    """
    argv = sys.argv[1:] if argv is None else argv
    number = restarts(argv)
    if not number or dry_run(argv) is not None:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "--restarts under torchrun, which restarts ranks itself: use launch/nodes/torchrun.sh, or torchrun "
            "--max-restarts instead"
        )
    env = os.environ
    if env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) != "0":
        sys.exit(0)
    place = find_place(env, number)
    kept = {key: value for key, value in env.items() if key not in OF_LAUNCHERS}
    words = [sys.executable, "-u", str(AGENT), json.dumps(asdict(place)), sys.argv[0], *_without_restarts(argv)]
    sys.stdout.flush()
    os.execve(sys.executable, words, kept)


def tasks_on_node(env: dict[str, str], per_node: str) -> str:
    """srun's tasks on this machine, from those on every machine as SLURM abbreviates them, like `4(x2),3`."""
    counts = [n for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
    return counts[int(env.get("SLURM_NODEID", "0"))]


def find_place(env: dict[str, str], number: int) -> Place:
    """The place that a launcher's variables describe: those of DeepSpeed, which torchrun.sh sets too, or of srun."""
    if "CROSS_SIZE" in env:
        low, _, high = env["CROSS_SIZE"].rpartition(":")
        first, ranks = env["CROSS_RANK"] == "0", env["LOCAL_SIZE"]
    elif "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
        low, high = "1", env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))
        first, ranks = (
            env.get("SLURM_NODEID", "0") == "0",
            tasks_on_node(env, env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        )
    else:
        low, high, first, ranks = "1", "1", True, "1"
    if not (high.isdecimal() and (low or "1").isdecimal() and 1 <= int(low or 1) <= int(high)):
        raise UserError(f"NODES is {env.get('CROSS_SIZE')}: use the number of machines, like 4, or MIN:MAX, like 2:4")
    if high == "1":
        return Place(1, 1, ranks, True, "127.0.0.1", 0, number)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise UserError(f"--restarts on {high} machines without {name}: set it, as launch/nodes/slurm.sh does")
    return Place(int(low or 1), int(high), ranks, first, env["MASTER_ADDR"], int(env["MASTER_PORT"]), number)


def own_address(place: Place) -> str:
    """The address of this machine from which it reaches the first one, so at which the others reach it."""
    try:
        found, *_ = socket.getaddrinfo(place.address, place.port or 1, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR is {place.address}: {error.strerror.lower()}; use a reachable name") from None


def _without_restarts(argv: list[str]) -> list[str]:
    """The words of the command for a rank."""
    words, rest = [], iter(argv)
    for word in rest:
        if word in ("--restarts", "--local_rank"):
            next(rest, None)
        elif not word.startswith(("--restarts=", "--local_rank=")):
            words.append(word)
    return words
