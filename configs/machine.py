"""What Linux says of this machine."""

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_info(*names: str) -> str:
    """The first value of a field with one of these names in /proc/cpuinfo; empty if there is none."""
    fields = (line.partition(":") for line in (CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else ()))
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")
