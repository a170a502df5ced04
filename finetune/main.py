"""Supervised fine-tuning of a pretrained ConvNeXt; writes runs/NAME/best.pt, last.pt, summary.json and report.html.

python finetune/main.py --init runs/digits/fcmae.pt                     built-in digits
python finetune/main.py --init none                                     the same from scratch
deepspeed finetune/main.py --config configs/finetune/cifar10.yaml --init runs/cifar10/fcmae.pt
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

from configs.command import dry_run, parse, say, to_dict
from configs.errors import UserError, run_main
from configs.schema import Encoder, Finetune, Pretrain
from data.loader import eval_loader, open_split, train_loader
from data.sampler import class_weights, labelled_share
from data.transforms import EvalTransform, train_transform
from finetune.finetuning import Classifier, check_pairs, moving_average
from finetune.layer_decay import layer_decay
from launch.training.dry_run import plan
from launch.training.engine import build_engine, parameter_groups, seed_everything
from launch.training.report import write_report
from launch.training.trainer import Training
from launch.training.world import start, stop
from models.convnext import ConvNeXt, resolve
from models.opening import Opened
from models.start import open_init, start_classifier, with_statistics


def main() -> None:
    """Entry point: parse, build, run."""
    config = parse(Finetune, "finetune/digits.yaml", __doc__)
    init = open_init(config.init)
    arch = architecture(config, init)
    config = replace(config, data=with_statistics(config.data, init, arch.channels))
    data, optim, augment = config.data, config.optim, config.augment
    data.grid(arch.stem_stride)  # may refuse the image size
    mean, std = data.statistics(arch.channels)
    train_split, eval_split = open_split(data), open_split(data, config.eval_split)
    classes = train_split.classes
    for split in (train_split, eval_split):
        if not classes or (split.labels() < 0).any():
            raise UserError(
                f"{data.path}, split {split.name} has images without labels: fine-tuning needs one for each"
            )
    transform = train_transform(data, augment, mean)
    weights = sample_weights(config, train_split.labels())
    images = len(train_split) if weights is None else np.count_nonzero(weights)
    decay = layer_decay(config.layer_decay, arch.depths, config.layer_decay_kind)
    if (ranks := dry_run()) is not None:
        model = build(config, arch, len(classes))
        say(plan(config, model, parameter_groups(model, optim, decay), images, ranks))
        return

    world = start(config.run)
    check_pairs(config, world.ranks)
    seed_everything(config.run.seed)
    model = build(config, arch, len(classes))
    if init is None or not start_classifier(model, init, classes):
        head_init = config.model.head_init
        for parameter in model.head.fc.parameters():
            parameter.data.mul_((1.0 if init is None else 0.001) if head_init is None else head_init)
    ema = moving_average(model.to(world.device), augment.ema)
    engine = build_engine(model, parameter_groups(model, optim, decay), optim, world)

    eval_transform = EvalTransform(data.height_width, augment.eval_crop, data.eval_interpolation)
    place = world.rank, world.ranks, world.device.type == "cuda"
    loader = train_loader(train_split, transform, arch.channels, config.run.seed, data, optim, *place, weights)
    micro, _ = optim.accumulation(world.ranks)
    val_loader = eval_loader(eval_split, eval_transform, arch.channels, data, micro, *place)
    digests = {"data_digest": train_split.digest, "init_digest": init.digest if init else "none"}
    identity = to_dict(config) | {"stage": "fine-tuning"} | digests
    training = Training(config, engine, loader, world, identity)
    classifier = Classifier(config, training, ema, val_loader, arch, classes, (mean, std))
    training.log.say(
        f"{arch.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(classes)} classes, "
        f"from {'scratch' if init is None else config.init}; {images:,} images, scored on {len(eval_split):,}"
    )
    training.run(classifier)
    best, path = classifier.best, training.folder / "best.pt"
    say(f"best {config.eval_split} top-1 {best['top1']:.2%}, in epoch {best['epoch']}; wrote {path}")
    if world.first:
        classifier.draw()
        say(f"wrote {write_report(training.folder)}: open it in a browser")
    stop()


def sample_weights(config: Finetune, labels: np.ndarray) -> np.ndarray | None:
    """How often each sample of the training split is drawn, as `EpochOrder` takes it."""
    if config.label_share == 1 and not config.balance:
        return None
    used = labelled_share(labels, config.label_share, config.run.seed)
    return np.where(used, class_weights(labels, config.balance), 0)


def build(config: Finetune, arch: Encoder, classes: int) -> ConvNeXt:
    """The classifier, with initial weights. A frozen encoder has no drop path, and nothing to recompute."""
    if not config.model.freeze_encoder:
        return ConvNeXt(arch, classes, config.model.drop_path, config.model.recompute)
    model = ConvNeXt(arch, classes)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def architecture(config: Finetune, init: Opened | None) -> Encoder:
    """The model to build: the one in --init, but with `model.channels` channels if given (the stem is adapted); with
    --init none, the keys given, filled up from `model.like`.

    Raises:
        UserError: no model is named, or a key contradicts the file of --init
    """
    keys = ("name", "channels", "stem_stride", "depths", "dims")
    given = {key: getattr(config.model, key) for key in keys if getattr(config.model, key) is not None}
    if init is not None:
        held_arch = init.weights.arch
        for key, value in given.items():
            held = getattr(held_arch, key)
            if value != held and key != "channels":
                raise UserError(
                    f"{config.init} has model.{key} {held}, the configuration says {value}: leave the key out"
                )
        return replace(held_arch, channels=config.model.channels or held_arch.channels)
    if "name" not in given and config.model.like:
        path = Path(config.model.like)
        path = path if path.exists() or path.is_absolute() else ROOT / path
        recipe = parse(Pretrain, "", "", ["--config", str(path)]).model
        given = {key: getattr(recipe, key) for key in keys} | given
        say(f"--init none: the model of {config.model.like}, from scratch")
    if "name" not in given:
        raise UserError("--init none needs a model: give --model.name, like convnextv2_atto, or --init fcmae.pt")
    return resolve(Encoder(**given))


if __name__ == "__main__":
    run_main(main)
