"""Predict with trained weights: for each picture classes and their probabilities, labels, numbers, a mask, or boxes.

python finetune/predict.py runs/photos-finetuned/best.pt cat.jpg dog.jpg
python finetune/predict.py runs/photos-finetuned/best.pt inbox/ --csv inbox.csv --annotate inbox-annotated
find photos -name '*.jpg' | python finetune/predict.py runs/photos-finetuned/best.pt -
python finetune/predict.py runs/photos-finetuned/best.pt cat.jpg --cam evidence --cam-of cat
python finetune/predict.py convnextv2_tiny_1k_224_ema.pt cat.jpg --classes imagenet.txt

For detection, --json writes a COCO file with all boxes, --csv and --annotate take those from --min-score on.

Folders are searched recursively; `-` reads paths from standard input, one a line. Size, crop, normalisation and class
names come from the weights. --tta hflip averages over mirrored pictures as well. Of a segmentation model, --annotate
writes masks (index PNG) and pictures in their colours; the table has each class's share of the pixels; --tile is for
scenes and slides that are larger than the memory. Unreadable pictures are reported on standard error; the others are
predicted, and the exit code is 2. Control characters and bytes that are not UTF-8 are printed and written to tables
like \\xe9; --json has names as they are.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from configs.checks import check_exists, check_parent, check_weights
from configs.command import parse_options
from configs.errors import UserError, printable, run_main
from configs.keys import Probability, argument, option, require
from configs.log import say
from configs.schema import Optim, Run
from data.planning import Overlap, TileSize
from finetune.options import STDIN, PredictionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.inference import Inference


@dataclass(frozen=True)
class Options(PredictionOptions):
    """The command line."""

    images: tuple[str, ...] = argument("file, folder, or - for paths from standard input")
    top: PositiveInt = option(5, "classes per picture")
    annotate: Path | None = option(None, "folder for copies with names and probabilities, or for masks")
    cam: Path | None = option(None, "folder for copies with the evidence drawn over them (Grad-CAM)")
    cam_of: str | None = option(None, "class, label or number that --cam explains (default: the likeliest)")
    csv: Path | None = option(None, "write a table")
    json: Path | None = option(None, "write the same as a list of objects")
    tile: TileSize | None = option(
        None,
        "segment each picture in tiles of this side, pixels, as data/prepare.py --tile cuts them, and assemble the "
        "mask: for pictures larger than the memory",
    )
    overlap: Overlap = option(0, "minimum overlap of neighbouring tiles, pixels")
    min_score: Probability | None = option(None, "minimum score of a box that is shown (detection; default: 0.5)")
    batch: PositiveInt = option(32, "pictures per batch")
    classes: str | None = option(None, "file of class names, one a line, for weights without class names")

    def __post_init__(self):
        super().__post_init__()
        require(self.overlap < (self.tile or 1), "--overlap", self.overlap, "less than --tile")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_weights(options.weights)
    for path in options.images:
        if path != STDIN:
            check_exists(path, "pictures, or folders of them")
    for file in filter(None, (options.csv, options.json)):
        check_parent(file)
    failed, images = classify(options)
    if failed and images > 1:
        raise UserError(f"{failed} of {images} images could not be read")
    if failed:
        sys.exit(2)


def classify(options: Options) -> tuple[int, int]:
    """Classify and print batch by batch, then write the files. Returns (unreadable pictures, all pictures)."""
    from finetune.batches import find_pictures  # slow imports, after parsing
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
    if options.cam or options.cam_of:
        check_cam(task, options)
    if options.tile and not hasattr(task, "predict_scene"):
        raise UserError(f"--tile is for segmentation, which {options.weights} does not predict: leave it out")
    averaged = with_views(task, options.tta)
    paths = find_pictures(options.images)
    for folder in filter(None, (options.annotate, options.cam)):
        folder.mkdir(parents=True, exist_ok=True)
    world = init_world(Run(device=options.device))
    if world.ranks > 1:
        raise UserError("finetune/predict.py runs in one process: start it with python, not with a launcher")
    kind = precision(Optim(precision=options.precision), world.device)
    trained = task.trained
    model, mean, std = (x.to(world.device) for x in (averaged, trained.mean, trained.std))

    def run(batch: dict[str, "Tensor"]) -> Any:
        return output_of(task, model, batch, mean, std, kind)

    kept = []
    done = failed = images = 0
    for batch, predictions, problems in predicted(paths, task, run, options):
        for number, prediction in enumerate(predictions, done + 1):
            say(f"{printable(prediction.path)}: {printable(', '.join(prediction.lines))}")
            if options.annotate:
                task.annotate(options.annotate, number, prediction, options)
        if options.cam and predictions:
            draw_cams(task, batch, done, predictions, options)
        kept += predictions if options.csv or options.json else []
        sys.stdout.flush()
        for path, problem in problems:
            print(f"error: {printable(path)}: {printable(problem)}", file=sys.stderr)
        unreadable = {path for path, _ in problems}
        images += len(unreadable | {prediction.path for prediction in predictions})
        done, failed = done + len(predictions), failed + len(unreadable)
    if options.csv:
        task.write_csv(options.csv, kept, options.top)
    if options.json:
        task.write_json(options.json, kept)
    destroy_world()
    return failed, images


def predicted(
    paths: Iterator[Path], task: "Inference", run: Callable[[dict[str, "Tensor"]], Any], options: Options
) -> Iterator[tuple[dict[str, "Tensor"], list, list[tuple[Path, str]]]]:
    """Batches of pictures, with --tile one after another: the batch, predictions, what is unreadable and why."""
    from data.loader import collate
    from finetune.batches import PREFETCHED, picture_batches

    if options.tile:
        for path in paths:
            more = options.tile, options.overlap, options.batch, options, options.top, run
            prediction, problems = task.predict_scene(path, *more)
            yield {}, [prediction] if prediction else [], [(path, problem) for problem in problems]
        return
    prefetched = 0 if options.images == (STDIN,) else PREFETCHED  # answer whoever writes the paths at once
    for pictures in picture_batches(paths, task, options.batch, prefetched, options):
        readable = [picture for picture in pictures if not picture.error]
        batch, predictions = {}, []
        if readable:
            batch = collate([picture.entries for picture in readable])
            predictions = task.predict(run(batch), batch, [picture.path for picture in readable], options.top)
        yield batch, predictions, [(picture.path, picture.error) for picture in pictures if picture.error]


def check_cam(task: "Inference", options: Options) -> None:
    """Raise `UserError` if the task has no Grad-CAM, or not one of this output."""
    import torch

    if not options.cam:
        raise UserError(f"--cam-of {options.cam_of} needs --cam FOLDER")
    if not hasattr(task, "explained"):
        raise UserError(f"--cam: {options.weights} predicts for parts of a picture, see --annotate: leave it out")
    if options.tta:
        raise UserError(f"--cam explains one view of a picture: leave out --tta {' '.join(options.tta)}")
    task.explained(torch.zeros(1, len(task.names)), options.cam_of)


def draw_cams(task: "Inference", batch: dict, done: int, predictions: list, options: Options) -> None:
    """Write pictures of the evidence for a batch's predictions; `done` pictures came before."""
    from data.transforms import normalize
    from finetune.gradcam import grad_cam

    trained, device = task.trained, next(task.trained.model.parameters()).device
    image = normalize(batch["image"].to(device), trained.mean.to(device), trained.std.to(device))
    maps, outputs = grad_cam(trained.model, image, lambda output: task.explained(output, options.cam_of))
    for i, (prediction, output) in enumerate(zip(predictions, outputs.tolist(), strict=True)):
        task.draw_evidence(options.cam, done + i + 1, prediction, maps[i], task.names[output], options)


if __name__ == "__main__":
    run_main(main)
