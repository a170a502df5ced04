"""Checkpoints of a run.

    runs/NAME/checkpoints/step-00001234/
        engine/...       DeepSpeed's files: weights, optimizer, the trainer's state
        manifest.json    step, ranks, configuration, size and digest of every file; written last
    runs/NAME/checkpoints/latest     name of the newest, for people and DeepSpeed's scripts; never read here

A checkpoint is written under a temporary name. A background thread then syncs and digests its files, writes the
manifest and renames the folder. A folder whose files do not match its manifest is not used.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from configs.compare import differences, with_defaults
from configs.errors import UserError, reason
from configs.files import sha256, sync_folder, write_atomic
from configs.log import say
from configs.schema import Run
from launch.training.engine import Engine, to_universal
from launch.training.summary import REPORT
from launch.training.world import World, barrier, broadcast, gather, process_errors

UNIVERSAL = ".universal"  # folder of a checkpoint that is being converted to another number of ranks


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: runs/NAME
        identity: resolved configuration, and digests of data and initial weights
        keep: number of checkpoints to keep, besides the best
        may_change: keys that may differ on resume
        defaults: of keys, which checkpoints of earlier versions may lack
    """

    def __init__(
        self, run: Path, engine: Engine, identity: dict, world: World, keep: int,
        may_change: Collection[str] = (), defaults: Mapping[str, object] = MappingProxyType({}),
    ):  # fmt: skip
        self.folder, self.keep, self.may_change, self.defaults = run / "checkpoints", keep, may_change, defaults
        self.engine, self.identity, self.world = engine, identity, world
        self.commit: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.epochs: int | None = None  # of the configuration of the checkpoint that was loaded

    def save(self, step: int, state: dict, score: float | None = None) -> float:
        """Write a checkpoint after `step` optimizer steps; all ranks call this. Returns the seconds that it blocked.

        `state` is the trainer's, plain values and tensors; the best checkpoint has the highest `score`. Raises
        `UserError` if it cannot be written; earlier checkpoints are unchanged.
        """
        started = time.perf_counter()
        self.wait()
        temporary = _temporary(self.folder / f"step-{step:08}")
        try:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            with process_errors():
                barrier()
                self.engine.save(temporary, "engine", state)
                barrier()
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._save_error(f"the checkpoint of step {step}", error) from error
        if self.world.first:
            about = {"step": step, "ranks": self.world.ranks, "score": score, "config": self.identity}
            self.commit = threading.Thread(target=self._commit, args=(temporary, about), name="checkpoint")
            self.commit.start()
        return time.perf_counter() - started

    def _commit(self, temporary: Path, about: dict) -> None:
        """Sync and digest a written checkpoint, and rename it. Runs in a thread of the first rank."""
        try:
            files = {}
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    files[path.relative_to(temporary).as_posix()] = [path.stat().st_size, sha256(path)]
            write_atomic(temporary / "manifest.json", json.dumps({**about, "files": files}, indent=1).encode())
            final = self.folder / f"step-{about['step']:08}"
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync_folder(self.folder)
            write_atomic(self.folder / "latest", f"{final.name}/engine\n".encode())
            self._prune()
        except BaseException as error:
            self.failure = error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        """Remove all complete checkpoints but the newest and the best."""
        complete = self._complete()
        scored = [(manifest["score"], folder) for folder, manifest in complete.items() if manifest["score"] is not None]
        _, best = max(scored, default=(None, None))
        for folder in list(complete)[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder.rename(_temporary(folder)))  # rename first: step-* is never partial

    def check(self) -> None:
        """Raise the error of a failed background commit; does not block."""
        if self.failure:
            failure, self.failure = self.failure, None
            raise self._save_error("a checkpoint", failure) if isinstance(failure, OSError) else failure

    def wait(self) -> None:
        """Wait for the background commit, and raise its error."""
        if self.commit:
            self.commit.join()
        self.check()

    def _save_error(self, what: str, error: OSError | RuntimeError) -> UserError:
        complete = [folder.name for folder in self._complete()]
        remaining = f"the newest is {complete[-1]}" if complete else "there is no earlier one"
        free = shutil.disk_usage(self.folder if self.folder.exists() else Path.cwd()).free
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else reason(error)
        if isinstance(error, RuntimeError) and free < 2**20:  # torch's writer hides the reason
            why = "no space left on device"
        return UserError(
            f"{self.folder}: {what} could not be written ({why}; {free / 1e6:,.0f} MB free), {remaining}: "
            "free space or repair the disk, then run the same command to resume"
        )

    def _complete(self) -> dict[Path, dict]:
        """Manifests of complete checkpoints by folder, oldest first; digests are not checked."""
        return {folder: manifest for folder in sorted(self.folder.glob("step-*")) if (manifest := _manifest(folder))}

    def resume(self, mode: str) -> tuple[int, dict]:
        """Load the newest intact checkpoint into the engine; all ranks call this. `mode` is auto, must or never.

        Returns:
            the number of optimizer steps done and the trainer's state; (0, {}) for a fresh start
        Raises:
            UserError: the mode forbids it, none is intact, or the configuration differs
        """
        if self.world.first:
            for leftover in (*self.folder.glob(".step-*.part"), self.folder / UNIVERSAL):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        names = sorted(folder.name for folder in self.folder.glob("step-*"))
        names = broadcast(names)  # a network file system may lag elsewhere
        if names and mode == "never":
            raise UserError(
                f"--resume never, but {self.folder.parent} has checkpoints: choose another --run.name or delete it"
            )
        damaged = []
        for name in reversed(names):
            manifest = broadcast(_manifest(self.folder / name))
            damage = self._find_damage(name, manifest)
            if not damage:
                self._check_same(name, manifest)
                skipped = f" (skipped: {'; '.join(damaged)})" if damaged else ""
                say(f"resuming from {self.folder / name}{skipped}")
                self.epochs = manifest["config"].get("optim", {}).get("epochs")
                return manifest["step"], self._load(name, manifest)
            damaged.append(f"{name}: {damage}")
        if mode == "must" or damaged:
            details = f" ({'; '.join(damaged)})" if damaged else ""
            way_out = "choose another --run.name to start anew"
            if not damaged:
                way_out = "correct --run.name, or leave out --resume to start anew"
            raise UserError(f"{self.folder} has no complete checkpoint{details}: {way_out}")
        if broadcast((self.folder.parent / REPORT).exists()):
            way_out = "choose another --run.name, or delete the folder to train anew"
            raise UserError(
                f"{self.folder.parent} is a finished run without checkpoints, so it cannot resume: {way_out}"
            )
        return 0, {}

    def _find_damage(self, name: str, manifest: dict | None) -> str:
        """Description of a checkpoint's damage, or an empty string; the ranks share the files and get the same."""
        if manifest is None:
            return "no valid manifest, or a file is missing or has another size"
        own = sorted(manifest["files"].items())[self.world.rank :: self.world.ranks]
        bad = [file for file, (_, digest) in own if _digest(self.folder / name / file) != digest]
        bad = sorted(chain.from_iterable(gather(bad)))
        return f"wrong digest of {', '.join(bad)}" if bad else ""

    def _check_same(self, name: str, manifest: dict) -> None:
        """Raise `UserError` unless the checkpoint has this run's configuration."""
        config = manifest["config"]
        if config.get("stage") != self.identity.get("stage"):
            other = f"choose another --run.name for {self.identity['stage']}"
            raise UserError(f"{self.folder.parent} is a {config['stage']} run: {other}")
        found = differences(*(with_defaults(values, self.defaults) for values in (config, self.identity)))
        changed = [line for line in found if line.split()[0] not in self.may_change]
        if changed:
            raise UserError(
                f"{self.folder / name} has another configuration ({'; '.join(changed)}): use the same, or choose "
                "another --run.name to start anew"
            )

    def _load(self, name: str, manifest: dict) -> dict:
        """Load a checkpoint, converted first if it is from another number of ranks. Returns the trainer's state."""
        optim, source = self.identity["optim"], self.folder / name
        whole = optim["zero_stage"] == 0 or optim.get("name") == "muon"  # no rank has written its part alone
        if manifest["ranks"] == self.world.ranks or whole:
            return self.engine.load(source, "engine")
        if optim["zero_stage"] == 3:
            raise UserError(
                f"{source} is from {manifest['ranks']} ranks, this run has {self.world.ranks}: with optim.zero_stage 3 "
                "use the same number (DeepSpeed's conversion mixes up the weight decay of parameter groups)"
            )
        say(f"converting {source} from {manifest['ranks']} to {self.world.ranks} ranks")
        target = self.folder / UNIVERSAL
        if self.world.first:
            to_universal(source / "engine", target / "engine")
        barrier()
        try:
            return self.engine.load(target, "engine", universal=True)
        finally:
            barrier()
            if self.world.first:
                shutil.rmtree(target)


def recorded_optim(run: Run, stage: str) -> dict:
    """Section `optim` of the newest complete checkpoint of a run, as the first rank sees it; all ranks call this.

    Empty if there is no checkpoint, or if it is of another stage.
    """
    folder = Path(run.folder) / run.name / "checkpoints"
    manifests = map(_manifest, sorted(folder.glob("step-*"), reverse=True))
    config = next(filter(None, manifests), {"config": {}})["config"]
    return broadcast(config["optim"] if config.get("stage") == stage else {})


def _temporary(folder: Path) -> Path:
    """Name of a checkpoint's folder while it is written or removed."""
    return folder.with_name(f".{folder.name}.part")


def _manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest; None if it is damaged, or if a file is missing or has another size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        sizes_match = all((folder / name).stat().st_size == size for name, (size, _) in manifest["files"].items())
        return manifest if sizes_match and {"step", "ranks", "score", "config"} <= manifest.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:
        return None
