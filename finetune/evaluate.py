"""Evaluate a fine-tuned model on labelled images: scores of its task, pictures, and every prediction.

python finetune/evaluate.py runs/photos-finetuned/best.pt shards/photos                  split val of shards
python finetune/evaluate.py runs/photos-finetuned/best.pt photos/ --split test           a folder with class sub-folders
python finetune/evaluate.py convnextv2_tiny_1k_224_ema.pt shards/imagenet --size 288     weights of any format
deepspeed finetune/evaluate.py runs/photos-finetuned/best.pt s3://bucket/shards/photos   on every GPU

Writes evaluation.json, predictions.csv and pictures. Each image counts once, on any number of GPUs; damaged images are
listed and left out. Classes, labels and numbers are matched by name if both weights and data have names. --tta hflip
crops averages the outputs for mirrored images and for five crops.
"""

import sys
from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveInt

from configs.checks import check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.hub import is_hub
from configs.keys import argument, option
from configs.schema import Data, Optim, Run
from data.folder import check_images
from finetune.options import PredictionOptions


@dataclass(frozen=True)
class Options(PredictionOptions):
    """The command line."""

    data: str = argument("labelled images: shards or their URL, a folder, a zip, a tar, a table of files")
    split: str = option("val", "split to evaluate")
    batch: PositiveInt = option(64, "images per batch and rank")
    workers: NonNegativeInt | None = option(None, "loader processes per rank (default: its cores, at most 8)")
    out: Path | None = option(None, "folder to write to (default: evaluation-SPLIT-NAME next to the weights)")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_weights(options.weights)
    if is_hub(options.weights) and options.out is None:
        raise UserError(f"{options.weights} has no folder to write to: give one with --out")
    check_images(options.data)
    data = Data(workers=options.workers, max_pixels=options.max_pixels)

    # slow imports, after parsing, so that --help and user errors are quick
    from data.folder import open_images, sample_names
    from data.loader import eval_loader
    from finetune.batches import padded_batches
    from finetune.inference import predict
    from finetune.tasks import make_inference
    from finetune.tta import with_views
    from launch.training.precision import precision
    from launch.training.world import destroy_world, gather, init_world, process_errors
    from models.opening import open_classifier

    task = make_inference(open_classifier(options.weights, options.ema, options.size))
    trained, images = task.trained, open_images(options.data, options.split, options)
    task.match(images)
    averaged = with_views(task, options.tta)
    weights = Path(options.weights).absolute()
    # best.pt, last.pt and its average get different folders
    name = f"{weights.name if weights.is_dir() else weights.stem}{'-ema' if options.ema else ''}"
    out = options.out or Path(options.weights).parent / f"evaluation-{options.split}-{name}"
    world = init_world(Run(device=options.device))
    if world.first:
        out.mkdir(parents=True, exist_ok=True)  # before the work, so that it cannot fail after it
    kind = precision(Optim(precision=options.precision), world.device)
    batch = min(options.batch, len(images))
    place = world.rank, world.ranks, world.device.type == "cuda"
    channels = trained.preprocessing.channels
    loader = eval_loader(images, task.transform, channels, data, batch, *place, read_target=task.read_target)
    damaged: dict[int, str] = {}
    batches = padded_batches(loader, batch, damaged, world.first)
    model, mean, std = (x.to(world.device) for x in (averaged, trained.mean, trained.std))
    with process_errors():
        predictions = predict(task, {"": model}, batches, world, mean, std, kind)[""]
        damaged = dict(ChainMap(*gather(damaged)))
    if world.first:
        where = sample_names(images)
        result = {"weights": options.weights, "ema": options.ema, "data": options.data, "split": options.split}
        result |= {
            "precision": kind,
            "tta": list(options.tta),
            "size": list(trained.preprocessing.size),
            **task.evaluation(predictions),
        }
        result["damaged"] = [{"sample": i, "name": where[i], "error": damaged[i]} for i in sorted(damaged)]
        task.write_evaluation(out, result, predictions, where)
        task.show_evaluation(result)
        print(f"wrote {out}: {task.files}")
    destroy_world()


if __name__ == "__main__":
    run_main(main)
