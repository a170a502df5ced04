"""Typed configuration of a run, its recipes and command line."""

import os

# Torch reads these on import, and loader processes and launched ranks inherit them.
# A lost connection to another rank would also print a C++ stack trace.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# OpenMP's threads wait for each other in a busy loop. Beside another busy process that takes the cores from the threads
# they wait for: a training step took ten times as long. After so many turns they sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
