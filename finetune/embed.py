"""Write the features of images to a Parquet file, for search, curation or other tools.

python finetune/embed.py runs/photos/fcmae.pt photos/ photos.parquet                            a folder of images
python finetune/embed.py convnextv2_tiny.pth shards/photos photos.parquet --split train val     weights of any format
deepspeed finetune/embed.py runs/photos/fcmae.pt s3://bucket/shards/photos photos.parquet       on every GPU
python finetune/embed.py runs/photos/fcmae.pt shards/photos photos.parquet --ray                on a Ray cluster

One row per image, in order: name, split, sample (its number in the split), label, feature. The feature is the mean of
the last stage's tokens, as in finetune/probe.py; images are preprocessed as the weights record. Damaged images are
listed and left out. finetune/curate.py finds duplicates, outliers, a balanced subset or similar images in the file.
"""

import sys
from collections import ChainMap
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from rich.console import Console
from rich.progress import track

from configs.checks import check_new, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.log import say
from configs.schema import Data, Optim, Run
from data.folder import check_images
from finetune.options import EmbedOptions

if TYPE_CHECKING:
    from data.folder import Folder
    from data.shards import Split
    from finetune.feature_file import FeatureWriter
    from launch.training.world import World
    from models.opening import Trained


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(EmbedOptions, __doc__, argv)
    check_weights(options.weights)
    check_images(options.source)
    check_new(options.out)
    if options.ray:
        from data.ray_pool import find_cluster  # optional

        find_cluster(options.ray)

    # slow imports, after parsing, so that --help and user errors are quick
    from data.folder import open_splits
    from launch.training.precision import precision
    from launch.training.world import destroy_world, init_world, process_errors
    from models.opening import open_encoder

    trained = open_encoder(options.weights, options.ema, options.size)
    splits = open_splits(Data(options.source), options.split, options)
    if empty := next((images.name for images in splits if not len(images)), None):
        raise UserError(f"{options.source}, split {empty} has no images: choose another --split")
    if options.ray:
        embed_on_ray(trained, splits, options)
        return
    world = init_world(Run(device=options.device))
    kind, skipped = precision(Optim(precision=options.precision), world.device), 0
    output = open_output(trained, kind, options) if world.first else nullcontext()
    with process_errors(), output as writer:
        for images in splits:
            skipped += write_features(trained, images, writer, kind, options, world)
    if world.first:
        report(writer, skipped, options)
    destroy_world()


def open_output(trained: "Trained", kind: str, options: EmbedOptions) -> AbstractContextManager["FeatureWriter"]:
    """The file to write; `kind` is the precision."""
    from data.reading import reading_of
    from finetune.feature_file import Origin, feature_file
    from models.formats.hub import digest

    about = options.weights, digest(options.weights), options.ema, trained.preprocessing.size, kind
    origin = Origin(*about, options.source, reading_of(options))
    return feature_file(options.out, trained.weights.arch.dims[-1], options.dtype, origin)


def report(writer: "FeatureWriter", skipped: int, options: EmbedOptions) -> None:
    """Print what was written."""
    say(f"wrote {options.out}: {writer.rows:,} images, {writer.width} features each")
    if skipped:
        say(f"{skipped:,} damaged images left out, listed above")


def embed_on_ray(trained: "Trained", splits: list["Split | Folder"], options: EmbedOptions) -> None:
    """Write the rows of all splits; tasks on the cluster compute those of some thousand images each."""
    from finetune.ray_embedding import parts_of, plan_job, rows_on_ray

    job, resources = plan_job(options)
    skipped, console = 0, Console(stderr=True)
    with open_output(trained, job.precision, options) as writer:
        for images in splits:
            parts = parts_of(images, options.batch)
            found = rows_on_ray(parts, job, options.ray, resources)
            lost, errors = {}, {}
            for batches, damaged in track(found, f"features of {images.name}", len(parts), console=console):
                for rows in batches:
                    writer.add(rows.names, images.name, rows.samples, rows.labels, rows.x)
                    lost |= rows.lost
                errors |= damaged
            report_lost(lost, errors)
            skipped += len(lost)
    report(writer, skipped, options)


def write_features(
    trained: "Trained", images: "Split | Folder", writer: "FeatureWriter | None", kind: str, options: EmbedOptions,
    world: "World",
) -> int:  # fmt: skip
    """Write the rows of a split; only the first rank has a writer. `kind` is the precision.

    Returns the number of damaged images, which the first rank lists on standard error.
    """
    from data.folder import iterate_names
    from data.transforms import EvalTransform
    from finetune.embedding import embed, embedding_loader, rows_of
    from launch.training.world import gather

    def progress(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    transform, channels = EvalTransform.of(trained.preprocessing), trained.preprocessing.channels
    every, data = range(len(images)), Data(workers=options.workers, max_pixels=options.max_pixels)
    loader = embedding_loader(images, every, transform, channels, data, options.batch, world)
    all_names, damaged, lost = iterate_names(images), {}, {}
    for part in embed(trained, loader, world, kind, damaged, progress):
        if writer:
            rows = rows_of(part, all_names, images.classes)
            writer.add(rows.names, images.name, rows.samples, rows.labels, rows.x)
            lost |= rows.lost
    report_lost(lost, ChainMap(*gather(damaged)))
    return len(lost)


def report_lost(lost: dict[int, str], errors: Mapping[int, str]) -> None:
    """List damaged images on standard error, by their names and errors."""
    from data.name_lists import escape_name

    for sample in sorted(lost):
        print(f"left out: {lost[sample]}: {escape_name(errors[sample])}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
