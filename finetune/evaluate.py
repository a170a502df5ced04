"""Evaluate a fine-tuned model on labelled images: scores of its task, pictures, and every prediction.

python finetune/evaluate.py runs/photos-finetuned/best.pt shards/photos                  split val of shards
python finetune/evaluate.py runs/photos-finetuned/best.pt photos/ --split test           a folder with class sub-folders
python finetune/evaluate.py convnextv2_tiny_1k_224_ema.pt shards/imagenet --size 288     weights of any format
deepspeed finetune/evaluate.py runs/photos-finetuned/best.pt s3://bucket/shards/photos   on every GPU

Writes evaluation.json, predictions.csv and pictures. Each image counts once, on any number of GPUs; damaged images are
listed and left out. Classes, labels and numbers are matched by name if both weights and data have names. --tta hflip
crops averages the outputs for mirrored images and for five crops.
"""

import json
import sys
from collections import ChainMap
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from urllib.parse import urlsplit

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveInt

from configs.checks import check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.hub import is_hub
from configs.keys import argument, option
from configs.log import say
from configs.schema import Data, Optim, Run
from data.folder import check_images
from data.remote import is_url
from finetune.options import PredictionOptions


@dataclass(frozen=True)
class Options(PredictionOptions):
    """The command line."""

    data: str = argument("labelled images: shards or their URL, a folder, a zip, a tar, a table of files")
    split: str = option("val", "split to evaluate")
    batch: PositiveInt = option(64, "images per batch and rank")
    workers: NonNegativeInt | None = option(None, "loader processes per rank (default: its cores, at most 8)")
    out: Path | None = option(None, "folder to write to (default: evaluation-DATA-SPLIT-NAME next to the weights)")


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
    world = init_world(Run(device=options.device))
    kind = precision(Optim(precision=options.precision), world.device)
    size = list(trained.preprocessing.size)
    about = {"weights": options.weights, "ema": options.ema, "data": options.data, "split": options.split}
    about |= {"precision": kind, "tta": list(options.tta), "size": size}
    out = options.out or default_folder(options, about)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)  # before the work, so that it cannot fail after it
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
        result = about | task.evaluation(predictions)
        result["damaged"] = [{"sample": i, "name": where[i], "error": damaged[i]} for i in sorted(damaged)]
        task.write_evaluation(out, result, predictions, where)
        task.show_evaluation(result)
        say(f"wrote {out}: {task.files}")
    destroy_world()


def default_folder(options: Options, about: dict) -> Path:
    """A folder next to the weights, named after data, split and weights.

    A number is added if it holds an evaluation with other settings than `about`, so that only the same command
    overwrites its results.
    """
    weights = Path(options.weights).absolute()
    data = Path(urlsplit(options.data).path if is_url(options.data) else options.data).absolute()
    names = [
        data.name if data.is_dir() else data.stem.removesuffix(".tar"),
        options.split,
        weights.name if weights.is_dir() else weights.stem,
        "ema" if options.ema else "",
    ]
    first = Path(options.weights).parent / "-".join(["evaluation", *filter(None, names)])
    numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(folder for folder in chain([first], numbered) if _settings(folder, about) in (None, _paths(about)))


def _settings(folder: Path, about: dict) -> dict | None:
    """The settings of the evaluation in a folder; None if there is none."""
    try:
        found = json.loads((folder / "evaluation.json").read_bytes())
        return _paths({key: found.get(key) for key in about})
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _paths(about: dict) -> dict:
    """Settings whose local paths are absolute, however they were given."""
    keys = [key for key in ("weights", "data") if not is_url(about[key])]
    return about | {key: str(Path(about[key]).absolute()) for key in keys}


if __name__ == "__main__":
    run_main(main)
