"""The ranks of a run: process group, collectives, errors of other processes."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import Tensor

from configs.compare import differences
from configs.errors import LostLoader, LostPeer, LostProcess, UserError, reason
from configs.schema import Run
from launch.restarts import tasks_on_node
from launch.training.malloc import keep_memory
from launch.training.precision import exact_products
from models import kernels

# gloo raises a plain RuntimeError for a lost connection, and torch for a dead loader process: only their text tells
# them apart, which tests/launch/training/test_world.py pins for the installed version
GLOO_LOST = ("onnection closed by peer", "onnection reset by peer")
LOADER_DIED = "DataLoader worker"


@dataclass(frozen=True)
class World:
    """This process's place in a run."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def init_world(run: Run) -> World:
    """Join the process group of deepspeed, torchrun or srun; without their variables, start one of a single rank.

    Raises `UserError` if there is no GPU for device cuda, srun's tasks have no address, or other ranks do not connect.
    """
    kernels.use(run.kernels == "fused")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU: install a driver, or use auto or cpu")
    use_cuda = run.device != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"  # DeepSpeed's own choice may differ
    if "RANK" not in os.environ:
        os.environ |= _launcher_variables()
    rank, ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed LOCAL_SIZE
    local_ranks = int(os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(ranks))))
    if use_cuda:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show a task only its own GPU
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        prepare_cpu(run.kernels == "fused")
    if not _asked_threads(local_ranks):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    timeout = timedelta(minutes=run.hang_minutes + 10)  # later than the watchdog, which can name the late rank
    try:
        backend, bound = ("nccl", device) if use_cuda else ("gloo", None)
        torch.distributed.init_process_group(backend, timeout=timeout, device_id=bound)
    except torch.distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostProcess(
            f"rank {rank} of {ranks} could not connect to the others at {address} ({reason(error)[:120]}): start the "
            "same number of ranks on every node, with the same MASTER_ADDR and MASTER_PORT"
        ) from None
    return World(rank, ranks, device)


def _asked_threads(local_ranks: int) -> str | None:
    """OMP_NUM_THREADS as the user or DeepSpeed's --bind_cores_to_rank set it; None if they did not.

    torchrun sets 1 for several ranks, unless it was set: then torchrun itself was started with it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and local_ranks > 1:
        with suppress(psutil.Error):
            return psutil.Process(os.getppid()).environ().get("OMP_NUM_THREADS")
    return os.environ.get("OMP_NUM_THREADS")


def prepare_cpu(fused: bool) -> None:
    """Set up torch for training on a CPU: freed memory kept, the fastest exact products, the kernels compiled."""
    keep_memory()
    exact_products()
    if fused:
        kernels.compiled()  # now: it may take seconds


def destroy_world() -> None:
    """Leave the process group; torch warns at exit otherwise."""
    torch.distributed.destroy_process_group()


def _launcher_variables() -> dict[str, str]:
    """Variables that torchrun would set, derived from srun's if it started several tasks, else for one rank."""
    env = os.environ
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in env:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **address}
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            "srun started several tasks without an address to connect to: set MASTER_ADDR and MASTER_PORT, as "
            "launch/nodes/slurm.sh does"
        )
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", tasks))
    local = {"LOCAL_RANK": env["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": tasks_on_node(env, per_node)}
    return {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks, **local}


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_ranks_match(world: World, folder: Path, identity: dict) -> None:
    """Raise `UserError` on all ranks unless all have the same `identity` and see the same run.folder.

    `folder` is runs/NAME; its parent is created if missing.
    """
    token = folder.parent / f".{broadcast(secrets.token_hex(8))}"
    if world.first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier()
    by_rank = gather((token.exists(), identity))
    if world.first:
        token.unlink()
    for rank, (sees_token, other) in enumerate(by_rank):
        if changed := differences(by_rank[0][1], other):
            raise UserError(f"rank {rank} has another configuration or other data than rank 0: {'; '.join(changed)}")
        if not sees_token:
            raise UserError(
                f"rank {rank} does not see {folder.parent} of rank 0: run.folder must be shared by all nodes"
            )


@contextmanager
def process_errors() -> Iterator[None]:
    """Context manager: a lost connection to a rank becomes `LostPeer`, a dead loader process `LostLoader`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistBackendError) or any(text in str(error) for text in GLOO_LOST):
            raise LostPeer("another rank ended: see its output for the reason") from error
        if str(error).startswith(LOADER_DIED):  # raised by a signal handler, anywhere in the training
            raise LostLoader(error) from error
        raise


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    torch.distributed.all_reduce(values)
    return values


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over all ranks of scalars by name. Synchronises with the device."""
    total = sum_over_ranks(torch.stack(list(values.values()))) / torch.distributed.get_world_size()
    return dict(zip(values, total.tolist(), strict=True))


def gather(value: object) -> list:
    """The values of all ranks, in rank order, on all ranks. They are pickled: for small plain values, rarely."""
    values: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def broadcast(value: object) -> object:
    """The first rank's value, on all ranks; pickled."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


class Agreement:
    """Maximum over all ranks of integers such as requests to stop.

    A call returns the maxima of the previous call's `count` values, from an asynchronous reduction, so no rank waits.
    """

    def __init__(self, world: World, count: int):
        self.group = torch.distributed.new_group(backend="gloo") if world.ranks > 1 else None
        self.values, self.work = torch.zeros(count, dtype=torch.int64), None

    def __call__(self, *values: int) -> list[int]:
        """All ranks must call this equally often. A single rank gets its own values without delay."""
        if self.group is None:
            return [int(value) for value in values]
        if self.work:
            self.work.wait()
        agreed, self.values = self.values.tolist(), torch.tensor([int(value) for value in values])
        self.work = torch.distributed.all_reduce(self.values, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        return agreed
