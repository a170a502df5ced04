"""Supervised fine-tuning of a pretrained ConvNeXt; writes runs/NAME/best.pt, last.pt and summary.json.

python finetune/main.py --init runs/digits/fcmae.pt                     built-in digits
python finetune/main.py --init none                                     the same from scratch
deepspeed finetune/main.py --config configs/finetune/cifar10.yaml --init runs/cifar10/fcmae.pt
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.command import load_recipe, parse, say, to_dict
from configs.errors import UserError, run_main
from configs.schema import Encoder, Finetune
from data.loader import eval_loader, open_split, train_loader
from data.transforms import RandAugment, center_crop, random_crop_flip
from finetune.layer_decay import layer_decay
from finetune.loop import Classifier, finetune
from launch import checkpoints
from launch.engine import build_engine, parameter_groups, seed_everything, start, stop
from launch.runlog import RunLog
from models.convnext import ConvNeXt, resolve
from models.weights import Weights, load, load_strict


def main() -> None:
    """Entry point: parse, build, run."""
    config = parse(Finetune, "finetune/digits.yaml", __doc__)
    init = None if config.init == "none" else load(config.init)
    arch = architecture(config, init)
    if init is not None:  # the statistics belong to the weights
        stored = init.image
        data = replace(config.data, mean=config.data.mean or stored["mean"], std=config.data.std or stored["std"])
        config = replace(config, data=data)
    data, optim, augment = config.data, config.optim, config.augment
    statistics = data.statistics(arch.channels)
    train_split, eval_split = open_split(data), open_split(data, config.eval_split)
    classes = train_split.classes
    randaugment = RandAugment(augment.rand_augment, statistics[0]) if augment.rand_augment else None
    if not classes:
        raise UserError(f"{data.path} has no labels: fine-tuning needs shards whose images lie in one folder a class")

    world = start(config.run.device)
    seed_everything(config.run.seed)
    model = ConvNeXt(arch, len(classes), config.model.drop_path, config.model.grad_checkpointing)
    if init is not None:
        load_strict(model, init.encoder, config.init, ignore="head.")
    for parameter in model.head.fc.parameters():
        parameter.data.mul_(config.model.head_init if init is not None else 1)
    decay = layer_decay(config.layer_decay, arch.depths, config.layer_decay_kind)
    engine = build_engine(model, parameter_groups(model, optim.weight_decay, decay), optim, world)

    def train_transform(image, rng):
        image = random_crop_flip(image, rng, data.height_width, data.crop_scale, data.hflip)
        return {"image": randaugment(image, rng) if randaugment else image}

    def eval_transform(image, rng):
        return {"image": center_crop(image, data.height_width, augment.eval_crop)}

    ranks = world.rank, world.ranks
    loader = train_loader(train_split, train_transform, arch.channels, config.run.seed, data, optim, *ranks)
    micro, _ = optim.accumulation(world.ranks)
    val_loader = eval_loader(eval_split, eval_transform, arch.channels, data, micro, *ranks)
    classifier = Classifier(config, engine, world, arch, classes, statistics)
    run = Path(config.run.folder) / config.run.name
    identity = to_dict(config) | {"data_digest": train_split.digest}
    step, state = checkpoints.resume(engine, run, identity, config.resume, world)
    if state:
        classifier.load_state(state)
    loader.batches.first_step = step
    log = RunLog(
        run, to_dict(config), optim.epochs * loader.batches.steps_per_epoch, step, optim.batch_size, world.first
    )
    log.say(
        f"{arch.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(classes)} classes, "
        f"from {'scratch' if init is None else config.init}; {len(train_split):,} images, scored on {len(eval_split):,}"
    )
    try:
        finetune(config, classifier, loader, val_loader, step, log, identity)
    finally:
        log.close()
    stop()


def architecture(config: Finetune, init: Weights | None) -> Encoder:
    """The model to build: the one in --init; with --init none, the keys given, filled up from `model.like`.

    Raises:
        UserError: no model is named, or a key contradicts the file of --init
    """
    keys = ("name", "channels", "stem_stride", "depths", "dims")
    given = {key: getattr(config.model, key) for key in keys if getattr(config.model, key) is not None}
    if init is not None:
        for key, value in given.items():
            held = getattr(init.arch, key)
            if value != held:
                raise UserError(
                    f"{config.init} has model.{key} {held}, the configuration says {value}: leave the key out"
                )
        return init.arch
    if "name" not in given and config.model.like:
        recipe = load_recipe(Path(config.model.like)).get("model", {})
        shape = {
            key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items() if key in keys
        }
        given = shape | given
        say(f"--init none: the model of {config.model.like}, from scratch")
    if "name" not in given:
        raise UserError("--init none needs a model: give --model.name, like convnextv2_atto, or --init fcmae.pt")
    return resolve(Encoder(**given))


if __name__ == "__main__":
    run_main(main)
