"""The ranks of a run: joining them, and what they do together."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from configs.compare import differences
from configs.errors import LostPeer, UserError, reason
from configs.schema import Run
from launch.training.malloc import keep_memory
from models import kernels

# in the RuntimeError of gloo, which has no type of its own; NCCL's is a DistBackendError
LOST = ("onnection closed by peer", "onnection reset by peer")


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def start(run: Run) -> World:
    """Join the process group, as a launcher's variables say (deepspeed, torchrun, srun); alone where there are none.

    Args:
        run: device (auto, cpu or cuda), kernels, and how long ranks wait for each other
    Raises:
        UserError: cuda asked for and not there; tasks of srun that do not know each other
    """
    kernels.use(run.kernels == "triton")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU: install a driver, or use auto or cpu")
    use_cuda = run.device != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"  # else DeepSpeed picks, and may not agree
    if "RANK" not in os.environ:
        os.environ |= {key: str(value) for key, value in _place().items()}
    local, ranks_here = int(os.environ["LOCAL_RANK"]), os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    local_ranks = int(os.environ.setdefault("LOCAL_WORLD_SIZE", ranks_here))  # DeepSpeed says LOCAL_SIZE, torchrun this
    if use_cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())  # srun may show each task its own GPU only
    else:
        if local_ranks > 1 or "OMP_NUM_THREADS" not in os.environ:  # for several, torchrun says 1 whoever asks
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        keep_memory()
    patience = timedelta(minutes=run.hang_minutes + 10)  # the watchdog comes first: it knows who is waited for
    where = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
    try:
        kind, device = ("nccl", where) if use_cuda else ("gloo", None)
        torch.distributed.init_process_group(kind, timeout=patience, device_id=device)
    except torch.distributed.DistError as error:
        meeting = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {meeting} "
            f"({reason(error)[:120]}): start as many on every node, with the same MASTER_ADDR and MASTER_PORT"
        ) from None
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), where)


def check_alike(world: World, folder: Path, identity: dict) -> None:
    """Raise `UserError`, on all ranks, unless all have the same configuration and data, and see the same run folder.

    Args:
        folder: runs/NAME; its parent is made if it is not there
        identity: configuration and digests
    """
    token = folder.parent / f".{agree(secrets.token_hex(8))}"
    if world.first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier()
    found = gather((token.exists(), identity))
    if world.first:
        token.unlink()
    for rank, (seen, other) in enumerate(found):
        if changed := differences(found[0][1], other):
            raise UserError(f"rank {rank} has another configuration or other data than rank 0: {'; '.join(changed)}")
        if not seen:
            raise UserError(
                f"rank {rank} does not see {folder.parent} of rank 0: run.folder must be shared by all nodes"
            )


def _place() -> dict[str, object]:
    """What a launcher would set: from srun's variables if it started several tasks, else one rank alone."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks == 1 or "SLURM_PROCID" not in os.environ:
        return {
            "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()
        }  # fmt: skip
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError(
            "srun started several tasks that do not know each other: set MASTER_ADDR and MASTER_PORT, as "
            "launch/nodes/slurm.sh does"
        )
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", str(tasks)))
    return {
        "RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": here.split("(")[0].split(",")[0],  # written like 4(x2)
    }  # fmt: skip


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    torch.distributed.all_reduce(values)
    return values


def gather(value: object) -> list:
    """Each rank's value, on all ranks, in their order. For plain values, rarely: they are pickled."""
    values: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Agreement:
    """The greatest of all ranks' values, as they were one call before, so that asking waits for nobody.

    Args:
        count: values in a call
    """

    def __init__(self, world: World, count: int):
        self.group = torch.distributed.new_group(backend="gloo") if world.ranks > 1 else None
        self.values, self.work = torch.zeros(count, dtype=torch.int64), None

    def __call__(self, *values: int) -> list[int]:
        """Every rank calls this equally often. With one rank its own values come back at once."""
        if self.group is None:
            return [int(value) for value in values]
        if self.work:
            self.work.wait()
        agreed, self.values = self.values.tolist(), torch.tensor([int(value) for value in values])
        self.work = torch.distributed.all_reduce(self.values, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        return agreed


@contextmanager
def peers() -> Iterator[None]:
    """A context in which a connection lost to another rank is a `LostPeer`, and a dead loader process a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistBackendError) or any(words in str(error) for words in LOST):
            raise LostPeer("another rank ended: look at what it printed") from error
        if str(error).startswith("DataLoader worker"):  # torch raises this wherever the training is at that moment
            raise UserError(f"a loader process died ({reason(error)}): lower data.workers if memory ran out") from error
        raise


def agree(value: str) -> str:
    """The first rank's value, on all ranks: what one machine sees of a file system another may not see yet."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def stop() -> None:
    """Leave the process group, so that nothing complains at exit."""
    torch.distributed.destroy_process_group()
