"""Joining the process group, errors of other processes, agreement of ranks."""

import os
import signal
from unittest import mock

import pytest
import torch

from configs.errors import LostPeer, UserError
from configs.schema import Run
from launch.training import world
from tests.processes import on_ranks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """A shell's variables; changes by joining a group are undone."""
    with mock.patch.dict(os.environ):
        for name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "LOCAL_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            os.environ.pop(name, None)
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            del os.environ[name]
        yield


@pytest.fixture
def joined(monkeypatch):
    """Function that joins a group without waiting for the others, and returns the `World`."""

    def join() -> world.World:
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        monkeypatch.setattr(world, "keep_memory", lambda: None)
        return world.init_world(Run(device="cpu"))

    return join


def slurm(monkeypatch, **more):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", **more}.items():
        monkeypatch.setenv(name, value)


def test_alone(joined):
    here = joined()
    assert (here.rank, here.ranks, os.environ["MASTER_ADDR"]) == (0, 1, "127.0.0.1")


def test_tasks_of_srun(monkeypatch, joined):
    slurm(monkeypatch, MASTER_ADDR="gpu01", MASTER_PORT="29500", SLURM_STEP_TASKS_PER_NODE="4(x2)")
    here = joined()
    assert (here.rank, here.ranks) == (5, 8)
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("1", "4")


def test_tasks_of_srun_without_an_address(monkeypatch):
    slurm(monkeypatch)
    with pytest.raises(UserError, match=r"MASTER_ADDR.* MASTER_PORT.* launch/nodes/slurm\.sh"):
        world.init_world(Run(device="cpu"))


def test_a_shell_inside_a_slurm_job_is_alone(monkeypatch, joined):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert joined().ranks == 1


def test_a_lost_connection_and_a_dead_loader_process_are_user_errors():
    with pytest.raises(LostPeer, match="rank"), world.process_errors():
        raise RuntimeError("[gloo/pair.cc:545] Read error: Connection reset by peer")
    with (
        pytest.raises(UserError, match=r"loader process.*pid 7"),
        world.process_errors(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="a mistake"), world.process_errors():
        raise RuntimeError("a mistake")


def meet(rank: int, store: str) -> None:
    """One of two ranks: the second dies, and the first gets the error of a collective."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    if rank == 1:
        os._exit(0)
    try:
        with world.process_errors():
            world.barrier()
            world.barrier()
    except LostPeer:
        os._exit(42)


def test_a_rank_that_dies(tmp_path):
    """`process_errors` recognises the error text of the installed gloo."""
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=meet, args=(rank, str(tmp_path / "store"))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [42, 0]


class Deadly(torch.utils.data.Dataset):
    """Its second sample kills the process that loads it."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_loader_process_that_is_killed():
    """`process_errors` recognises the error text of the installed torch."""
    with pytest.raises(UserError, match="loader process"), world.process_errors():
        list(torch.utils.data.DataLoader(Deadly(), num_workers=1))


def test_an_error_of_nccl():
    with pytest.raises(LostPeer), world.process_errors():
        raise torch.distributed.DistBackendError("anything")


def test_one_rank_agrees_with_itself_at_once():
    agreement = world.Agreement(world.World(0, 1, torch.device("cpu")), 2)
    assert agreement(True, 3) == [1, 3] and agreement(0, 0) == [0, 0]


def agreed(rank: int) -> list[list[int]]:
    """Results of five calls of an agreement on two values, on one of two ranks."""
    agreement = world.Agreement(world.World(rank, 2, torch.device("cpu")), 2)
    mine = [(rank, 9 - rank), (5 * rank, 0), (0, 7 - 7 * rank), (2, 2), (0, 0)]
    return [agreement(*values) for values in mine]


def test_two_ranks_agree_on_the_maximum_of_the_call_before(tmp_path):
    """A call returns, on both ranks, the larger of the previous call's values; the first returns 0."""
    expected = [[0, 0], [1, 9], [5, 0], [0, 7], [2, 2]]
    assert on_ranks(2, agreed, tmp_path) == [expected, expected]


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], None),
        (
            [(True, {"data_digest": "b"})],
            "rank 1 .*data_digest a -> b",
        ),
        (
            [(True, {"data_digest": "a"}), (False, {"data_digest": "a"})],
            "rank 2 .*shared",
        ),
    ],
)
def test_ranks_with_another_configuration_or_folder(others, says, monkeypatch, tmp_path):
    monkeypatch.setattr(world, "broadcast", lambda value: value)
    monkeypatch.setattr(world, "barrier", lambda: None)
    monkeypatch.setattr(world, "gather", lambda value: [value, *others])
    here = world.World(0, 1 + len(others), torch.device("cpu"))
    if says:
        with pytest.raises(UserError, match=says):
            world.check_ranks_match(here, tmp_path / "run", {"data_digest": "a"})
    else:
        world.check_ranks_match(here, tmp_path / "run", {"data_digest": "a"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ranks", "asked", "torchrun", "set_to"),
    [
        ("1", None, None, [4]),
        ("1", "3", None, []),
        ("2", None, None, [2]),
        ("2", "3", None, []),
        ("2", "1", {}, [2]),  # torchrun's own
        ("2", "1", {"OMP_NUM_THREADS": "1"}, []),
    ],
)
def test_cores_are_divided_among_ranks_unless_omp_num_threads_is_set(monkeypatch, ranks, asked, torchrun, set_to):
    places = {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": ranks, "DS_ACCELERATOR": "cpu"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    if torchrun is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setattr(world.psutil.Process, "environ", lambda _: torchrun)
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(world, "keep_memory", lambda: None)
    monkeypatch.setattr(world.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    world.init_world(Run(device="cpu"))
    assert found == set_to


def test_a_rank_that_cannot_connect(monkeypatch):
    places = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)

    def wait(*_, **__):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 1000ms")

    monkeypatch.setattr(torch.distributed, "init_process_group", wait)
    monkeypatch.setattr(world, "keep_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=r"rank 1 of 2 .*127\.0\.0\.1:1 .*timed out.*MASTER_PORT"):
        world.init_world(Run(device="cpu"))
