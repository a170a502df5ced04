"""Export a trained model for deployment; the file is read back in its own runtime and compared on real images.

python finetune/export.py runs/photos-finetuned/best.pt photos.onnx --to onnx --images shards/photos
python finetune/export.py runs/photos-finetuned/best.pt photos.pt2 --to torch-export --images photos/ --fp16
python finetune/export.py runs/photos/fcmae.pt backbone.onnx --to onnx --images shards/photos --features
python finetune/export.py runs/photos-finetuned/best.pt photos.safetensors --to safetensors --images photos/
python finetune/export.py runs/photos-finetuned/best.pt photos.onnx --to onnx --images shards/photos --quantize int8

The graph takes float32 images [B, C, H, W] from 0 to 1, resized and cropped, of any batch size, and normalises them.
Inputs, outputs, class names and preprocessing are stored in the file as JSON. --features leaves the classifier out and
outputs the feature maps of the four stages, for detection and segmentation. See docs/weights.md for details.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeFloat, PositiveInt

from configs.checks import check_new, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.files import sync_folder
from configs.keys import REQUIRED, argument, option, require
from configs.log import say
from configs.schema import Data
from data.folder import check_images
from data.reading import FileOptions
from finetune.exporters import SECOND_FILES, SUFFIXES
from finetune.options import ModelOptions

if TYPE_CHECKING:
    from finetune.exporters.comparison import Predict
    from finetune.inference import Inference

COMPARED, CALIBRATED = 16, 128  # images


@dataclass(frozen=True)
class Options(FileOptions, ModelOptions):
    """The command line."""

    out: Path = argument(f"file to write, named *{', *'.join(SUFFIXES.values())}")
    to: Literal[tuple(SUFFIXES)] = option(REQUIRED, "format")
    images: str = option(
        REQUIRED, f"images to compare outputs on: an image, a folder, zip or tar, or shards; {COMPARED} are used"
    )
    split: str = option("val", "split of --images")
    features: bool = option(False, "without the classifier: the feature maps of the four stages")
    fp16: bool = option(False, "weights and activations in fp16; norms and head stay fp32")
    dynamic: bool = option(False, "free height and width of a classifier, in whole patches; others have them anyway")
    opset: PositiveInt | None = option(None, "version of ONNX's operators (default: that of torch's exporter)")
    quantize: Literal["int8"] | None = option(
        None, "ONNX with weights and activations in int8; --images needs labels: the score is compared on them"
    )
    calibrate: str | None = option(None, "images to measure activations on for --quantize (default: --images)")
    calibrate_split: str = option("train", "split of --calibrate")
    max_drop: NonNegativeFloat = option(1.0, "refuse --quantize if the score falls by more points of 100")
    score_images: PositiveInt = option(5000, "maximum number of images to score on, evenly spread")

    def __post_init__(self):
        super().__post_init__()
        require(self.to == "onnx" or self.opset is None, "--opset", self.opset, "left out: it is for --to onnx")
        alone = self.to == "onnx" and not (self.fp16 or self.features)
        rule = "left out: it is for --to onnx without --fp16 and --features"
        require(alone or not self.quantize, "--quantize", self.quantize, rule)
        graph = self.to != "safetensors" and not self.features
        require(graph or not self.dynamic, "--dynamic", "given", "left out: it is for graphs of classifiers")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    out, to = options.out, options.to
    check_weights(options.weights)
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"{out}: the name of a file of {to} ends in {SUFFIXES[to]}")
    for suffix in filter(None, (SUFFIXES[to], SECOND_FILES.get(to))):
        check_new(out.with_suffix(suffix))
    for images in filter(None, (options.images, options.calibrate)):
        if options.quantize or not Path(images).is_file():
            check_images(images)

    from data.transforms import EvalTransform  # slow imports, after parsing
    from finetune.batches import sample_images
    from finetune.exporters.comparison import (
        check_fp16,
        compare,
        comparison_batches,
        explain_errors,
        predict_with,
        relative_difference,
    )  # fmt: skip
    from finetune.exporters.files import export, how_to_use, load_exported, stage_outputs
    from finetune.exporters.graph import Deployed, Shape, free_sides, min_free_side, to_fp16
    from finetune.tasks import make_inference
    from models.opening import open_classifier, open_encoder

    open_model = open_encoder if options.features else open_classifier
    trained = open_model(options.weights, options.ema, options.size)
    task = None if options.features else make_inference(trained)
    trained = task.trained if task else trained
    weights = trained.weights
    one_by_one = getattr(task, "batch", None) == 1
    transform = task.transform if one_by_one else EvalTransform.of(trained.preprocessing)
    images = sample_images(options.images, options.split, COMPARED, transform, trained.preprocessing.channels, options)
    say(f"{options.weights}: {weights.describe()}; comparing on {len(images)} images")
    if to == "safetensors" and weights.head and not weights.outputs:
        raise UserError(f"timm's models have no head like that of {options.weights}: use another --to, or --features")
    if options.quantize and not hasattr(task, "score"):
        raise UserError(f"--quantize: task {weights.task} has no score that is compared yet: use --fp16")
    outputs = task.outputs() if task else stage_outputs(weights.arch)
    source = deployed = Deployed(trained.model, trained.mean, trained.std)
    difference = getattr(task, "difference", partial(relative_difference, one_class=weights.outputs > 0))
    if options.dynamic and one_by_one:
        raise UserError(f"--dynamic: task {weights.task} is exported for one size: leave it out")
    free = (False, False) if one_by_one else free_sides(weights, options.dynamic)
    if not (one_by_one or all(free)) and (options.dynamic or not weights.outputs):
        say(f"  sides below {min_free_side(weights.arch)} pixels are fixed in the graph: --size sets larger ones")
    batches = [*images.split(1)] if one_by_one else comparison_batches(images, free)
    expected = [predict_with(source)(batch) for batch in batches]
    if options.fp16:
        deployed = to_fp16(source)
        check_fp16(source, deployed, expected, batches, difference, one_by_one)
        encoder, head = ({name: x.half() for name, x in part.items()} for part in (weights.encoder, weights.head))
        weights = replace(weights, encoder=encoder, head=head)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        part = Path(folder, out.name)
        export(part, to, deployed, weights, outputs, Shape(one_by_one, free), options.opset)
        with explain_errors(to):
            exported = load_exported(part, to, weights)
            subject = f"{out} is not written: it"
            found = compare(expected, exported, batches, options.fp16, subject, difference, one_by_one)
        if options.quantize:
            say(f"read back, its outputs {found}; {quantized(part, task, exported, options)}")
        files = move_files(Path(folder), out)
    written = f"{' and '.join(map(str, files))}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
    shapes = ", ".join(dict.fromkeys("x".join(map(str, batch.shape)) for batch in batches))
    same = "" if options.quantize else f"; read back, its outputs for images of {shapes} {found}"
    say(f"wrote {written}{same}; load it with\n  {how_to_use(out, to, weights)}")


def quantized(file: Path, task: "Inference", exported: "Predict", options: Options) -> str:
    """Replace an ONNX file, whose outputs `exported` computes, by its quantised one. Returns a line on the scores.

    Raises `UserError` if the score falls by more than --max-drop, or the images have no labels.
    """
    from data.folder import open_images
    from data.transforms import EvalTransform
    from finetune.batches import sample_images
    from finetune.exporters.files import IMAGE, load_exported
    from finetune.exporters.quantize import check_drop, quantize, scores

    labelled, weights = open_images(options.images, options.split, options), task.trained.weights
    place, split = options.calibrate or options.images, options.calibrate_split
    preprocessing = task.trained.preprocessing
    task.match(labelled)  # raises before the work
    transform = EvalTransform.of(preprocessing)
    images = sample_images(place, split, CALIBRATED, transform, preprocessing.channels, options)
    low = file.with_name(f".{file.name}")
    quantize(file, low, IMAGE, images)
    low.replace(file)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # a quarter of it fits into one file
    models, data = {"fp32": exported, "int8": load_exported(file, "onnx", weights)}, Data(max_pixels=options.max_pixels)
    found, count = scores(task, labelled, options.score_images, models, data)
    return check_drop(found["fp32"], found["int8"], count, options.max_drop, task.score)


def move_files(folder: Path, out: Path) -> list[Path]:
    """Sync the files of a folder and move them next to `out`, `out` itself last; returns their new paths."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == out.name)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        file.replace(out.with_name(file.name))
    sync_folder(out.parent)
    return [out.with_name(file.name) for file in files]


if __name__ == "__main__":
    run_main(main)
