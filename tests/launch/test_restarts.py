"""`--restarts N`: the agent restarts lost ranks and nothing else; runs on one and on two emulated machines survive."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from configs.errors import HUNG, LOST, LostPeer, LostProcess, UserError, run_main
from configs.schema import Optim
from launch import restarts
from launch.restarts import Place, find_place, own_address, start_agent
from launch.training import spares
from tests.conftest import ROOT, environment, has
from tests.launch.machines import two_machines
from tests.launch.soak import ranks_of, soak, start, until, words
from tests.launch.training.helpers import SMALL, Job, logged, saved, train
from tests.processes import Process

# launch/agent.py is a command, which changes variables and the path of modules when it is imported
with mock.patch.dict(os.environ), mock.patch("sys.path", list(sys.path)), mock.patch("logging.disable"):
    import launch.agent as agent_module

SLOWED = "tc", "qdisc", "add", "dev", "wire", "root", "tbf", "rate", "1mbit", "burst", "16kb", "latency", "1s"
ALONE = Place(1, 1, "1", True, "127.0.0.1", 0, 2)
# a rank: its argument has a word for each attempt, which is an exit code, kill (of rank 0) or wait (for SIGTERM)
RANK = """
import os, signal, sys, time
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
print("attempt", attempt, "rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
what = sys.argv[1].split(",")[min(attempt, sys.argv[1].count(","))]
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
if what == "kill" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "kill":
    time.sleep(60)
sys.exit(int(what))
"""


def agent(tmp_path: Path, what: str, ranks: int = 1) -> tuple[Process, Path]:
    """A running agent whose ranks do `what`, and the file of its output."""
    script, out = tmp_path / "rank.py", tmp_path / "out"
    script.write_text(RANK)
    place = json.dumps(asdict(ALONE) | {"ranks": str(ranks)})
    return Process(["launch/agent.py", place, script, what], out, out, environment()), out


@pytest.mark.parametrize(
    ("what", "ranks", "code", "attempts", "says"),
    [
        ("kill,0", 2, 0, 2, "restart 1 of 2: rank 0 was killed by SIGKILL"),
        (f"{HUNG},1,{LOST}", 1, LOST, 3, "restart 1 of 2: rank 0 hung\nrestart 2 of 2: rank 0 failed with exit code 1\n"
         "error: rank 0 lost another process, after 2 restarts"),
        ("2,0", 1, 2, 1, ""),  # a mistake
        ("75,0", 1, 75, 1, ""),  # stopped and saved
    ],
)  # fmt: skip
def test_the_agent_restarts_what_was_lost_and_nothing_else(what, ranks, code, attempts, says, tmp_path):
    process, out = agent(tmp_path, what, ranks)
    assert process.wait(60) == code
    text = out.read_text()
    started = {line for line in text.splitlines() if line.startswith("attempt")}
    assert {line.split()[1] for line in started} == set(map(str, range(attempts)))
    notes = "\n".join(line for line in text.splitlines() if not line.startswith(("attempt", "waiting")))
    assert says in notes and (says or not notes) and "Traceback" not in text


def test_a_signal_to_the_agent_reaches_the_ranks(tmp_path):
    process, out = agent(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while not (out.exists() and "waiting" in out.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(15)
    assert process.wait(60) == 75 and "Traceback" not in out.read_text()


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(1, 1, "1", True, "127.0.0.1", 0, 3)),
        ({"CROSS_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": "4"}, Place(1, 1, "4", True, "127.0.0.1", 0, 3)),
        ({"CROSS_SIZE": "2:4", "CROSS_RANK": "1", "LOCAL_SIZE": "gpu"}, Place(2, 4, "gpu", False, "a", 9, 3)),
        (
            {"SLURM_PROCID": "8", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            Place(1, 2, "8", False, "a", 9, 3),
        ),
        (
            {"SLURM_PROCID": "10", "SLURM_NTASKS": "11", "SLURM_NNODES": "3", "SLURM_NODEID": "2",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"},
            Place(1, 3, "3", False, "a", 9, 3),
        ),
    ],
)  # fmt: skip
def test_the_place_that_launchers_describe(variables, place):
    assert find_place({"MASTER_ADDR": "a", "MASTER_PORT": "9", **variables}, 3) == place


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CROSS_SIZE": "many"}, "NODES many"),
        ({"CROSS_SIZE": "4:2"}, "NODES 4:2"),
        ({"CROSS_SIZE": "0"}, "NODES 0"),
        ({"CROSS_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_a_wrong_place(variables, says):
    with pytest.raises(UserError) as error:
        find_place({"CROSS_RANK": "0", "LOCAL_SIZE": "1", **variables}, 3)
    assert has(error.value, says)


def test_the_address_of_a_machine():
    assert own_address(ALONE) == "127.0.0.1"
    with pytest.raises(UserError, match=r"MASTER_ADDR is no\.such\.invalid"):
        own_address(Place(1, 2, "1", False, "no.such.invalid", 9, 3))


def test_the_command_becomes_the_agent(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(restarts.sys, "argv", ["pretrain/main.py"])
    for name in ("RANK", "LOCAL_RANK", "CROSS_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    start_agent(["--run.name", "x"])
    start_agent(["--restarts", "3", "--dry-run"])
    assert not calls
    monkeypatch.setenv("WORLD_SIZE", "1")
    start_agent(["--local_rank=0", "--run.name", "x", "--restarts", "3", "--optim.lr=1"])
    [(_, command, env)] = calls
    assert command[-4:] == ["pretrain/main.py", "--run.name", "x", "--optim.lr=1"] and "WORLD_SIZE" not in env
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        start_agent(["--restarts=3"])
    assert not end.value.code
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="under torchrun"):
        start_agent(["--restarts", "3"])


def test_how_long_the_others_wait_for_the_first_machine(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(agent_module.os, "execv", lambda *call: calls.append(json.loads(call[1][3])))
    monkeypatch.setattr(agent_module.time, "sleep", lambda _: None)
    there = Place(1, 2, "1", False, "a", 9, 3)
    agent_module._join_again(there, "a:9", None, ["x.py"])
    first = Place(**calls[-1])
    assert first.lost and first.restarts == 3 and has(capsys.readouterr().err, "no connection a:9 10 minutes")
    agent_module._join_again(first, "a:9", None, ["x.py"])
    assert Place(**calls[-1]) == first and not capsys.readouterr().err
    ran = mock.Mock(_remaining_restarts=2)
    agent_module._join_again(replace(first, lost=1.0), "a:9", ran, ["x.py"])  # it had joined again
    assert calls[-1]["restarts"] == 2 and calls[-1]["lost"] > first.lost - 1
    with pytest.raises(UserError, match=r"no connection.*MASTER_ADDR"):
        agent_module._join_again(replace(first, lost=1.0), "a:9", None, ["x.py"])


@pytest.mark.parametrize(("restartable", "error", "code"), [
    ("3", LostPeer, LOST), ("3", LostProcess, LOST), ("3", UserError, 2), ("0", LostPeer, 2), (None, LostProcess, 2),
])  # fmt: skip
def test_the_exit_code_tells_the_agent_what_a_restart_may_mend(restartable, error, code, monkeypatch, capsys):
    monkeypatch.setattr("configs.errors.LAUNCHER_SECONDS", 0)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restartable:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restartable)

    def fail():
        raise error("gone")

    with pytest.raises(SystemExit) as end:
        run_main(fail)
    assert end.value.code == code and capsys.readouterr().err == "error: gone\n"


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "recorded", "used"),
    [
        (512, 16, 32, None, 32),
        (512, 16, 24, None, 16),
        (512, None, 24, None, 16),
        (240, None, 7, None, 6),
        (512, 16, 24, 96, 24),
        (512, 16, 5, 96, 3),  # the run has a smaller batch, because it has few images
        (7, 4, 3, None, 3),  # none fits: the run says so itself
    ],
)
def test_ranks_that_the_batch_can_be_divided_among(batch, micro, ranks, recorded, used):
    assert spares.usable_ranks(Optim(batch_size=batch, micro_batch=micro), ranks, recorded) == used


def test_a_spare_rank_waits_for_the_end(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv(spares.SPARES, "1")
    monkeypatch.setattr(spares, "TIMEOUT", spares.timedelta(seconds=0.2))
    assert spares._wait() == LOST  # also if the first rank is gone
    spares.release_spares()
    assert spares._wait() == 0


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_a_killed_rank_then_a_killed_loader_then_a_frozen_rank(digits, tmp_path):
    """One run of three faults equals an undisturbed one bit for bit."""
    more = ["--data.workers", "1", "--run.hang_minutes", ".5"]
    with Job(digits, tmp_path / "run", 2, "--restarts", "3", *more, epochs=60) as job:
        for count, fault in enumerate(("killed by SIGKILL", "lost another process", "rank 0 hung"), 1):
            job.wait_for_step(8)
            done = saved(job.folder)[-1]
            victim = next(p for p in ranks_under(job) if p.environ()["RANK"] == "1")
            target = next(iter(victim.children())) if count == 2 else victim
            target.suspend() if count == 3 else target.kill()
            wait(job, f"restart {count} of 3: ")
            assert has(job.text(), fault)
            wait(job, None, lambda: saved(job.folder)[-1] > done)  # noqa: B023
        assert job.end(300) == 0 and not job.tracebacks()
    train(digits, tmp_path / "quiet", 2, *more, epochs=60)
    assert logged(tmp_path / "run") == logged(tmp_path / "quiet")


def ranks_under(job: Job) -> list:
    """The processes of a job's ranks now."""
    job.find()
    return [p for p in job.family if p.is_running() and "agent.py" in " ".join(p.parent().cmdline()[:3])]


def wait(job: Job, text: str | None, condition=None, seconds: float = 300) -> None:
    """Wait for a text in the output, or for a condition."""
    deadline = time.monotonic() + seconds
    while not (condition() if condition else text in job.text()):
        assert time.monotonic() < deadline and job.process.poll() is None, job.text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_mistake_is_not_repeated(digits, tmp_path):
    with Job(digits, tmp_path / "run", 2, "--restarts", "3", "--resume", "must") as job:
        assert job.end(300) == 2
        assert has(job.text(), "error: no complete checkpoint") and "restart 1" not in job.text()


def together(machines, digits, folder, *more: str) -> list:
    """A run on both machines, which has done some steps."""
    command = words(digits, folder, *SMALL, "--optim.epochs", "2000", "--restarts", "3", *more)
    running = [start(machine, i, command) for i, machine in enumerate(machines)]
    until(lambda: saved(folder) and logged(folder)[-1][0] > 8, machines)
    return [*running, command]


def trains_on(machines, folder) -> None:
    """Wait for ten more steps than now."""
    step = logged(folder)[-1][0]
    until(lambda: logged(folder)[-1][0] >= step + 10, machines)


def stop(machines, folder) -> None:
    """Stop the run with a signal to the first machine's agent; all that ran must have saved, no step is missing."""
    machines[0].started[0].terminate()
    assert machines[0].started[0].wait(120) == 75
    steps = [step for step, _ in logged(folder)]
    assert steps == list(range(1, len(steps) + 1)) and saved(folder)[-1] == steps[-1]
    assert not any("Traceback" in machine.text() for machine in machines)


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_a_lost_machine_then_its_return(digits, tmp_path):
    folder = tmp_path / "run"
    with two_machines(tmp_path) as machines:
        *_, command = together(machines, digits, folder)
        machines[1].die()
        until(lambda: has(machines[0].text(), "restart 1 of 3: converting from 2 to 1 ranks"), machines)
        trains_on(machines, folder)
        start(machines[1], 1, command)
        until(lambda: "from 1 to 2 ranks" in machines[0].text() + machines[1].text(), machines)
        trains_on(machines, folder)
        assert "restart 2" not in machines[0].text()  # a machine that joins does not count
        stop(machines, folder)


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_a_cut_link_then_its_return(digits, tmp_path):
    folder = tmp_path / "run"
    with two_machines(tmp_path) as machines:
        together(machines, digits, folder, "--run.hang_minutes", ".2")
        machines[1].cut()
        until(lambda: has(machines[0].text(), "restart 1 of 3: hung converting from 2 to 1 ranks"), machines)
        trains_on(machines, folder)
        machines[1].cut(down=False)
        until(lambda: "from 1 to 2 ranks" in machines[0].text() + machines[1].text(), machines)
        trains_on(machines, folder)
        stop(machines, folder)


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_a_slow_link_is_no_fault(digits, tmp_path):
    folder = tmp_path / "run"
    with two_machines(tmp_path) as machines:
        together(machines, digits, folder)
        for machine in machines:
            try:
                machine.ip(*SLOWED)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("no tbf in this kernel")
        trains_on(machines, folder)
        assert all(ranks_of(machine) for machine in machines)
        assert "restart 1" not in machines[0].text() + machines[1].text()
        stop(machines, folder)


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_the_first_machine_is_lost_and_returns(digits, tmp_path):
    folder = tmp_path / "run"
    with two_machines(tmp_path) as machines:
        *_, command = together(machines, digits, folder)
        machines[0].die()
        until(lambda: has(machines[1].text(), "no connection to the first machine"), machines)
        machines[0].started.clear()
        start(machines[0], 0, command)
        until(lambda: "resuming from" in machines[0].text() + machines[1].text(), machines)
        until(lambda: all(map(ranks_of, machines)), machines)
        trains_on(machines, folder)
        stop(machines, folder)


@pytest.mark.slow
@pytest.mark.xdist_group("clocks")
def test_random_kills(digits, tmp_path):
    assert len(soak(digits, tmp_path / "run", 2, *SMALL, "--optim.epochs", "100")) == 2


def test_the_torchrun_script_describes_the_machine(tmp_path):
    """With --restarts, it runs python with the variables that `find_place` reads; here of a stand-in."""
    (tmp_path / "launch/nodes").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "launch/nodes/torchrun.sh").write_text((ROOT / "launch/nodes/torchrun.sh").read_text())
    for name in ("python", "torchrun"):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\necho {name} $CROSS_RANK $CROSS_SIZE $LOCAL_SIZE $@\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    env = {"PATH": os.environ["PATH"], "NODES": "2:4", "NODE_RANK": "3", "MASTER_ADDR": "a", "RANKS": "8"}

    def output(*more: str) -> str:
        command = ["bash", tmp_path / "launch/nodes/torchrun.sh", "x.py", *more]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert output("--restarts", "3") == "python 3 2:4 8 x.py --restarts 3\n"
    assert output("--restarts=3") == "python 3 2:4 8 x.py --restarts=3\n"
    assert output().startswith("torchrun --nnodes 2:4 --node_rank 3") or "torchrun" in output()
