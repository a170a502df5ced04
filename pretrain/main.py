"""FCMAE pretraining of a ConvNeXt on shards of images; writes runs/NAME/fcmae.pt, summary.json and report.html.

deepspeed pretrain/main.py                                              built-in digits
deepspeed pretrain/main.py --config configs/pretrain/cifar10.yaml
deepspeed pretrain/main.py --config R.yaml --data.path shards/mine --run.name mine
deepspeed pretrain/main.py --config R.yaml --init checkpoint-799.pth    go on from weights of any format
python pretrain/main.py ...                                             one process
python pretrain/main.py --config R.yaml --dry-run 64                    what 64 ranks would do and need
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.command import dry_run, parse, say, to_dict
from configs.errors import run_main
from configs.preprocessing import Preprocessing
from configs.schema import Pretrain, visible_patches
from data.loader import open_split, train_loader
from data.transforms import PretrainTransform
from launch.training.dry_run import plan
from launch.training.engine import build_engine, parameter_groups, seed_everything, whole_weights
from launch.training.report import write_report
from launch.training.summary import write_summary
from launch.training.trainer import Training
from launch.training.world import start, stop
from models.fcmae import FCMAE, check_size
from models.start import open_init, start_autoencoder, with_statistics
from models.weights import Weights, cpu_state, save, split_by_prefix
from pretrain.online_eval import probe_splits
from pretrain.pretraining import Pretraining


def main() -> None:
    """Entry point: parse, build, run."""
    config = parse(Pretrain, "pretrain/digits.yaml", __doc__)
    init = open_init(config.init)
    config = replace(config, data=with_statistics(config.data, init, config.model.channels))
    data, optim = config.data, config.optim
    grid = data.grid(config.model.stem_stride)
    check_size(config.model, grid)
    mean, std = data.statistics(config.model.channels)
    split, probed = open_split(data), probe_splits(config)
    if (ranks := dry_run()) is not None:
        model = FCMAE(config.model)
        say(plan(config, model, parameter_groups(model, optim), len(split), ranks))
        return
    world = start(config.run)
    seed_everything(config.run.seed)
    model = FCMAE(config.model)
    if init:
        start_autoencoder(model, init)
    engine = build_engine(model, parameter_groups(model, optim), optim, world)

    n = visible_patches(grid[0] * grid[1], config.model.mask_ratio)
    transform = PretrainTransform(data, grid, n)
    place = world.rank, world.ranks, world.device.type == "cuda"
    loader = train_loader(split, transform, config.model.channels, config.run.seed, data, optim, *place)
    identity = to_dict(config) | {"stage": "pretraining", "data_digest": split.digest}
    identity["init_digest"] = init.digest if init else "none"
    if config.model.grn_scope == "batch":
        identity["grn_batch"], _ = optim.accumulation(world.ranks)  # else the micro batch may change on resume
    training = Training(config, engine, loader, world, identity)
    patches, parameters = grid[0] * grid[1], sum(p.numel() for p in model.encoder.parameters())
    training.log.say(
        f"{config.model.name}, {parameters / 1e6:.1f}M encoder parameters, {config.model.backend} backend on "
        f"{world.device.type} x {world.ranks}; {len(split):,} images; {n} of {patches} patches visible "
        f"({1 - n / patches:.1%} hidden)"
    )
    stage = Pretraining(config, training, (mean, std), probed)
    training.run(stage)
    with whole_weights(engine):
        if world.first:
            path = training.folder / "fcmae.pt"
            _, decoder = split_by_prefix(cpu_state(model), "encoder.")
            preprocessing = Preprocessing(data.height_width, config.model.channels, mean, std)
            content = Weights(
                model.encoder.arch, preprocessing, cpu_state(model.encoder), decoder, to_dict(config.model)
            )
            content.classes = split.classes
            save(path, content)
            write_summary(training.folder, config, world, training.log.seconds(), stage.summary())
            print(f"wrote {path}: fine-tune it with `python finetune/main.py --init {path} ...`")
            print(f"wrote {write_report(training.folder)}: open it in a browser")
    stop()


if __name__ == "__main__":
    run_main(main)
