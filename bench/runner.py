"""Run the project's commands once each, and keep what they found."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.options import RESULTS
from configs.errors import UserError
from configs.files import write_atomic


class Runner:
    """The runs of one experiment; finished ones are not repeated.

    Args:
        name: of the experiment
        dry: only print the commands
        save: also copy the results to bench/results, from which docs/results.md is generated
    """

    def __init__(self, name: str, dry: bool, save: bool):
        self.runs, self.dry = Path(f"runs/evidence-{name}"), dry
        self.saved = RESULTS / name if save else None

    def run(self, name: str, result: str, *words: object, keep: tuple[str, ...] = ()) -> dict:
        """Run a command unless it is done; the JSON that it wrote to RUNS/`result`: the keys in `keep`, () = all."""
        done = self.runs / f"done/{name}.json"
        if done.exists() and json.loads(done.read_text())["command"] != shown(words):
            raise UserError(f"{done} is of another command: remove it to run {name} again")
        if not done.exists():
            command = self.call(*words)
            if self.dry:
                return {"best": {"top1": 0.0, "miou": 0.0, "ap50": 0.0}}
            written = json.loads((self.runs / result).read_text())
            written = {"command": command} | {key: written[key] for key in keep or written}
            done.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(done, (json.dumps(written, indent=1) + "\n").encode())
        if self.saved:
            self.saved.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(done, self.saved / done.name)
        return json.loads(done.read_text())

    def call(self, *words: object) -> str:
        """Print a command, run it unless this is a dry run, and return it. Exits if the command fails."""
        command = shown(words)
        print(f"\033[1m$ {command}\033[0m", flush=True)
        if not self.dry and (code := subprocess.run([sys.executable, *map(str, words)], check=False).returncode):
            sys.exit(code)  # the command has printed why
        return command

    def train(self, stage: str, recipe: str, shards: Path, name: str, *more: object) -> dict:
        """Train as a run of this name, and return its summary."""
        words = ("--config", f"configs/{stage}/{recipe}.yaml", "--data.path", shards)
        words += ("--run.folder", self.runs, "--run.name", name, *more)
        return self.run(name, f"{name}/summary.json", f"{stage}/main.py", *words)

    def best_rate(self, rates: tuple[float, ...], score: Callable[[float], float]) -> float:
        """The learning rate with the best score. While it is the first or last, half or twice of it is tried too."""
        rates = list(rates)
        while True:
            scores = {rate: score(rate) for rate in rates}
            best = max(rates, key=scores.get)
            if self.dry or best not in (min(rates), max(rates)):
                return best
            rates.append(best / 2 if best == min(rates) else best * 2)


def shown(words: Iterable[object]) -> str:
    """A command as it is recorded."""
    return shlex.join(["python", *map(str, words)])


def run_name(start: str, share: float, rate: float, seed: int) -> str:
    """Name of a fine-tuning."""
    return f"{start}-labels-{share:g}-lr-{rate:g}-seed-{seed}"
