"""Turn any collection of images into WebDataset shards with an index.

python data/prepare.py digits shards/digits                               built-in example
python data/prepare.py photos/ shards/photos --val-fraction 0.1           a folder; sub-folders are the classes
python data/prepare.py ILSVRC2012_img_train.tar shards/imagenet --resize 512
python data/prepare.py cifar10.tar.xz shards/cifar10 --val-fraction 0.1   tar (gz, bz2, xz) or zip
python data/prepare.py shards/made-elsewhere --index                      index WebDataset tars of other tools
python data/prepare.py shards/photos --verify                             check every byte
python data/prepare.py photos/ shards/photos --repair                     rewrite damaged shards from the images
python data/prepare.py shards/photos --repair                             without the images: keep what is undamaged
"""

import os
import sys
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.errors import Parser, run_main
from data.build import build
from data.index import index_folder, verify
from data.planning import PrepareOptions
from data.repair import repair

Action = Literal["build", "index", "verify", "repair"]
RANGES = {"resize": (1, 1 << 16), "quality": (1, 100), "shard_size": (1, 1 << 30), "workers": (1, 1 << 12)}


def parse(argv: list[str] | None = None) -> tuple[Action, PrepareOptions]:
    """The command line. Actions other than `build` use only `out`, the folder of shards, and `workers`.

    Raises:
        UserError: a bad option
    """
    parser = _parser()
    args = parser.parse_args(argv)
    in_place = args.index or args.verify or (args.repair and not args.out)
    if not args.source or bool(args.out) == in_place or args.index + args.verify + args.repair > 1:
        parser.error("give SOURCE OUT, or one folder of shards with --index, --verify or --repair")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: must be {low} to {high}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction {args.val_fraction}: must be at least 0 and below 1")
    action = "index" if args.index else "verify" if args.verify else "repair" if in_place else "build"
    values = {key: value for key, value in vars(args).items() if key not in ("index", "verify")}
    return action, PrepareOptions(**values | {"out": Path(args.out or args.source)})


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", help="`digits`, a folder, a zip, a tar (plain, gz, bz2, xz), or the ILSVRC2012 train tar")
    add("out", nargs="?", help="folder for the shards; omitted with --index, --verify, and --repair without the source")
    add("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer than this")
    add("--quality", type=int, metavar="Q", help="re-encode as JPEG of this quality, 1 to 100")
    add("--shard-size", type=int, default=5000, metavar="N", help="maximum images in a shard (default %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    add("--val-fraction", type=float, default=0.0, metavar="F", help="hold out this share of each class")
    add("--no-labels", action="store_true", help="folders are not classes: write shards without labels")
    add("--index", action="store_true", help="index the .tar files of other tools in SOURCE")
    add("--verify", action="store_true", help="check every byte of the shards in SOURCE")
    add(
        "--repair",
        action="store_true",
        help="with SOURCE OUT: check every byte of the shards in OUT and rewrite damaged ones; "
        "with a folder of shards alone: rewrite damaged indexes, and keep the undamaged images of damaged tars",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    action, options = parse(argv)
    if action == "build":
        build(options)
    else:
        run = {"index": index_folder, "verify": verify, "repair": repair}[action]
        run(options.out, options.workers)


if __name__ == "__main__":
    run_main(main)
