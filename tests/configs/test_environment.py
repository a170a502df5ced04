"""Variables that `configs` sets before torch is imported."""

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
STEP = """
import sys, time
import configs
import torch

torch.set_num_threads(2)
x, layer = torch.randn(2000, 128), torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(60)))
for _ in range(9):
    start = time.perf_counter()
    layer(x).sum().backward()
    print(time.perf_counter() - start, flush=True)
"""


def variables(**given: str) -> dict[str, str]:
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY after `import configs` in an environment."""
    code = (
        "import os, configs; print({k: v for k, v in os.environ.items() if k in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=CLEAN | given, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout)


def test_the_users_own_settings_stay():
    assert variables() == {"GOMP_SPINCOUNT": "1000"}
    assert variables(GOMP_SPINCOUNT="7") == {"GOMP_SPINCOUNT": "7"}
    assert variables(OMP_WAIT_POLICY="active") == {"OMP_WAIT_POLICY": "active"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="needs two cores of Linux")
def test_a_busy_neighbour_slows_a_step_little():
    """Two threads on two cores, one of them shared with a busy process. Spinning threads take 10 to 30 times."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    pin = {"preexec_fn": lambda: os.sched_setaffinity(0, cores)}

    def fastest() -> float:
        step = [sys.executable, "-c", STEP]
        done = subprocess.run(step, cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=True, **pin)
        return sorted(map(float, done.stdout.split()))[2]

    alone = fastest()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], **pin) as neighbour:
        try:
            beside = fastest()
        finally:
            neighbour.kill()
    assert beside < 5 * alone, (alone, beside)
