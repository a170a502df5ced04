"""The agent of a run's machine: torchrun's, started by `--restarts N`. It starts the ranks, and again if one is lost.

Agents of several machines meet in a store of the first one. They start with the machines that are there, and again when
one is lost or joins. What a restart cannot mend ends the run: a mistake, a request to stop.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or machines keep the address of a first rank that is gone
logging.disable()  # torch's messages: what matters is printed here, in one line

from configs.errors import HUNG, INTERRUPTED, LOST, MISTAKE, SAVED, UserError, run_main
from launch.restarts import Place, own_address

FINAL = {MISTAKE, SAVED, INTERRUPTED}  # exit codes that end the run
LATE_NODES = 30  # seconds to wait for more machines than the minimum
STOP_SECONDS = 100  # for the ranks to save when the agent is asked to stop
NAMES = {HUNG: "hung", LOST: "lost another process"}


def main() -> None:
    """Entry point: run the agent until the ranks have finished or cannot be restarted."""
    place, command = Place(**json.loads(sys.argv[1])), sys.argv[2:]
    sys.exit(run_agent(place, command))


def run_agent(place: Place, command: list[str]) -> int:
    """Run the ranks of this machine, `command` being the script and its arguments. Returns the exit code.

    Raises:
        UserError: the machines do not meet, or the first one is lost
    """
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from launch.training.world import free_port

    ranks = torch.cuda.device_count() if place.ranks == "gpu" else int(place.ranks)
    if not ranks:
        raise UserError("RANKS is gpu, but torch sees no GPU: install a driver, or set RANKS to a number of processes")
    where = f"{place.address}:{place.port or free_port()}"
    address = own_address(place)
    parameters = RendezvousParameters(
        "c10d", where, "restarts", place.min_nodes, place.max_nodes, address,
        is_host=place.first, last_call_timeout=LATE_NODES, timeout=600,
    )  # fmt: skip
    agent = None
    with tempfile.TemporaryDirectory(prefix="agent-") as logs:
        try:
            handler = get_rendezvous_handler(parameters)
            spec = WorkerSpec(
                "rank", ranks, handler, sys.executable, args=("-u", *command), max_restarts=place.restarts,
                monitor_interval=0.5, local_addr=address,
            )  # fmt: skip
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
            agent = _agent_class()(spec, DefaultLogsSpecs(logs), shutdown_timeout=STOP_SECONDS)
            result = agent.run()
            with suppress(RendezvousError, DistError):
                handler.shutdown()  # the other agents must not wait for this one
            return agent.ended_with if result.is_failed() else 0
        except SignalException as stop:
            return _code_of_stop(agent, stop.sigval)
        except RendezvousClosedError:
            raise UserError("the run has ended on another machine: see its output for the reason") from None
        except (RendezvousError, DistError) as error:
            raise UserError(_cause(place, where, error)) from None


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


def _cause(place: Place, where: str, error: Exception) -> str:
    if place.first:
        return f"the machines did not meet at {where} ({error}): start NODES of them, with the same MASTER_ADDR"
    return (
        f"no connection to the first machine at {where}, which lists the others: if it is lost, run the same command "
        "on the machines that are left, with another MASTER_ADDR, to resume"
    )


if __name__ == "__main__":
    run_main(main)
