"""Convert ConvNeXt weights between formats; the format of the source is detected.

python models/convert.py checkpoint-799.pth fcmae.pt --to ours            official sparse pretraining -> this project
python models/convert.py runs/photos-finetuned/best.pt hf --to transformers          a folder for from_pretrained
python models/convert.py convnextv2_tiny.pth tiny.safetensors --to timm              a file for create_model
python models/convert.py hf://USER/REPO tiny.pt --to ours                            from a model hub
python models/convert.py best.pt hf --to transformers --license mit --push USER/REPO    with a model card, to a hub
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.checks import check_new, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.hub import check_repo
from configs.keys import REQUIRED, argument, option
from configs.log import say
from models.formats import FORMATS, is_folder


@dataclass(frozen=True)
class Options:
    """The command line."""

    source: str = argument("weight file of any format, folder with config.json, or hf://USER/REPO[/FILE][@REVISION]")
    destination: Path = argument("file to write; for transformers a folder, for timm also one if it has no suffix")
    to: Literal[FORMATS] = option(REQUIRED, "format")
    ema: bool = option(False, "write the averaged weights instead of the raw ones")
    push: str | None = option(None, "upload the folder to this repository of the hub, USER/REPO; a new one is private")
    license: str | None = option(None, "licence of the weights for the model card, such as mit or cc-by-nc-4.0")


def main() -> None:
    """Entry point."""
    options = parse_options(Options, __doc__)
    check_new(options.destination)
    check_weights(options.source)
    check_publication(options)

    from models.formats.card import model_card  # torch: takes seconds
    from models.formats.hub import push
    from models.formats.write import how_to_load, how_to_load_backbone, write_weights
    from models.opening import open_weights
    from models.weights import use_ema

    destination, form, opened = options.destination, options.to, open_weights(options.source)
    say(f"{options.source} is {opened.format}: {opened.weights.describe()}")
    weights = use_ema(opened.weights, options.source) if options.ema else opened.weights
    card = ""
    if is_folder(destination, form):
        name, call = options.push or destination.name, how_to_load(destination.name, weights, form, options.push)
        card = model_card(weights, options.source, form, name, call, options.license)
    for remark in [*opened.remarks, *write_weights(destination, weights, form, card)]:
        say(f"  {remark}")
    say(f"wrote {destination}; load it with\n  {how_to_load(destination, weights, form)}")
    if backbone := how_to_load_backbone(destination, weights, form):
        say(f"or, for the feature maps of the four stages, with\n  {backbone}")
    if card and not options.license:
        readme = destination / "README.md"
        say(f"warning: {readme} says `license: unknown`: give the licence of the weights there, or with --license")
    if options.push:
        address = push(destination, options.push)
        say(f"pushed to {address}; load it with\n  {how_to_load(destination, weights, form, options.push)}")


def check_publication(options: Options) -> None:
    """Raise `UserError` for a licence or repository that is none, or if there is no folder for them."""
    if (options.push or options.license) and not is_folder(options.destination, options.to):
        key = "--push" if options.push else "--license"
        raise UserError(f"{key} is for model folders: use --to transformers, or --to timm and a DST without suffix")
    if options.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license):
        raise UserError(
            f"--license is {options.license}: use the hub's identifiers, such as mit, cc-by-nc-4.0 or other"
        )
    if options.push:
        check_repo(options.push, "--push")


if __name__ == "__main__":
    run_main(main)
