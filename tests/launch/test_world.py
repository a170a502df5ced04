"""Which rank a process is, and what ranks do together."""

import pytest
import torch

from configs.errors import LostPeer, UserError
from configs.schema import Run
from launch import world


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def slurm(monkeypatch, **more):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", **more}.items():
        monkeypatch.setenv(name, value)


def test_alone():
    place = world._place()
    assert (place["RANK"], place["WORLD_SIZE"], place["MASTER_ADDR"]) == (0, 1, "127.0.0.1")


def test_tasks_of_srun(monkeypatch):
    slurm(monkeypatch, MASTER_ADDR="gpu01", MASTER_PORT="29500", SLURM_STEP_TASKS_PER_NODE="4(x2)")
    assert world._place() == {"RANK": "5", "WORLD_SIZE": 8, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_tasks_of_srun_that_do_not_know_each_other(monkeypatch):
    slurm(monkeypatch)
    with pytest.raises(UserError, match=r"set MASTER_ADDR and MASTER_PORT, as launch/nodes/slurm\.sh does"):
        world.start(Run(device="cpu"))


def test_a_shell_inside_a_slurm_job_is_alone(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert world._place()["WORLD_SIZE"] == 1


def test_what_other_ranks_do_to_this_one():
    with pytest.raises(LostPeer, match="another rank ended"), world.peers():
        raise RuntimeError("[gloo/pair.cc:545] Read error: Connection reset by peer")
    with (
        pytest.raises(UserError, match=r"a loader process died .DataLoader worker .pid 7. is killed by signal: Killed"),
        world.peers(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="a mistake"), world.peers():
        raise RuntimeError("a mistake")


def test_one_rank_agrees_with_itself_at_once():
    agreement = world.Agreement(world.World(0, 1, torch.device("cpu")), 2)
    assert agreement(True, 3) == [1, 3] and agreement(0, 0) == [0, 0]
