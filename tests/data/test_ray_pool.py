"""Ray: two nodes write the bytes of one process; killed workers, errors and Ctrl-C."""

import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from data import prepare
from data.pool import Pool, run_tasks
from tests.conftest import has, names, started
from tests.data.helpers import as_folder, collection
from tests.data.ray_tasks import double, fail, kill_always, kill_once
from tests.data.test_prepare import prepared

IMAGES = {**collection({"cat": 30, "dog": 20}), "dog/bad.jpg": b"\xff\xd8\xffdamaged"}


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def workers() -> list[psutil.Process]:
    """Ray's processes that are busy with a task of ours."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::_work"):
            found.append(process)
    return found


def wait_for_idle_workers() -> None:
    stop = time.monotonic() + 30
    while workers() and time.monotonic() < stop:
        time.sleep(0.1)
    assert not workers()


@pytest.mark.slow
def test_results_are_in_order(cluster, tmp_path):
    results = run_tasks(double, range(40), Pool(1, cluster), 40, tmp_path)
    assert [number for number, _ in results] == list(range(0, 80, 2))
    assert len({worker for _, worker in results}) == 2  # both nodes
    assert not names(tmp_path)


@pytest.mark.slow
def test_the_bytes_of_one_process(cluster, tmp_path, monkeypatch):
    """Paths are relative, and the workers were started elsewhere."""
    as_folder(IMAGES, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    prepared("photos", "one", "--shard-size", "4", "--resize", "12")
    prepared("photos", "two", "--shard-size", "4", "--resize", "12", "--ray", cluster)
    assert len(names(tmp_path / "one")) > 26 and files(tmp_path / "one") == files(tmp_path / "two")
    (tmp_path / "two/train-000002.tar").write_bytes(b"damaged")
    prepare.main(["photos", "two", "--shard-size", "4", "--resize", "12", "--repair", "--ray", cluster])
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_worker(cluster, tmp_path):
    done = run_tasks(partial(kill_once, folder=tmp_path), range(8), Pool(1, cluster), 8)
    assert done == list(range(8)) and names(tmp_path) == {"killed"}


@pytest.mark.slow
def test_a_task_that_kills_every_worker(cluster):
    with pytest.raises(UserError, match=r"died 4 times on a task .*run the same command again"):
        run_tasks(kill_always, range(1), Pool(1, cluster), 1)


@pytest.mark.slow
def test_workers_killed_while_shards_are_written(cluster, tmp_path):
    """SIGKILL of Ray's own processes, three times; then Ctrl-C, and the same command again."""
    source = as_folder(collection({"cat": 400}), tmp_path / "photos")
    options = ["--shard-size", "20", "--resize", "8"]
    prepared(source, tmp_path / "one", *options)
    words = ["data/prepare.py", "--no-plan", source, tmp_path / "two", *options, "--ray", cluster]
    process = started(tmp_path / "log", *words)
    killed, stop = 0, time.monotonic() + 120
    while killed < 3 and process.poll() is None and time.monotonic() < stop:
        if found := workers():
            found[0].kill()
            killed += 1
            time.sleep(0.3)
        time.sleep(0.01)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert killed == 3
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(cluster, tmp_path):
    source = as_folder(collection({"cat": 400}), tmp_path / "photos")
    options = ["--shard-size", "2", "--resize", "8"]
    prepared(source, tmp_path / "one", *options)
    words = ["data/prepare.py", "--no-plan", source, tmp_path / "two", *options, "--ray", cluster]
    process = started(tmp_path / "log", *words)
    stop = time.monotonic() + 120
    while not list(tmp_path.glob("two/.train-*.record.json")) and time.monotonic() < stop:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and has((tmp_path / "log").read_text(), "stopped by Ctrl-C")
    assert not (tmp_path / "two/index.json").exists()
    wait_for_idle_workers()
    process = started(tmp_path / "log", *words)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_an_error_of_a_task_stops_the_others(cluster, tmp_path):
    """The driver survives, also if it happens again and again."""
    for _ in range(5):
        with pytest.raises(UserError, match=r"^x\.tar is damaged: fetch it again$"):
            run_tasks(partial(fail, folder=tmp_path), [0, 1], Pool(1, cluster), 2)
        wait_for_idle_workers()
    with pytest.raises(FileNotFoundError) as error:
        run_tasks(partial(fail, folder=tmp_path), [0, 2], Pool(1, cluster), 2)
    assert error.value.filename == str(tmp_path / "absent" / "file")


@pytest.mark.slow
def test_a_folder_that_nodes_do_not_share(cluster, tmp_path, monkeypatch):
    from data import ray_pool

    monkeypatch.setattr(ray_pool.Path, "touch", lambda path: None)
    with pytest.raises(UserError, match=f"has another {tmp_path}: all nodes must share it"):
        run_tasks(double, range(2), Pool(1, cluster), 2, tmp_path)
    monkeypatch.setattr(ray_pool.Path, "cwd", lambda: "/nowhere/at/all")
    with pytest.raises(UserError, match="has no folder /nowhere/at/all: all nodes must share"):
        run_tasks(double, range(2), Pool(1, cluster), 2)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379", "ray://127.0.0.1:9", "photos/"])
def test_no_cluster(address, refused, tmp_path):
    pytest.importorskip("ray", reason="tests on Ray need it: pip install ray")
    line = refused(prepare.main, as_folder(IMAGES, tmp_path / "photos"), tmp_path / "out", "--ray", address)
    assert has(line, f"--ray {address} cluster ray start") and not (tmp_path / "out").exists()


def test_without_the_package(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "data.ray_pool", raising=False)
    line = refused(prepare.main, as_folder(IMAGES, tmp_path / "photos"), tmp_path / "out", "--ray")
    assert has(line, "--ray pip install ray")
