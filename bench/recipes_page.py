"""Write docs/recipes.md, the table of all recipes, from configs/ and the models that they name.

python bench/recipes_page.py
"""

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.common import table
from configs.command import RECIPES, parse
from configs.errors import Parser, run_main
from configs.files import write_whole
from configs.schema import Encoder, Finetune, Pretrain
from finetune.tasks import TASKS
from models.convnext import ConvNeXt
from models.sizes import SIZES
from pretrain.objectives import OBJECTIVES

PAGE = ROOT / "docs/recipes.md"
CLASSES = {"shards/imagenet": 1_000, "shards/imagenet22k": 21_841}
SECTIONS = {
    "FCMAE pretraining on ImageNet-1K": r"pretrain/imagenet/.*",
    "ConvNeXt V2: fine-tuning on ImageNet-1K": r"finetune/imagenet/[a-z]+-1k",
    "ConvNeXt V2: fine-tuning on ImageNet-22K, then on ImageNet-1K": r"finetune/imagenet/[a-z]+-22k.*",
    "ConvNeXt V1: supervised": r"finetune/imagenet/v1-.*",
}
COLUMNS = ["recipe", "model", "parameters, M", "MACs, G", "image", "evaluation crop", "epochs", "published top-1, %"]
HEAD = """# Recipes

Made by `python bench/recipes_page.py` from `configs/`; do not edit. **Top-1 is what the authors published**, of one
crop of ImageNet-1K's validation images. Nobody has run these recipes here: they need many GPUs for days.

Parameters and multiply-adds (MACs) are counted: the dense classifier's at this image size, with 1,000 classes, or
21,841 for ImageNet-22K. The evaluation crop is a share of the side; at 1 the whole image is squashed into a square. A
recipe's head gives the command, the GPUs that make its batch, and where it comes from: arXiv 2301.00808 for V2,
2201.03545 for V1, and the official repositories. `tests/configs/test_recipes.py` holds every recipe against them.
"""
TAIL = """
## Others

Of no paper; what is known of their results stands in their heads.

{others}
## Data

```bash
python data/prepare.py imagenet/ shards/imagenet          # train/CLASS/*.JPEG, val/CLASS/*.JPEG: these splits are kept
python data/prepare.py fall11_whole.tar shards/imagenet22k --val-fraction 0.0035    # a tar of one tar a class
```

The published runs on ImageNet-22K trained on all 14,197,122 images and scored none. Here about 50,000 are held out.

## What differs from the published runs

- The papers do not give fine-tuning's last learning rate, nor the V2 paper its random erasing: both are the official
  code's defaults (1e-6, .25).
- The figures of V2 were made on TPUs. GPUs and micro batches in the heads are the repositories' where they name some,
  else those of a like recipe. Mixup and cutmix draw once for a micro batch, so its size matters a little.
- GRN's norm is over each image, as in the paper. The official GPU code takes it over the micro batch in pretraining.
- On a GPU the precision is bf16 (autocast).
- `--init` also takes the released weights, so that any stage can be skipped: `--init convnextv2_base_1k_224_fcmae.pt`.
"""


def recipes() -> dict[str, Pretrain | Finetune]:
    """Every recipe, by its path in configs/ without suffix; models in order of size."""
    found = {}
    for path in RECIPES.rglob("*.yaml"):
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        words = ["--config", str(path)]
        if name.startswith("pretrain/"):
            found[name] = parse(Pretrain, "", "", {"objective": OBJECTIVES}, words)
        else:
            found[name] = parse(Finetune, "", "", {"task": TASKS}, words)
    order = {model: number for number, model in enumerate(SIZES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[1].model.name, 0), item[0])))


@cache
def cost(model: str, classes: int, side: int) -> tuple[float, float]:
    """(parameters, multiply-adds of one image's forward pass) of a dense classifier: its products and convolutions."""
    with torch.device("meta"):
        classifier, image = ConvNeXt(Encoder(model), classes), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(image)
    return sum(p.numel() for p in classifier.parameters()), counter.get_total_flops() / 2


def link(name: str) -> str:
    """A link from the page to a recipe."""
    return f"[{name}](../configs/{name}.yaml)"


def row(name: str, config: Pretrain | Finetune) -> list[str]:
    """A recipe's line of the table; the published figure is read off its head."""
    parameters, macs = cost(config.model.name, CLASSES[config.data.path], config.data.height_width[0])
    published = re.search(r"^# Result: +published (\S+) %( top-1 after)?", (RECIPES / f"{name}.yaml").read_text(), re.M)
    top1 = f"{published[1]}{' when fine-tuned' if published[2] else ''}" if published else "-"
    crop = f"{config.augment.eval_crop:g}" if isinstance(config, Finetune) else "-"
    counted = [f"{parameters / 1e6:.1f}", f"{macs / 1e9:#.3g}" if macs < 1e11 else f"{macs / 1e9:.1f}"]
    return [link(name), config.model.name, *counted, str(config.data.size), crop, str(config.optim.epochs), top1]


def page() -> str:
    """docs/recipes.md."""
    left, parts = recipes(), [HEAD]
    for title, pattern in SECTIONS.items():
        names = [name for name in left if re.fullmatch(pattern, name)]
        parts.append(f"\n## {title}\n\n" + table(COLUMNS, [row(name, left.pop(name)) for name in names]))
    titles = {name: (RECIPES / f"{name}.yaml").read_text().partition("\n")[0].strip("# ") for name in left}
    parts.append(TAIL.format(others="".join(f"- {link(name)}: {title}\n" for name, title in sorted(titles.items()))))
    return "".join(parts)


def main() -> None:
    """Entry point."""
    Parser(description=__doc__).parse_args()
    write_whole(PAGE, page().encode())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
