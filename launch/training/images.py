"""The images that a run trains on. A collection is listed once: RUN/collection.npz keeps the list for all ranks."""

from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.log import say
from configs.schema import Data, Run
from data.catalog import Catalog, difference, read_catalog, write_catalog
from data.folder import Folder, is_collection, list_collection, open_folder, open_splits
from data.reading import Reading
from data.shard_index import read_index
from data.shards import Split
from launch.training.world import World, barrier, gather, process_errors


class Images:
    """Opens splits for a run. All ranks open the same ones, in the same order.

    `world` is None for a dry run, which writes nothing. A run that is `resumed` reads the list it has written.
    """

    def __init__(self, run: Run, world: World | None, resumed: bool):
        self.folder, self.world, self.resumed = Path(run.folder) / run.name, world, resumed
        self.catalogs: dict[str, Catalog] = {}

    def open(self, data: Data, names: Sequence[str], file: str = "collection.npz") -> list[Split | Folder]:
        """Open splits of `data.path`; the list of a collection is in RUN/`file`.

        Raises `UserError` if there is no such split, or a resumed run's images are others.
        """
        if is_collection(data.path) and data.path not in self.catalogs:
            self.catalogs[data.path] = self._catalog(data.path, self.folder / file)
        reading, catalog = Reading(max_pixels=data.max_pixels), self.catalogs.get(data.path)
        splits, problem = [], None
        try:
            splits = open_splits(data, names, reading, strict=True, catalog=catalog)
        except UserError as error:
            problem = str(error)
        if self.world:  # each rank has looked at its part of the shards
            problem = next(filter(None, gather(problem)), None)
        if problem:
            raise UserError(problem)
        return splits

    def split_names(self, data: Data) -> list[str]:
        """Names of the splits of `data.path`, which has been opened. Raises `UserError` if it cannot be read."""
        if catalog := self.catalogs.get(data.path):
            return [split or "train" for split in catalog.splits]
        return list(read_index(open_folder(data)).splits)

    def _catalog(self, source: str, path: Path) -> Catalog:
        if self.world is None:
            return list_collection(source)
        if self.world.first:
            self._write(source, path)
        with process_errors():
            barrier()
        if not path.exists():
            raise UserError(f"{path} of rank 0 is missing on another rank: run.folder must be shared by all nodes")
        return read_catalog(path)

    def _write(self, source: str, path: Path) -> None:
        """List the collection, unless the run that is resumed has done so."""
        old = read_catalog(path) if self.resumed and path.exists() else None
        if old and old.source == source:
            old.check_archives()
            say(f"{source}: {len(old.rows):,} images, listed in {path} when the run began")
            return
        new = list_collection(source)
        if old and (changed := difference(old, new)):
            problem = f"{source} has other images than {old.source}, with which the run began: {changed}"
            raise UserError(f"{problem}: restore them (cp -a keeps times), or start another --run.name")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_catalog(path, new)
