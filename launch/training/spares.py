"""Ranks that a run cannot use: the global batch must be divided evenly by the ranks that are left after a loss."""

import os
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import yaml
from torch.distributed import DistError, TCPStore

from configs.errors import LOST, UserError, restartable
from configs.log import say
from configs.schema import Finetune, Optim, Pretrain
from launch.training.world import World, init_world

SPARES, ENDED = "FCMAE_SPARE_RANKS", "run ended"  # variable of the ranks; key in the store of the first one
TIMEOUT = timedelta(days=365)


def start_world(config: Pretrain | Finetune) -> World:
    """Connect the ranks that the run can use; errors as `init_world`."""
    leave_spares(config)
    return init_world(config.run)


def leave_spares(config: Pretrain | Finetune) -> None:
    """In a run that restarts by itself, leave out ranks by which the global batch cannot be divided.

    Sets WORLD_SIZE for the others. A spare rank does not return: it waits for the end of the run, or for the agent to
    stop it when machines are lost or join.
    """
    if not restartable():
        return
    ranks = int(os.environ["WORLD_SIZE"])
    used = usable_ranks(config.optim, ranks, _recorded_batch(config))
    if used == ranks:
        return
    if int(os.environ["RANK"]) >= used:
        sys.exit(_wait())
    os.environ |= {"WORLD_SIZE": str(used), SPARES: str(ranks - used)}
    say(f"using {used} of {ranks} ranks: optim.batch_size {config.optim.batch_size} cannot be divided among more")


def usable_ranks(optim: Optim, ranks: int, recorded: int | None = None) -> int:
    """The largest number of `ranks` among which the global batch can be divided; `ranks` if there is none.

    A batch that is `recorded` for the run is smaller than the recipe's if there are few images.
    """
    few = recorded is not None and recorded < optim.batch_size
    for used in range(ranks, 0, -1):
        fitted = replace(optim, batch_size=recorded) if few else optim
        if few and isinstance(optim.micro_batch, int) and optim.micro_batch * used > recorded:
            fitted = replace(fitted, micro_batch=None)  # as `launch.training.fit.fit_batch` does
        with suppress(UserError):
            fitted.accumulation(used)
            return used
    return ranks


def release_spares() -> None:
    """Tell the spare ranks that the run is complete. The first rank calls this while its process group exists."""
    if int(os.environ.get(SPARES, "0")):
        _store().set(ENDED, "1")


def _wait() -> int:
    """Exit code of a spare rank."""
    try:
        store = _store()
        store.wait([ENDED], TIMEOUT)
    except (DistError, RuntimeError):  # the first rank is gone
        return LOST
    return 0


def _store() -> TCPStore:
    """The store of the first rank in which the process group meets."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, None, False, timedelta(minutes=5), wait_for_workers=False)


def _recorded_batch(config: Pretrain | Finetune) -> int | None:
    """The global batch of the run so far, which is smaller than the recipe's if there are few images."""
    try:
        recorded = yaml.safe_load((Path(config.run.folder) / config.run.name / "config.yaml").read_text())
        return int(recorded["optim"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
