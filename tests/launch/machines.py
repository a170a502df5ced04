"""Two emulated machines: network namespaces with a link between them, which can be slow or cut. Needs root and `ip`."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import BIN, ROOT

ADDRESSES = ("10.201.77.1", "10.201.77.2")


class Machine:
    """A namespace and the processes that were started in it. `out` is their output."""

    def __init__(self, name: str, address: str, out: Path):
        self.name, self.address, self.out, self.started = name, address, out, []

    def start(self, words: list[str], **variables: str) -> psutil.Popen:
        """Run a command on the machine."""
        env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", **variables}
        env |= {"GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}  # the machine's name is not in any DNS
        with self.out.open("a") as file:
            command = ["ip", "netns", "exec", self.name, *words]
            process = psutil.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

    def ip(self, *words: str) -> None:
        """Run a command that changes the machine's network."""
        subprocess.run(["ip", "netns", "exec", self.name, *words], check=True, capture_output=True)

    def processes(self) -> list[psutil.Process]:
        """All processes in the namespace."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        return [psutil.Process(int(pid)) for pid in found if psutil.pid_exists(int(pid))]

    def die(self) -> None:
        """Kill everything at once; the machine's connections are cut first, as by a lost machine."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.started:
            process.wait(30)

    def cut(self, down: bool = True) -> None:
        """Cut the link, silently: no packet gets through; or restore it."""
        self.ip("ip", "link", "set", "wire", "down" if down else "up")

    def text(self) -> str:
        """The output so far."""
        return self.out.read_text() if self.out.exists() else ""


@contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Two machines that reach each other at `ADDRESSES`; skips the test where they cannot be made."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and `ip`")
    names = [f"fcmae{os.getpid()}-{i}" for i in range(2)]
    machines = [
        Machine(name, address, folder / f"machine{i}.out")
        for i, (name, address) in enumerate(zip(names, ADDRESSES, strict=True))
    ]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces: {made.stderr.strip()}")
        wires = ("name", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        subprocess.run(["ip", "link", "add", *wires], check=True)
        for machine in machines:
            machine.ip("ip", "address", "add", f"{machine.address}/24", "dev", "wire")
            machine.ip("ip", "link", "set", "lo", "up")
            machine.ip("ip", "link", "set", "wire", "up")
        yield machines
    finally:
        for machine in machines:
            machine.die()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)
