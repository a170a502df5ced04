"""Checkpoints of a run: complete ones only.

    runs/NAME/checkpoints/step-00001234/
        engine/...       DeepSpeed's files: weights, optimizer, the loop's state
        manifest.json    step, ranks, configuration, and the size of every file; written last

A checkpoint is written under a temporary name, synced, and renamed; a folder without a manifest does not count.
"""

import json
import os
import shutil
from pathlib import Path

from configs.command import differences, say
from configs.errors import UserError
from configs.files import sync_folder, write_whole
from launch.engine import World, agree, barrier

MAY_CHANGE = {  # keys that may differ on resume: they do not change what is learnt
    "resume", "run.log_every", "run.picture_every", "run.save_every", "run.keep", "run.folder", "run.name",
    "run.kernels", "data.path", "data.workers", "init",
}  # fmt: skip  # the content behind data.path and init is compared by its digest


def save(engine, run: Path, step: int, state: dict, config: dict, world: World, keep: int) -> None:
    """Write a checkpoint after `step` optimizer steps; every rank calls this. Older ones than the last `keep` go.

    `state` is the loop's own (plain values and tensors), `config` the resolved configuration and data digest.
    """
    folder = run / "checkpoints"
    part, final = folder / f".step-{step:08}.part", folder / f"step-{step:08}"
    if world.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(part), tag="engine", client_state=state, save_latest=False)
    barrier()
    if world.first:
        sizes = {}
        for file in sorted(part.rglob("*")):
            if file.is_file():
                sizes[file.relative_to(part).as_posix()] = file.stat().st_size
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        manifest = {"step": step, "ranks": world.ranks, "config": config, "files": sizes}
        write_whole(part / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        sync_folder(folder)
        for old in complete(run)[:-keep]:
            shutil.rmtree(old)
    barrier()


def complete(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return [folder for folder in sorted((run / "checkpoints").glob("step-*")) if _manifest(folder) is not None]


def _manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest; None where a file is missing or not of the size it lists."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def resume(engine, run: Path, config: dict, mode: str, world: World) -> tuple[int, dict]:
    """Load the newest complete checkpoint into the engine.

    Args:
        mode: auto, must or never (see the schema)
    Returns:
        the number of optimizer steps done and the loop's state; (0, {}) for a fresh start
    Raises:
        UserError: the mode forbids it, none is complete, or it is of another configuration (with the difference)
    """
    found = sorted((run / "checkpoints").glob("step-*"))
    whole = complete(run)
    newest = agree(str(whole[-1]) if whole else "")
    if not newest:
        if mode == "must" or found:
            damaged = f"; incomplete: {', '.join(path.name for path in found)}" if found else ""
            raise UserError(
                f"{run / 'checkpoints'} has no complete checkpoint{damaged}; another --run.name starts afresh"
            )
        return 0, {}
    if mode == "never":
        raise UserError(f"--resume never, but {run} has checkpoints: choose another --run.name or delete the folder")
    skipped = [path.name for path in found if path.name > Path(newest).name]
    manifest = _manifest(Path(newest))
    if manifest["config"].get("stage") != config.get("stage"):
        raise UserError(
            f"{run} is a {manifest['config']['stage']} run: choose another --run.name for {config['stage']}"
        )
    changed = [line for line in differences(manifest["config"], config) if line.split()[0] not in MAY_CHANGE]
    if changed:
        raise UserError(
            f"{newest} was made with another configuration ({'; '.join(changed)}): "
            "use the same, or another --run.name to start afresh"
        )
    if manifest["ranks"] != world.ranks:
        raise UserError(f"{newest} was made on {manifest['ranks']} ranks, this is {world.ranks}: use as many")
    path, state = engine.load_checkpoint(newest, tag="engine")
    if path is None:
        raise UserError(f"{newest} could not be loaded: delete it to go on from the one before")
    say(f"resuming from {newest}" + (f" (incomplete, passed over: {', '.join(skipped)})" if skipped else ""))
    return manifest["step"], state
