"""Checkpoints of a run: complete ones only.

    runs/NAME/checkpoints/step-00001234/
        engine/...       DeepSpeed's files: weights, optimizer, the loop's state
        manifest.json    step, ranks, configuration, and the size and digest of every file; written last
    runs/NAME/checkpoints/latest     name of the newest, for people and DeepSpeed's own scripts; nothing here reads it

A checkpoint is written under a temporary name; then, while training goes on, its files are synced and digested, the
manifest is written, and the folder renamed. A folder without a manifest that agrees with its files does not count.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Collection
from itertools import chain
from pathlib import Path

from configs.compare import differences
from configs.errors import UserError, reason
from configs.files import sha256, sync_folder, write_whole
from configs.log import say
from launch.training.engine import Engine, to_universal
from launch.training.world import World, agree, barrier, gather, peers

UNIVERSAL = ".universal"  # folder of a checkpoint that is being converted to another number of ranks


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: runs/NAME
        engine: whose weights and optimizer are saved and loaded
        identity: resolved configuration and digests of data and initial weights
        keep: how many checkpoints to keep, besides the best
        may_change: keys that may differ on resume; what data.path and init name is compared by its digest
    """

    def __init__(
        self, run: Path, engine: Engine, identity: dict, world: World, keep: int, may_change: Collection[str] = ()
    ):
        self.folder, self.keep, self.may_change = run / "checkpoints", keep, may_change
        self.engine, self.identity, self.world = engine, identity, world
        self.commit: threading.Thread | None = None
        self.failure: BaseException | None = None

    def save(self, step: int, state: dict, score: float | None = None) -> float:
        """Write a checkpoint after `step` optimizer steps; every rank calls this. Returns seconds that training waited.

        Args:
            state: the loop's own: plain values and tensors
            score: what the best checkpoint is best in
        Raises:
            UserError: it could not be written; the ones before stand
        """
        started = time.perf_counter()
        self.wait()
        part = _hidden(self.folder / f"step-{step:08}")
        try:
            if self.world.first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            with peers():
                barrier()
                self.engine.save(part, "engine", state)
                barrier()
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the disk says into a RuntimeError
            self._give_up(part, step, error)
        if self.world.first:
            about = {"step": step, "ranks": self.world.ranks, "score": score, "config": self.identity}
            self.commit = threading.Thread(target=self._commit, args=(part, about), name="checkpoint")
            self.commit.start()
        return time.perf_counter() - started

    def _commit(self, part: Path, about: dict) -> None:
        """Make a written checkpoint count. In a thread of the first rank, while training goes on."""
        try:
            files = {}
            for file in sorted(part.rglob("*")):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                    files[file.relative_to(part).as_posix()] = [file.stat().st_size, sha256(file)]
            write_whole(part / "manifest.json", json.dumps({**about, "files": files}, indent=1).encode())
            final = self.folder / f"step-{about['step']:08}"
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            sync_folder(self.folder)
            write_whole(self.folder / "latest", f"{final.name}/engine\n".encode())
            self._prune()
        except BaseException as error:
            self.failure = error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _prune(self) -> None:
        """Remove all checkpoints but the newest and the best."""
        manifests = {folder: _manifest(folder) for folder in self._folders()}
        whole = [folder for folder, manifest in manifests.items() if manifest]
        scored = [folder for folder in whole if manifests[folder]["score"] is not None]
        best = max(scored, key=lambda folder: (manifests[folder]["score"], folder.name), default=None)
        for folder in whole[: -self.keep]:
            if folder != best:
                gone = folder.rename(_hidden(folder))  # removed in one moment
                shutil.rmtree(gone)

    def check(self) -> None:
        """Raise what went wrong behind the back of the training; costs nothing."""
        if self.failure:
            failure, self.failure = self.failure, None
            if not isinstance(failure, OSError):
                raise failure
            self._give_up(self.folder, None, failure)

    def wait(self) -> None:
        """Until the last checkpoint counts. Raises `UserError` if it does not."""
        if self.commit:
            self.commit.join()
            self.commit = None
        self.check()

    def _give_up(self, path: Path, step: int | None, error: BaseException) -> None:
        """Raise the `UserError` of a checkpoint that could not be written; leave no part of it."""
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        before = [folder.name for folder in self._folders() if _manifest(folder)]
        stands = f"{before[-1]} stands" if before else "there is none before it"
        free = shutil.disk_usage(self.folder if self.folder.exists() else Path.cwd()).free
        if self.world.first and path != self.folder:
            shutil.rmtree(path, ignore_errors=True)
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else reason(error)
        if isinstance(error, RuntimeError) and free < 2**20:  # torch's writer does not say it in so many words
            why = "no space left on device"
        raise UserError(
            f"{self.folder}: {which} could not be written ({why}; {free / 1e6:,.0f} MB free), {stands}: "
            "free space or mend the disk, then the same command goes on"
        ) from error

    def _folders(self) -> list[Path]:
        """Whatever has the name of a checkpoint, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def resume(self, mode: str) -> tuple[int, dict]:
        """Load the newest complete checkpoint into the engine; every rank calls this.

        Args:
            mode: auto, must or never (see the schema)
        Returns:
            the number of optimizer steps done and the loop's state; (0, {}) for a fresh start
        Raises:
            UserError: the mode forbids it, none is complete, or it is of another configuration (with the difference)
        """
        if self.world.first:
            for left in (*self.folder.glob(".step-*.part"), self.folder / UNIVERSAL):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        found = json.loads(agree(json.dumps([folder.name for folder in self._folders()])))
        if found and mode == "never":
            raise UserError(
                f"--resume never, but {self.folder.parent} has checkpoints: choose another --run.name or delete it"
            )
        damaged = []
        for name in reversed(found):
            manifest = json.loads(agree(json.dumps(_manifest(self.folder / name))))
            harm = self._harm(name, manifest)
            if not harm:
                self._check_same(name, manifest)
                passed_over = f" (passed over: {'; '.join(damaged)})" if damaged else ""
                say(f"resuming from {self.folder / name}{passed_over}")
                return manifest["step"], self._load(name, manifest)
            damaged.append(f"{name}: {harm}")
        if mode == "must" or damaged:
            which = f" ({'; '.join(damaged)})" if damaged else ""
            raise UserError(f"{self.folder} has no complete checkpoint{which}; another --run.name starts afresh")
        return 0, {}

    def _harm(self, name: str, manifest: dict | None) -> str:
        """What is wrong with a checkpoint, the same on all ranks; each reads a part of its files."""
        if manifest is None:
            return "no manifest, or a file missing or of another size"
        mine = sorted(manifest["files"])[self.world.rank :: self.world.ranks]
        bad = [file for file in mine if not _as_listed(self.folder / name / file, *manifest["files"][file])]
        bad = sorted(chain.from_iterable(gather(bad)))
        return f"{', '.join(bad)} is not what was written" if bad else ""

    def _check_same(self, name: str, manifest: dict) -> None:
        """Raise `UserError` unless the checkpoint is of this configuration."""
        config = manifest["config"]
        if config.get("stage") != self.identity.get("stage"):
            raise UserError(
                f"{self.folder.parent} is a {config['stage']} run: choose another --run.name for "
                f"{self.identity['stage']}"
            )
        changed = [line for line in differences(config, self.identity) if line.split()[0] not in self.may_change]
        if changed:
            raise UserError(
                f"{self.folder / name} was made with another configuration ({'; '.join(changed)}): "
                "use the same, or another --run.name to start afresh"
            )

    def _load(self, name: str, manifest: dict) -> dict:
        """Load a checkpoint, first converted where it was made on another number of ranks."""
        stage, source = self.identity["optim"]["zero_stage"], self.folder / name
        if manifest["ranks"] == self.world.ranks or stage == 0:  # with stage 0 every rank holds everything
            return self.engine.load(source, "engine")
        if stage == 3:
            raise UserError(
                f"{source} was made on {manifest['ranks']} ranks, this is {self.world.ranks}: with optim.zero_stage 3 "
                "use as many (its conversion by DeepSpeed mixes up the weight decay of parameter groups)"
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


def _hidden(folder: Path) -> Path:
    """What a checkpoint is called while it is not yet, or no longer, complete."""
    return folder.with_name(f".{folder.name}.part")


def _manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest; None where it is damaged, or a file is missing or not of the size it lists."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, (size, _) in manifest["files"].items())
        return manifest if whole and {"step", "ranks", "score", "config"} <= manifest.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_listed(file: Path, size: int, digest: str) -> bool:
    try:
        return file.stat().st_size == size and sha256(file) == digest
    except OSError:
        return False
