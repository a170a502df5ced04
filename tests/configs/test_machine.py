"""Free memory within the limits of cgroups, in files like the kernel's; peak memory of a process."""

import subprocess
import sys

import psutil
import pytest

from configs import machine
from tests.conftest import ROOT

GIB = 2**30
FREE = 64 * GIB  # of the machine


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Writes /proc/self/cgroup and files of cgroups: `kernel("0::/job", {"job/memory.max": 5})`."""

    def write(own: str, files: dict[str, object]) -> int:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return machine.available_memory()

    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": FREE}))
    return write


def group(folder: str, limit: object, used: int, stat: str = "anon 1\nactive_file 0\ninactive_file 0") -> dict:
    """The files of a cgroup, version 2."""
    return {f"{folder}/memory.{name}": value for name, value in (("max", limit), ("current", used), ("stat", stat))}


def test_without_cgroups_it_is_the_machines(kernel):
    assert kernel("", {}) == FREE
    assert kernel("0::/job", {}) == FREE  # the folder does not exist
    machine.OWN_CGROUPS.unlink()
    assert machine.available_memory() == FREE


def test_a_limit_less_what_is_used_and_cannot_be_dropped(kernel):
    stat = f"anon 9\nactive_file {GIB}\ninactive_file {2 * GIB}\nshmem 5"
    assert kernel("0::/job\n", group("job", 10 * GIB, 6 * GIB, stat)) == 7 * GIB
    assert kernel("0::/job\n", group("job", 10 * GIB, 11 * GIB)) == 0
    assert kernel("0::/job\n", group("job", "max", 6 * GIB)) == FREE
    assert kernel("0::/job\n", group("job", 100 * GIB, 6 * GIB)) == FREE  # of which the machine has less


def test_a_limit_of_a_parent_counts(kernel):
    assert kernel("0::/slice/job/step", {**group("slice/job", 8 * GIB, 0), **group("slice", 6 * GIB, 0)}) == 6 * GIB


def test_a_container_sees_its_own_cgroup_as_the_root(kernel):
    assert kernel("0::/host/path/of/it", group(".", 3 * GIB, GIB)) == 2 * GIB


def test_version_1(kernel):
    files = {"limit_in_bytes": 5 * GIB, "usage_in_bytes": 3 * GIB, "stat": f"cache 1\ntotal_inactive_file {GIB}"}
    own = "9:name=systemd:/x\n4:cpu,memory:/job\n0::/"
    assert kernel(own, {f"memory/job/memory.{name}": value for name, value in files.items()}) == 3 * GIB


def test_this_machine():
    assert 0 < machine.available_memory() <= psutil.virtual_memory().total


def test_peak_memory_is_not_that_of_the_process_that_starts_this_one():
    """The kernel hands the peak of getrusage on to a started program."""
    held = bytearray(b"1") * (GIB // 2)
    code = (
        "from configs.machine import peak_memory\n"
        f"before = peak_memory(); more = bytearray(b'1') * {GIB // 4}; print(before, peak_memory())"
    )
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, started.stdout.split())
    assert before < GIB // 4 < after < len(held) < machine.peak_memory()
