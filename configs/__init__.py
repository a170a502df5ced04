"""Typed configuration of a run, its recipes and command line."""

import os

# torch reads this on import; otherwise a lost connection to another rank also prints a C++ stack trace
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
