"""Find near-duplicates, outliers, a balanced subset, or similar images, by the features that finetune/embed.py wrote.

python finetune/curate.py photos.parquet duplicates.csv --duplicates 0.98 --sheet duplicates.png
python finetune/curate.py photos.parquet outliers.csv --outliers 100
python finetune/curate.py photos.parquet subset.csv --subset 10000
python finetune/curate.py photos.parquet similar.csv --nearest cat/0001.jpg --sheet similar.png

Writes a CSV file of names and scores. data/prepare.py takes it: `--without` for duplicates and outliers, `--only` for
a subset. Comparisons are exact. For a million images, use a GPU; memory is 4 bytes per image and feature.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt
from rich.console import Console
from rich.progress import track

from configs.checks import check_exists, check_parent, check_png, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import Share, argument, option
from configs.log import say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from finetune.feature_file import FeatureTable


@dataclass(frozen=True)
class Options:
    """The command line."""

    features: Path = argument("Parquet file that finetune/embed.py wrote")
    out: Path = argument("CSV file to write")
    duplicates: Share | None = option(
        None,
        "list images whose cosine similarity to an earlier image that remains is at least this",
    )
    outliers: PositiveInt | None = option(None, "list this many images, those farthest from their nearest images")
    subset: PositiveInt | None = option(None, "list this many images, as evenly as possible from all clusters")
    nearest: str | None = option(None, "list the images most similar to this one: a name in FEATURES, or a file")
    k: PositiveInt = option(10, "nearest images: averaged by --outliers, listed by --nearest")
    clusters: PositiveInt | None = option(None, "k-means clusters of --subset (default: square root of the images)")
    seed: int = option(0, "random seed of --subset")
    sheet: Path | None = option(None, "write a PNG of the first images of the list; duplicates beside what remains")
    source: str | None = option(None, "images of --sheet (default: as recorded in FEATURES)")
    weights: str | None = option(None, "weights for --nearest FILE (default: as recorded in FEATURES)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto = a GPU if available")

    def __post_init__(self):
        given = [value for value in (self.duplicates, self.outliers, self.subset, self.nearest) if value is not None]
        if len(given) != 1:
            raise UserError("give one of --duplicates, --outliers, --subset and --nearest (see --help)")


@dataclass(frozen=True)
class Listing:
    """What is written: rows of the feature file in the order of the list."""

    row: "np.ndarray"
    score: "np.ndarray"
    column: str = ""  # heading of one more column
    more: "list[str | int] | None" = None  # its values
    partner: "np.ndarray | None" = None  # rows to show beside these


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_exists(options.features, "a file that finetune/embed.py wrote")
    if options.out in (options.features, options.sheet):
        raise UserError(f"{options.out} is given twice: choose another name for OUT")
    if options.out:
        check_parent(options.out)
    if options.sheet:
        check_png(options.sheet)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("finetune/curate.py runs in one process: start it with python, not with a launcher")

    import torch  # slow imports, after parsing

    from data.name_lists import write_list
    from finetune.curation import unit_rows
    from finetune.feature_file import read_features

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU: use auto or cpu")
    table = read_features(options.features)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    x = unit_rows(table.x, torch.device("cuda" if on_gpu else "cpu"))
    listing = find(table, x, options)
    cells = sheet_cells(table, listing, options) if options.sheet else []
    columns = [[table.names[row] for row in listing.row], listing.score.astype(float).round(6).tolist()]
    columns.append([table.splits[row] for row in listing.row])
    more = [listing.column] if listing.more is not None else []
    columns += [listing.more] if more else []
    write_list(options.out, ["name", "score", "split", *more], zip(*columns, strict=True))
    say(f"wrote {options.out}: {len(listing.row):,} of {len(table.names):,} images")
    if cells:
        from data.sheets import Cell, Group, Sheet, write_sheet

        write_sheet(options.sheet, Sheet([Group("", [Cell(image, tuple(lines)) for image, *lines in cells])]))
        say(f"wrote {options.sheet}: {len(cells)} images")
    elif options.sheet:
        say(f"{options.sheet} not written: the list is empty")


def find(table: "FeatureTable", x: "Tensor", options: Options) -> Listing:
    """Run the search that the options choose. Raises `UserError` if there are too few images for it."""
    from finetune.curation import balanced_subset, find_duplicates, nearest_images, outlier_scores

    images = len(x)
    if options.duplicates:
        row, partner, score = find_duplicates(x, options.duplicates, progress)
        order = score.argsort(kind="stable")  # the least similar first: they show whether the threshold is right
        row, partner, score = row[order], partner[order], score[order]
        say(f"{len(row):,} near-duplicates of {len(set(partner.tolist())):,} images, the least similar first")
        return Listing(row, score, "remains", [table.names[i] for i in partner], partner)
    if options.outliers:
        if max(options.outliers, options.k + 1) > images:
            raise UserError(f"{options.features} has {images:,} images: lower --outliers, or --k (now {options.k})")
        scores = outlier_scores(x, options.k, progress)
        row = (-scores).argsort(kind="stable")[: options.outliers]
        return Listing(row, scores[row])
    if options.subset:
        if options.subset > images:
            raise UserError(f"{options.features} has {images:,} images: lower --subset {options.subset}")
        clusters = options.clusters or round(images**0.5)
        if clusters > images:
            raise UserError(f"{options.features} has {images:,} images: lower --clusters {clusters}")
        say(f"k-means of {images:,} images, {clusters:,} clusters")
        row, cluster, score = balanced_subset(x, options.subset, clusters, options.seed)
        return Listing(row, score, "cluster", cluster.tolist())
    row = row_of(table, options.nearest)
    query = x[row] if row is not None else embed_file(table, options).to(x.device)
    listing = Listing(*nearest_images(query, x, options.k, without=row))
    for i, score in zip(listing.row, listing.score, strict=True):
        say(f"{score:.6f} {table.names[i]}")
    return listing


def progress(steps: Iterable, number: int, what: str) -> Iterable:
    """A progress bar on standard error."""
    return track(steps, what, number, console=Console(stderr=True), show_speed=False)


def row_of(table: "FeatureTable", name: str) -> int | None:
    """The row of a name, as it is or escaped; None if there is none."""
    from data.name_lists import escape_name

    for known in (name, escape_name(name)):
        if (count := table.names.count(known)) > 1:
            say(f"{count} images have the name {known}: using the first")
        if count:
            return table.names.index(known)
    return None


def embed_file(table: "FeatureTable", options: Options) -> "Tensor":
    """Features [D] of the file of `--nearest`, length 1, computed as those in the table.

    Raises `UserError` if there is no such file, it is unreadable, or the weights are others.
    """
    import torch
    import torch.nn.functional as F

    from data.decode import decode
    from data.folder import read_image
    from data.transforms import EvalTransform
    from launch.training.feature_eval import mean_tokens
    from models.formats.hub import digest
    from models.opening import open_encoder

    path, weights = Path(options.nearest), options.weights or table.origin.weights
    if not path.is_file():
        raise UserError(f"{path} is neither a name in {options.features} nor a file: give one of them")
    check_weights(weights, "the weights that were embedded with, as --weights")
    if digest(weights) != table.origin.digest:
        raise UserError(f"{weights} differs from the weights of {options.features}: give those as --weights")
    trained = open_encoder(weights, table.origin.ema, table.origin.size)
    try:
        image = read_image(path, table.origin.reading)
        image = decode(image, trained.preprocessing.channels, max_pixels=table.origin.reading.max_pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    image = EvalTransform.of(trained.preprocessing)(image)["image"][None]
    x = mean_tokens(trained.model, image, 1, trained.mean, trained.std, table.origin.precision)[0]
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{weights} gives features that are not finite: use other weights")
    return F.normalize(x, dim=0)


def sheet_cells(table: "FeatureTable", listing: Listing, options: Options) -> list[tuple]:
    """Thumbnails with text of the first images of the list; each duplicate is followed by the image that remains.

    With `--nearest`, the image itself comes first.
    """
    from data.decode import decode
    from data.folder import read_image
    from data.name_lists import escape_name
    from data.remote import is_url
    from finetune.contact_sheet import MAX_CELLS, thumbnail, thumbnails

    source = options.source or table.origin.source
    if options.source is None and is_url(source):
        raise UserError(f"the images of {options.features} are behind a URL: give it as --source")
    rows, cells = [(i, f"{score:.6f}") for i, score in zip(listing.row, listing.score, strict=True)], []
    if listing.partner is not None:
        pairs = zip(rows, listing.partner, strict=True)
        rows = [cell for row, partner in pairs for cell in (row, (partner, "remains"))]
    if options.nearest and (own := row_of(table, options.nearest)) is not None:
        rows.insert(0, (own, "the image itself"))
    elif options.nearest:
        image = thumbnail(decode(read_image(Path(options.nearest), table.origin.reading)))
        cells.append((image, escape_name(options.nearest), "the image itself"))
    rows = rows[: MAX_CELLS - len(cells)]
    wanted = [(table.splits[i], table.samples[i], table.names[i]) for i, _ in rows]
    images = thumbnails(source, wanted, table.origin.reading)
    return cells + [(image, table.names[i], text) for image, (i, text) in zip(images, rows, strict=True)]


if __name__ == "__main__":
    run_main(main)
