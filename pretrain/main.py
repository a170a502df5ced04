"""Self-supervised pretraining of a ConvNeXt (FCMAE, or another objective) on shards of images.

Writes runs/NAME/fcmae.pt (objective teacher: teacher.pt), summary.json and report.html.

deepspeed pretrain/main.py                                              built-in digits
deepspeed pretrain/main.py --config configs/pretrain/cifar10.yaml
deepspeed pretrain/main.py --config R.yaml --data.path shards/mine --run.name mine
deepspeed pretrain/main.py --config R.yaml --init checkpoint-799.pth    continue from weights of any format
python pretrain/main.py ...                                             one process
python pretrain/main.py --config R.yaml --dry-run 64                    plan and memory for 64 ranks, without training
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.command import dry_run, every_parameter, given_recipe, parse
from configs.compare import to_dict
from configs.errors import run_main
from configs.log import say
from configs.preprocessing import Preprocessing
from configs.schema import Pretrain
from launch.inputs import check_inputs
from launch.restarts import start_agent
from pretrain.objectives import OBJECTIVES

RECIPE = "pretrain/digits.yaml"  # without --config


def main() -> None:
    """Entry point: parse, build, run."""
    config = parse(Pretrain, RECIPE, __doc__, {"objective": OBJECTIVES})
    make_objective = OBJECTIVES[config.objective.name].Objective
    make_objective(config)  # check the settings before the slow imports
    check_inputs(config)
    start_agent()

    from timm.utils import random_seed
    from torch import Tensor

    from data.loader import train_loader
    from launch.plans.following import after_pretraining
    from launch.reports.page import write_report
    from launch.training.checkpoints import recorded_optim
    from launch.training.dry_run import plan
    from launch.training.engine import Engine
    from launch.training.facts import facts
    from launch.training.fit import fit_batch, fit_memory
    from launch.training.images import Images
    from launch.training.parameter_groups import parameter_groups
    from launch.training.spares import release_spares, start_world
    from launch.training.summary import write_summary
    from launch.training.trainer import Trainer
    from launch.training.world import destroy_world
    from models.start import open_init, with_statistics
    from models.weights import Weights, cpu_state, save
    from pretrain.online_eval import OnlineEval, probe_splits
    from pretrain.pretraining import Pretraining, summarize
    from pretrain.unlabelled_eval import UnlabelledEval, unlabelled_split

    init = open_init(config.init)
    config = replace(config, data=with_statistics(config.data, init, config.model.channels))
    data, optim, objective = config.data, config.optim, make_objective(config)
    statistics = data.statistics(config.model.channels)
    ranks = dry_run()
    world = start_world(config) if ranks is None else None
    recorded = recorded_optim(config.run, "pretraining") if world else {}
    images = Images(config.run, world, resumed=bool(recorded))
    [split], probe = images.open(data, [data.split]), probe_splits(config, images)
    unlabelled = unlabelled_split(config, images, split)

    def inputs(image: Tensor) -> tuple[Tensor, ...]:
        return objective.inputs(image, objective.example(len(image)))

    if ranks is not None:
        model = objective.build()
        more = {"check": objective.check_batch, "every": every_parameter(), "beside": objective.beside()}
        say(plan(config, model, parameter_groups(model, optim), len(split), ranks, inputs, **more))
        return
    check = objective.check_batch
    optim = fit_batch(optim, len(split), world.ranks, data.repeats, check, recorded)
    check(optim.accumulation(world.ranks)[0])
    config = replace(config, optim=optim)
    random_seed(config.run.seed)
    model = objective.build()
    if init:
        objective.load(model, init)
    groups = parameter_groups(model, optim)
    optim = fit_memory(config, model, groups, world, inputs, check, recorded, objective.beside())
    config = replace(config, optim=optim)
    engine = Engine(model, groups, optim, world, pretraining=True)

    place = world.rank, world.ranks, world.device.type == "cuda"
    loader = train_loader(split, objective.transform(), config.model.channels, config.run.seed, data, optim, *place)
    digests = {"data_digest": split.digest, "init_digest": init.digest if init else "none"}
    digests |= objective.identity()
    identity = to_dict(config) | {"stage": "pretraining"} | digests
    if config.model.grn_scope == "batch":
        identity["grn_batch"], _ = optim.accumulation(world.ranks)  # otherwise the micro batch may change on resume
    size = f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f}M encoder parameters"
    where = f"{config.model.backend} backend on {world.device.type} x {world.ranks} in {engine.precision}"
    intro = f"{config.model.name}, {size}, {where}; {len(split):,} images; {objective.describe()}"
    online = OnlineEval(config, probe, statistics, world) if probe else None
    free = UnlabelledEval(config, objective, unlabelled, statistics, world) if unlabelled else None
    stage = Pretraining(config, objective, engine, world, intro, statistics, online, free)
    about = facts(config.model.name, model.encoder, engine.precision, world, split, None)
    about["objective"] = objective.describe()
    trainer = Trainer(config, engine, loader, stage, world, identity, about=about)
    seconds = trainer.run()

    with engine.whole_weights():
        if world.first:
            path = trainer.folder / objective.file
            preprocessing = Preprocessing(data.height_width, config.model.channels, *statistics)
            weights = Weights(model.encoder.arch, preprocessing, cpu_state(model.encoder), *objective.decoder(model))
            save(path, replace(weights, classes=split.classes, objective=config.objective.name))
            lines = after_pretraining(path, config, given_recipe(RECIPE), split)
            summary = summarize(trainer.folder / "log.jsonl", config, trainer.steps_per_epoch)
            write_summary(trainer.folder, config, world, seconds, summary | {"weights": path.name, "next": lines})
            say(f"wrote {path}: encoder and decoder")
            say(f"wrote {write_report(trainer.folder)}: open it in a browser")
            say("\n".join(lines))
            release_spares()
    destroy_world()


if __name__ == "__main__":
    run_main(main)
