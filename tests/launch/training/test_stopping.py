"""Signals, dead launchers, dead and frozen ranks: one save if possible, no orphans, the culprit named."""

import signal
import time

import psutil
import pytest

from configs.errors import HUNG, INTERRUPTED, SAVED
from tests.conftest import has
from tests.launch.training.helpers import Job, logged, saved

pytestmark = pytest.mark.xdist_group("clocks")  # one at a time: they have time limits


def check_saved(job: Job, by: str) -> None:
    """One checkpoint at the last logged step, and no other within an epoch."""
    last = logged(job.folder)[-1][0]
    assert saved(job.folder)[-1] == last and last >= 8
    assert len([step for step in saved(job.folder) if step % 6]) == (last % 6 > 0)
    assert has(job.text(), f"stopped: {by} saved") and not job.tracebacks()


@pytest.mark.parametrize(
    ("ranks", "number", "by", "code"),
    [
        (2, signal.SIGTERM, "SIGTERM", SAVED),
        pytest.param(2, signal.SIGUSR1, "SIGUSR1", SAVED, marks=pytest.mark.slow),
        (0, signal.SIGINT, "Ctrl-C", INTERRUPTED),
        pytest.param(0, signal.SIGTERM, "SIGTERM", SAVED, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGUSR1, "SIGUSR1", SAVED, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_a_rank_saves_once_and_resumes(ranks, number, by, code, digits, tmp_path):
    with Job(digits, tmp_path / "run", ranks, "--data.workers", "1") as job:
        job.wait_for_step(8)
        (job.rank(1) if ranks else job.process).send_signal(number)
        assert job.end() == code
        check_saved(job, by)
        stopped = saved(job.folder)[-1]
    with Job(digits, tmp_path / "run", ranks, "--resume", "must") as job:
        job.wait_for_step(stopped + 2)
        assert f"step-{stopped:08}" in job.text()
        steps = [step for step, _ in logged(job.folder)]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("to", "number", "code"),
    [
        ("launcher", signal.SIGTERM, 1),  # DeepSpeed's launcher has its own exit code
        pytest.param("group", signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(
            "group", signal.SIGINT, None, marks=pytest.mark.slow
        ),  # `deepspeed` dies of it or passes on its launcher's code
        pytest.param("launcher", signal.SIGKILL, 0, marks=pytest.mark.slow),  # so does `deepspeed`
        pytest.param("command", signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("command", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_saves_and_leaves_no_orphans(to, number, code, digits, tmp_path):
    with Job(digits, tmp_path / "run", 2, "--data.workers", "1") as job:
        job.wait_for_step(8)
        targets = {"launcher": [job.launcher()], "command": [job.process], "group": job.family}[to]
        for target in targets:
            target.send_signal(number)
        assert job.end() in ((1, -signal.SIGINT) if code is None else (code,))
        check_saved(job, "Ctrl-C" if number == signal.SIGINT else "SIGTERM")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_all_within_30_seconds(rank, digits, tmp_path):
    with Job(digits, tmp_path / "run", 2, "--data.workers", "1") as job:
        job.wait_for_step(8)
        before = time.monotonic()
        job.rank(rank).kill()
        assert job.end() != 0
        assert time.monotonic() - before < 30
        assert not job.tracebacks()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named(rank, digits, tmp_path):
    with Job(digits, tmp_path / "run", 2, "--run.hang_minutes", ".2") as job:
        job.wait_for_step(8)
        job.rank(rank).suspend()
        assert job.end(90) in (HUNG, 1)
        other = 1 - rank
        says = f"rank {rank} answer"
        errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith(f"error: [rank {other}] ") and has(errors[0], says)
        assert "launch/training" in (job.folder / f"hang-rank{other}.txt").read_text()


@pytest.mark.slow
def test_a_run_that_was_suspended_as_a_whole_goes_on(digits, tmp_path):
    """Ctrl-Z and fg: a suspended process does not count as hung."""
    with Job(digits, tmp_path / "run", 0, "--run.hang_minutes", ".1") as job:
        job.wait_for_step(8)
        psutil.Process(job.process.pid).suspend()
        time.sleep(15)
        last = logged(job.folder)[-1][0]
        psutil.Process(job.process.pid).resume()
        job.wait_for_step(last + 20)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "suspend"])
def test_a_loader_process_that_dies_or_hangs_is_an_error(fault, digits, tmp_path):
    with Job(digits, tmp_path / "run", 2, "--run.hang_minutes", ".1", "--data.workers", "1") as job:
        job.wait_for_step(8)
        getattr(job.rank(1).children()[0], fault)()
        code = job.end(90)
        if fault == "kill":
            assert code == 2 and has(job.text(), "error: [rank 1] loader process")
        else:
            assert code == HUNG and has(job.text(), "rank 1 data")
        assert not job.tracebacks()
