"""Predict with trained weights: for each picture classes and their probabilities, labels, numbers, a mask, or boxes.

python finetune/predict.py runs/photos-finetuned/best.pt cat.jpg dog.jpg
python finetune/predict.py runs/photos-finetuned/best.pt inbox/ --csv inbox.csv --annotate inbox-annotated
find photos -name '*.jpg' | python finetune/predict.py runs/photos-finetuned/best.pt -
python finetune/predict.py convnextv2_tiny_1k_224_ema.pt cat.jpg --classes imagenet.txt

For detection, --json writes a COCO file with all boxes, --csv and --annotate take those from --min-score on.

Folders are searched recursively; `-` reads paths from standard input, one a line. Size, crop, normalisation and class
names come from the weights. --tta hflip averages over mirrored pictures as well. Of a segmentation model, --annotate
writes masks (index PNG) and pictures in their colours; the table has each class's share of the pixels. Unreadable
pictures are reported on standard error; the others are predicted, and the exit code is 2.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from configs.checks import check_exists, check_parent, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import Probability, argument, option
from configs.schema import Optim, Run
from finetune.options import STDIN, PredictionOptions


@dataclass(frozen=True)
class Options(PredictionOptions):
    """The command line."""

    images: tuple[str, ...] = argument("file, folder, or - for paths from standard input")
    top: PositiveInt = option(5, "classes per picture")
    annotate: Path | None = option(None, "folder for copies with names and probabilities, or for masks")
    csv: Path | None = option(None, "write a table")
    json: Path | None = option(None, "write the same as a list of objects")
    min_score: Probability | None = option(None, "minimum score of a box that is shown (detection; default: 0.5)")
    batch: PositiveInt = option(32, "pictures per batch")
    classes: str | None = option(None, "file of class names, one a line, for weights without class names")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_weights(options.weights)
    for path in options.images:
        if path != STDIN:
            check_exists(path, "pictures, or folders of them")
    for file in filter(None, (options.csv, options.json)):
        check_parent(file)
    sys.stdout.reconfigure(errors="surrogateescape")  # file names may be any bytes
    failed, images = classify(options)
    if failed and images > 1:
        raise UserError(f"{failed} of {images} images could not be read")
    if failed:
        sys.exit(2)


def classify(options: Options) -> tuple[int, int]:
    """Classify and print batch by batch, then write the files. Returns (unreadable pictures, all pictures)."""
    from data.loader import collate  # slow imports, after parsing
    from finetune.batches import PREFETCHED, find_pictures, picture_batches
    from finetune.inference import output_of
    from finetune.tasks import make_inference
    from finetune.tta import with_views
    from launch.training.precision import precision
    from launch.training.world import destroy_world, init_world
    from models.opening import open_classifier

    task = make_inference(open_classifier(options.weights, options.ema, options.size))
    task.name_outputs(options.classes)
    if options.min_score is not None:
        if not hasattr(task, "min_score"):
            raise UserError(f"--min-score is for boxes, which {options.weights} does not predict: leave it out")
        task.min_score = options.min_score
    averaged = with_views(task, options.tta)
    paths = find_pictures(options.images)
    if options.annotate:
        options.annotate.mkdir(parents=True, exist_ok=True)
    world = init_world(Run(device=options.device))
    if world.ranks > 1:
        raise UserError("finetune/predict.py runs in one process: start it with python, not with a launcher")
    kind = precision(Optim(precision=options.precision), world.device)
    trained = task.trained
    model, mean, std = (x.to(world.device) for x in (averaged, trained.mean, trained.std))
    prefetched = 0 if options.images == (STDIN,) else PREFETCHED  # answer whoever writes the paths at once
    kept = []
    done = failed = 0
    for pictures in picture_batches(paths, task, options.batch, prefetched, options):
        readable = [picture for picture in pictures if not picture.error]
        if readable:
            batch = collate([picture.entries for picture in readable])
            output = output_of(task, model, batch, mean, std, kind)
            predictions = task.predict(output, batch, [picture.path for picture in readable], options.top)
            for number, prediction in enumerate(predictions, done + 1):
                print(f"{prediction.path}: {', '.join(prediction.lines)}")
                if options.annotate:
                    task.annotate(options.annotate, number, prediction, options)
            kept += predictions if options.csv or options.json else []
        sys.stdout.flush()
        for picture in pictures:
            if picture.error:
                print(f"error: {picture.path}: {picture.error}", file=sys.stderr)
        done, failed = done + len(readable), failed + len(pictures) - len(readable)
    if options.csv:
        task.write_csv(options.csv, kept, options.top)
    if options.json:
        task.write_json(options.json, kept)
    destroy_world()
    return failed, done + failed


if __name__ == "__main__":
    run_main(main)
