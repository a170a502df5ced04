"""Supervised fine-tuning of a pretrained ConvNeXt; writes runs/NAME/best.pt, last.pt, summary.json and report.html.

python finetune/main.py --init runs/digits/fcmae.pt                     built-in digits
python finetune/main.py --init none                                     from scratch
deepspeed finetune/main.py --config configs/finetune/cifar10.yaml --init runs/cifar10/fcmae.pt
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the project, not this folder

from configs.command import dry_run, every_parameter, parse
from configs.compare import to_dict
from configs.errors import UserError, run_main
from configs.log import say
from configs.recipes import recipe_section
from configs.schema import Data, Encoder, Finetune, PretrainModel
from configs.shell import command
from finetune.tasks import TASKS
from launch.inputs import check_inputs
from launch.restarts import start_agent
from models.sizes import resolve


def main() -> None:
    """Entry point: parse, build, run."""
    config = parse(Finetune, "finetune/digits.yaml", __doc__, {"task": TASKS})
    check_inputs(config)
    start_agent()

    import numpy as np
    from timm.utils import ModelEmaV3, random_seed

    from data.folds import fold_parts
    from data.loader import eval_loader, train_loader
    from finetune.finetuning import Finetuning
    from finetune.layer_decay import layer_decay
    from launch.reports.page import write_report
    from launch.training.checkpoints import recorded_optim
    from launch.training.dry_run import plan
    from launch.training.engine import Engine
    from launch.training.facts import facts
    from launch.training.fit import fit_batch, fit_memory
    from launch.training.images import Images
    from launch.training.parameter_groups import parameter_groups
    from launch.training.spares import release_spares, start_world
    from launch.training.trainer import Trainer
    from launch.training.world import destroy_world
    from models.start import open_init, with_statistics

    init = open_init(config.init)
    arch = architecture(config, init.weights.arch if init else None)
    config = replace(config, data=with_statistics(config.data, init, arch.channels))
    if init is None and config.model.like and config.data.mean is None and config.data.std is None:
        like = recipe_section(like_recipe(config), "data", Data)
        config = replace(config, data=replace(config.data, mean=like.mean, std=like.std))
    data, optim = config.data, config.optim
    data.grid(arch.stem_stride)  # raises for a size that is not a multiple of the patch
    statistics = data.statistics(arch.channels)
    ranks = dry_run()
    world = start_world(config) if ranks is None else None
    recorded = recorded_optim(config.run, "fine-tuning") if world else {}
    collection = Images(config.run, world, resumed=bool(recorded))
    splits = collection.open(data, [data.split] if data.folds else [data.split, config.eval_split])
    train_split, eval_split = fold_parts(*splits, data.fold, data.folds) if data.folds else splits
    task = TASKS[config.task.name].make_task(config, train_split, eval_split)
    transform, weights = task.train_transform(statistics[0]), task.sample_weights()
    images = len(train_split) if weights is None else np.count_nonzero(weights)
    decay = layer_decay(config.layer_decay, arch.depths, config.layer_decay_kind)
    if ranks is not None:
        model = task.build(arch)
        more = {"inputs": task.inputs, "check": task.check_batch, "every": every_parameter()}
        say(plan(config, model, parameter_groups(model, optim, decay), images, ranks, **more))
        return

    check = task.check_batch
    optim = fit_batch(optim, images, world.ranks, data.repeats, check, recorded)
    check(optim.accumulation(world.ranks)[0])
    config = replace(config, optim=optim)
    random_seed(config.run.seed)
    model = task.build(arch)
    task.load(model, init)
    groups = parameter_groups(model, optim, decay)
    optim = fit_memory(config, model, groups, world, task.inputs, check, recorded)
    micro, _ = optim.accumulation(world.ranks)
    config = replace(config, optim=optim)
    ema = ModelEmaV3(model, config.augment.ema) if config.augment.ema else None  # before the engine wraps the model
    engine = Engine(model, groups, optim, world)

    place = world.rank, world.ranks, world.device.type == "cuda"
    channels, read_target = arch.channels, task.read_target
    train = train_split, transform, channels, config.run.seed, data, optim, *place
    loader = train_loader(*train, weights=weights, read_target=read_target)
    val_loader = eval_loader(eval_split, task.eval_transform(), channels, data, micro, *place, read_target=read_target)
    digests = {"data_digest": train_split.digest, "init_digest": init.digest if init else "none"}
    digests["eval_digest"] = eval_split.digest
    identity = to_dict(config) | {"stage": "fine-tuning"} | digests
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    source = f"from {config.init if init else 'scratch'}; {images:,} images, evaluated on {len(eval_split):,}"
    intro = f"{arch.name}, {size}, {task.describe()}, {source}"
    stage = Finetuning(config, task, engine, world, ema, val_loader, arch, intro, statistics)
    about = facts(arch.name, model, engine.precision, world, train_split, eval_split) | {"task": task.describe()}
    trainer = Trainer(config, engine, loader, stage, world, identity, [eval_split], about)
    trainer.run()
    stage.check_best()
    best, path = stage.best, trainer.folder / "best.pt"
    say(f"best {stage.split} {task.format(best)}, in epoch {best['epoch']}; wrote {path}")
    if stage.unseen:
        say(f"warning: {stage.unseen_classes()}")
    if world.first:
        task.draw(trainer.folder, stage.best_predictions)
        say(f"wrote {write_report(trainer.folder)}: open it in a browser")
        if not data.folds:  # a fold is no split
            say(f"next: {command('finetune/evaluate.py', path, data.path, '--split', config.eval_split)}")
        release_spares()
    destroy_world()


def architecture(config: Finetune, arch: Encoder | None) -> Encoder:
    """The architecture `arch` of --init, with `model.channels` channels if set; with --init none, that of the `model`
    section, with defaults from `model.like`.

    Raises:
        UserError: no model is named, or a key contradicts the file of --init
    """
    keys = ("name", "channels", "stem_stride", "depths", "dims")
    given = {key: getattr(config.model, key) for key in keys if getattr(config.model, key) is not None}
    if arch:
        for key, value in given.items():
            if value != getattr(arch, key) and key != "channels":
                raise UserError(f"{config.init} has model.{key} {getattr(arch, key)}, not {value}: leave the key out")
        return replace(arch, channels=config.model.channels or arch.channels)
    if "name" not in given and config.model.like:
        recipe = recipe_section(like_recipe(config), "model", PretrainModel)
        given = {key: getattr(recipe, key) for key in keys} | given
        say(f"--init none: the model of {config.model.like}, from scratch")
    if "name" not in given:
        raise UserError("--init none needs a model: set --model.name, such as convnextv2_atto, or --init fcmae.pt")
    return resolve(Encoder(**given))


def like_recipe(config: Finetune) -> Path:
    """The recipe of `model.like`, from this folder or the project's."""
    path = Path(config.model.like)
    return path if path.exists() else ROOT / path


if __name__ == "__main__":
    run_main(main)
