"""What the system says of this machine and this process."""

import resource
import sys
from pathlib import Path

import psutil

CPU_INFO, STATUS = Path("/proc/cpuinfo"), Path("/proc/self/status")
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# files of a memory limit, of what is in use, and prefix of the file caches in memory.stat; by version
CGROUP_FILES = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}


def cpu_info(*names: str) -> str:
    """The first value of a field with one of these names in /proc/cpuinfo; empty if there is none."""
    return _field(CPU_INFO, *names)


def peak_memory() -> int:
    """The most bytes of memory that this process has held.

    Without VmHWM in /proc, as on macOS, the value includes the peak of the process that started this one.
    """
    if own := _field(STATUS, "VmHWM"):
        return int(own.removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(path: Path, *names: str) -> str:
    fields = (line.partition(":") for line in (path.read_text().splitlines() if path.exists() else ()))
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def available_memory() -> int:
    """Bytes that this process can still use without swapping: of the machine, and within the limits of its cgroups.

    A container, a SLURM job or a systemd unit is a cgroup. File caches count as available, because the kernel drops
    them.
    """
    return min([psutil.virtual_memory().available, *_cgroup_memory()])


def _cgroup_memory() -> list[int]:
    """Bytes left within each memory limit of this process's cgroups and of their parents."""
    left = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") or not controllers:
            version, root = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
            own = root / path.lstrip("/")  # does not exist in a container that sees its own cgroup as the root
            folders = [own, *own.parents]
            left += [_left(folder, version) for folder in folders[: folders.index(root) + 1]]
    return [count for count in left if count is not None]


def _left(folder: Path, version: int) -> int | None:
    """Bytes left in a cgroup; None if it has no limit."""
    limit_name, usage_name, prefix = CGROUP_FILES[version]
    try:
        limit, usage = ((folder / f"memory.{name}").read_text().strip() for name in (limit_name, usage_name))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # not a cgroup with a limit
        return None
    cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return None if limit == "max" else max(0, int(limit) - int(usage) + cached)
