"""Signals to the watchdog. test_stopping.py tests hangs and dead launchers in real runs."""

import os
import signal
import time

import psutil
import pytest
import torch

from launch.training.watchdog import INTERVAL, REQUESTS, Watchdog
from launch.training.world import World

pytestmark = pytest.mark.xdist_group("clocks")  # one at a time: they have time limits


def test_one_ctrl_c_after_the_launcher_died_saves_and_does_not_end_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.training.watchdog.barrier", lambda: None)  # no process group here
    launcher = psutil.Popen(["true"])
    launcher.wait()
    watchdog = Watchdog(World(0, 1, torch.device("cpu")), tmp_path, 60)
    watchdog.launchers = [launcher]
    with watchdog:
        wait_for(lambda: watchdog.requested == 1)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: watchdog.requested == 1 + REQUESTS.index(signal.SIGINT))
        assert watchdog.thread.is_alive()


def wait_for(happens) -> None:
    end = time.monotonic() + 200 * INTERVAL
    while not happens():
        assert time.monotonic() < end
        time.sleep(INTERVAL / 10)
