"""The agent of a run's machine: torchrun's, started by `--restarts N`. It starts the ranks, and again if one is lost.

Agents of several machines meet in a store of the first one. They start with the machines that are there, and again when
one is lost or joins. Without the first one, the others wait for its return. What a restart cannot mend ends the run: a
mistake, a request to stop.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or machines keep the address of a first rank that is gone
logging.disable()  # torch's messages: what matters is printed here, in one line

from configs.errors import HUNG, INTERRUPTED, LOST, MISTAKE, SAVED, UserError, reason, run_main
from launch.restarts import Place, own_address

FINAL = {MISTAKE, SAVED, INTERRUPTED}  # exit codes that end the run
LATE_NODES = 30  # seconds to wait for more machines than the minimum
STORE_SECONDS = 30  # that the first machine may take to answer
RETURN_SECONDS, RETRY_SECONDS = 600, 5  # time for the first machine to return, and between two attempts to reach it
STOP_SECONDS = 100  # for the ranks to save when the agent is asked to stop
NAMES = {HUNG: "hung", LOST: "lost another process"}


def main() -> None:
    """Entry point: run the agent until the ranks have finished or cannot be restarted."""
    sys.exit(run_agent(Place(**json.loads(sys.argv[1])), sys.argv[2:]))


def run_agent(place: Place, command: list[str]) -> int:
    """Run the ranks of this machine, `command` being the script and its arguments. Returns the exit code.

    Raises:
        UserError: the machines do not meet, or the first one does not return
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from launch.training.world import free_port

    where, agent = f"{place.address}:{place.port or free_port()}", None
    with tempfile.TemporaryDirectory(prefix="agent-") as logs:
        try:
            agent = _join(place, where, command, logs)
            result = agent.run()
            with suppress(RendezvousError, DistError):
                agent.handler.shutdown()  # the other agents must not wait for this one
            return agent.ended_with if result.is_failed() else 0
        except SignalException as stop:
            return _code_of_stop(agent, stop.sigval)
        except RendezvousClosedError:
            raise UserError("the run has ended on another machine: see its output for the reason") from None
        except (RendezvousError, DistError) as error:
            problem = reason(error)
    if place.first:
        raise UserError(f"the machines did not meet at {where} ({problem}): start NODES of them, with this MASTER_ADDR")
    return _join_again(place, where, agent, command)


def _join(place: Place, where: str, command: list[str], logs: str):
    """An agent that has joined the store of the first machine."""
    import torch
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    ranks = torch.cuda.device_count() if place.ranks == "gpu" else int(place.ranks)
    if not ranks:
        raise UserError("RANKS is gpu, but torch sees no GPU: install a driver, or set RANKS to a number of processes")
    address = own_address(place)
    handler = get_rendezvous_handler(RendezvousParameters(
        "c10d", where, "restarts", place.min_nodes, place.max_nodes, address,
        is_host=place.first, last_call_timeout=LATE_NODES, timeout=600, read_timeout=STORE_SECONDS,
    ))  # fmt: skip
    spec = WorkerSpec(
        "rank", ranks, handler, sys.executable, args=("-u", *command), max_restarts=place.restarts,
        monitor_interval=0.5, local_addr=address,
    )  # fmt: skip
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    agent = _agent_class()(spec, DefaultLogsSpecs(logs), shutdown_timeout=STOP_SECONDS)
    agent.handler = handler
    return agent


def _join_again(place: Place, where: str, agent, command: list[str]) -> int:
    """Replace this process by a new agent, which tries to join again. Raises `UserError` if that took too long."""
    if agent and agent._pcontext:  # it has run
        place = replace(place, restarts=max(1, agent._remaining_restarts), lost=0.0)
    if not place.lost:
        place = replace(place, lost=time.time())
        minutes = f"for {RETURN_SECONDS // 60} minutes"
        print(f"no connection to the first machine at {where}: trying {minutes}", file=sys.stderr, flush=True)
    elif time.time() - place.lost > RETURN_SECONDS:
        raise UserError(
            f"no connection to the first machine at {where}, which all others need: if it is lost, run the same "
            "command on the machines that are left, with another MASTER_ADDR, to resume"
        )
    time.sleep(RETRY_SECONDS)
    # a new process, because threads of the old agent would go on to report to a store that comes back
    os.execv(sys.executable, [sys.executable, "-u", __file__, json.dumps(asdict(place)), *command])


def _agent_class() -> type:
    """torchrun's agent, which also says why it restarts, and does not where that cannot help."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        ended_with = 1  # exit code of the run if it fails

        def _monitor_workers(self, worker_group):
            result = super()._monitor_workers(worker_group)
            if result.is_failed():
                # later ones are those of ranks that were stopped because of the first
                rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
                self.ended_with = failure.exitcode if failure.exitcode > 0 else 1
                if failure.exitcode in FINAL:
                    self._remaining_restarts = 0
                else:
                    self._announce(rank, failure.exitcode)
            return result

        def _announce(self, rank: int, code: int) -> None:
            total, left = self._worker_group.spec.max_restarts, self._remaining_restarts
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            why = f"rank {rank} {NAMES.get(code, killed)}"
            line = f"restart {total - left + 1} of {total}: {why}" if left else f"error: {why}, after {total} restarts"
            print(line, file=sys.stderr, flush=True)

    return Agent


def _code_of_stop(agent, number: signal.Signals) -> int:
    """Exit code of a run that was asked to stop: that of a rank."""
    handlers = agent._pcontext.subprocess_handlers.values() if agent and agent._pcontext else ()
    codes = [handler.proc.returncode for handler in handlers]
    return next((code for code in codes if code and code > 0), 128 + number)


if __name__ == "__main__":
    run_main(main)
