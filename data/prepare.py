"""Turn any collection of images into WebDataset shards with an index.

python data/prepare.py digits shards/digits                               built-in example
python data/prepare.py photos/ shards/photos --val-fraction 0.1           a folder; sub-folders are the classes
python data/prepare.py ILSVRC2012_img_train.tar shards/imagenet --resize 512 \\
    --val ILSVRC2012_img_val.tar --val-labels ILSVRC2012_devkit_t12.tar.gz
python data/prepare.py photos/ shards/photos --labels labels.csv          labels in a table instead of folders
python data/prepare.py cifar10.tar.xz shards/cifar10 --val-fraction 0.1   tar (gz, bz2, xz) or zip
python data/prepare.py coco/ shards/coco --boxes coco/annotations         boxes: COCO json, VOC xml or YOLO text
python data/prepare.py slides/ shards/slides --tile 512                   tiles of huge images
python data/prepare.py camvid/ shards/camvid --masks labels --mask-classes camvid/classes.txt --ignore 11
python data/prepare.py photos/ shards/photos --only list.csv              only the images that a file lists by name
python data/prepare.py s3://bucket/photos s3://bucket/shards/photos       from and to URLs
python data/prepare.py photos/ shards/photos --ray                        on a Ray cluster (see docs/data.md)
python data/prepare.py shards/made-elsewhere --index                      index WebDataset tars of other tools
python data/prepare.py shards/photos --verify                             check every byte
python data/prepare.py photos/ shards/photos --repair                     rewrite damaged shards from the images
python data/prepare.py shards/photos --repair                             without the images: keep what is undamaged

When the shards are complete, launch/plan.py writes a recipe for them, OUT/plan.yaml, and the commands to train.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

from configs.command import parse_options
from configs.errors import UserError, printable, run_main
from configs.log import say
from configs.shell import command
from data.build import build
from data.index import index_folder, verify
from data.planning import PrepareOptions
from data.remote import is_url
from data.repair import repair

LABEL_FILES = ("labels", "val_labels", "test_labels")
BOX_FILES = ("boxes", "val_boxes", "test_boxes")


def parse(argv: list[str] | None = None) -> PrepareOptions:
    """The command line. Raises `UserError` for options that do not go together."""
    options = parse_options(PrepareOptions, __doc__, argv)
    if options.splits and options.no_splits:
        raise UserError("--splits and --no-splits exclude each other: give one")
    if options.no_labels and (given := next((k for k in LABEL_FILES if getattr(options, k)), None)):
        raise UserError(f"--no-labels and --{given.replace('_', '-')} exclude each other: give one")
    boxes = next((k for k in BOX_FILES if getattr(options, k)), None)
    if boxes and (given := next((k for k in ("no_labels", *LABEL_FILES) if getattr(options, k)), None)):
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in (boxes, given))
        raise UserError(f"{flags} exclude each other: an image has boxes or labels")
    if boxes and options.masks:
        raise UserError("--boxes and --masks exclude each other: an image has boxes or a mask")
    if boxes and not options.boxes:
        raise UserError(f"--{boxes.replace('_', '-')} needs --boxes, the boxes of split train")
    if options.val and options.val_fraction:
        raise UserError("--val and --val-fraction exclude each other: give one")
    if options.tile is None and (given := next((k for k in ("overlap", "keep_empty") if getattr(options, k)), None)):
        raise UserError(f"--{given.replace('_', '-')} needs --tile")
    if options.tile and options.overlap >= options.tile:
        raise UserError(f"--overlap is {options.overlap}, must be less than --tile {options.tile}")
    if options.tile and options.resize:
        raise UserError("--tile and --resize exclude each other: choose one")
    if not options.masks and (options.mask_classes or options.ignore != (255,)):
        raise UserError("--mask-classes and --ignore are for masks: add --masks SOURCE")
    if options.masks and options.source == "digits":
        raise UserError("--masks does not apply to the built-in digits: leave it out")
    actions = options.index + options.verify + options.repair
    if actions > 1 or (options.out is None and not actions) or (options.out and (options.index or options.verify)):
        raise UserError("give SOURCE OUT, or one folder of shards with --index, --verify or --repair (see --help)")
    if options.out is None and (options.only or options.without):
        raise UserError("--only and --without select images of SOURCE for OUT: give both folders")
    return options


def main(argv: list[str] | None = None) -> PrepareOptions:
    """Do what the command line says, and return it."""
    options = parse(argv)
    if options.ray:
        from data.ray_pool import find_cluster  # optional

        find_cluster(options.ray)
    if options.out:
        build(options)
    else:
        run = index_folder if options.index else verify if options.verify else repair
        run(Path(options.source), options.pool)
    return options


def prepare_and_plan() -> None:
    """Entry point. Prints what to do next; the shards stand if planning fails."""
    options = main()
    if options.dry_run:
        words = [word for word in sys.argv[1:] if word != "--dry-run"]
        say(f"next: {command('data/prepare.py', *words)}")
    elif options.out and is_url(options.out):
        say(f"next: {command('launch/plan.py', options.out.rstrip('/'))}")
    elif options.out or options.index:
        plan(Path(options.out or options.source), options.no_plan)


def plan(folder: Path, later: bool) -> None:
    """Plan the training on shards in another process, because the plan needs other packages than data."""
    again, path = command("launch/plan.py", folder), folder / "plan.yaml"
    if path.exists():
        say(f"{printable(path)} is kept: to plan anew, remove it and run `{again}`")
        say(f"ready: {command('pretrain/main.py', '--config', path)}")
    elif later:
        say(f"next: {again}")
    else:
        sys.stdout.flush()
        if subprocess.run([sys.executable, str(ROOT / "launch/plan.py"), str(folder)], check=False).returncode:
            say(f"the shards are complete; only the plan is missing: `{again}` makes it")


if __name__ == "__main__":
    run_main(prepare_and_plan)
