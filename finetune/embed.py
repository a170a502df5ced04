"""Write the features of images to a Parquet file, for search, curation or other tools.

python finetune/embed.py runs/photos/fcmae.pt photos/ photos.parquet                            a folder of images
python finetune/embed.py convnextv2_tiny.pth shards/photos photos.parquet --split train val     weights of any format
deepspeed finetune/embed.py runs/photos/fcmae.pt s3://bucket/shards/photos photos.parquet       on every GPU

One row per image, in order: name, split, sample (its number in the split), label, feature. The feature is the mean of
the last stage's tokens, as in finetune/probe.py; images are preprocessed as the weights record. Damaged images are
listed and left out. finetune/curate.py finds duplicates, outliers, a balanced subset or similar images in the file.
"""

import sys
from collections import ChainMap
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import track

from configs.checks import check_exists, check_new
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import argument, option, require
from configs.schema import Data, Optim, Run
from data.folder import check_images
from finetune.options import ImageOptions

if TYPE_CHECKING:
    from data.folder import Folder
    from data.shards import Split
    from finetune.feature_file import FeatureWriter
    from launch.training.world import World
    from models.opening import Trained


@dataclass(frozen=True)
class Options(ImageOptions):
    """The command line."""

    source: str = argument("images: a folder, a zip, a tar, a table of files, or shards or their URL")
    out: Path = argument("Parquet file to write")
    split: tuple[str, ...] = option(("train",), "splits to embed, in this order; a folder without splits is one")
    dtype: Literal["float32", "float16"] = option("float32", "type of the features in the file")
    batch: PositiveInt = option(64, "images per batch and rank")
    workers: NonNegativeInt | None = option(None, "loader processes per rank (default: its cores, at most 8)")

    def __post_init__(self):
        super().__post_init__()
        require(len(set(self.split)) == len(self.split), "--split", " ".join(self.split), "different splits")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_exists(options.weights)
    check_images(options.source)
    check_new(options.out)

    # slow imports, after parsing, so that --help and user errors are quick
    from data.folder import open_splits
    from data.reading import reading_of
    from finetune.feature_file import Origin, feature_file
    from launch.training.precision import precision
    from launch.training.world import destroy_world, init_world, process_errors
    from models.formats.containers import digest
    from models.opening import open_encoder

    trained = open_encoder(options.weights, options.ema, options.size)
    splits = open_splits(Data(options.source), options.split, options)
    if empty := next((images.name for images in splits if not len(images)), None):
        raise UserError(f"{options.source}, split {empty} has no images: choose another --split")
    world, width = init_world(Run(device=options.device)), trained.weights.arch.dims[-1]
    kind = precision(Optim(precision=options.precision), world.device)
    about = options.weights, digest(options.weights), options.ema, trained.preprocessing.size, kind
    origin = Origin(*about, options.source, reading_of(options))
    output = feature_file(options.out, width, options.dtype, origin) if world.first else nullcontext()
    skipped = 0
    with process_errors(), output as writer:
        for images in splits:
            skipped += write_features(trained, images, writer, kind, options, world)
    if world.first:
        print(f"wrote {options.out}: {writer.rows:,} images, {width} features each")
        if skipped:
            print(f"{skipped:,} damaged images left out, listed above")
    destroy_world()


def write_features(
    trained: "Trained", images: "Split | Folder", writer: "FeatureWriter | None", kind: str, options: Options,
    world: "World",
) -> int:  # fmt: skip
    """Write the rows of a split; only the first rank has a writer. `kind` is the precision.

    Returns the number of damaged images, which the first rank lists on standard error.
    """
    from data.folder import iterate_names
    from data.name_lists import escape_name
    from data.transforms import EvalTransform
    from finetune.embedding import embed, embedding_loader, label_names
    from launch.training.world import gather

    def progress(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    transform, channels = EvalTransform.of(trained.preprocessing), trained.preprocessing.channels
    data = Data(workers=options.workers, max_pixels=options.max_pixels)
    loader = embedding_loader(images, transform, channels, data, options.batch, world)
    all_names, damaged, lost = iterate_names(images), {}, {}
    for part in embed(trained, loader, world, kind, damaged, progress):
        if writer:
            names = {sample: escape_name(next(all_names)) for sample in range(part.start, part.stop)}
            kept = part.sample.tolist()
            labels = label_names(part.label, images.classes)
            writer.add([names[sample] for sample in kept], images.name, kept, labels, part.x.numpy())
            lost |= {sample: names[sample] for sample in names.keys() - set(kept)}
    errors = ChainMap(*gather(damaged))
    for sample in sorted(lost):
        print(f"left out: {lost[sample]}: {escape_name(errors[sample])}", file=sys.stderr)
    return len(lost)


if __name__ == "__main__":
    run_main(main)
