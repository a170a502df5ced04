"""The pretraining loop."""

from pathlib import Path

import torch

from configs.schema import Pretrain
from data.loader import Loader
from data.transforms import normalize
from launch import checkpoints
from launch.engine import World, set_lr
from launch.runlog import Mean, RunLog
from pretrain.pictures import feature_distance, reconstruction_grid, write_png

PICTURES = 8  # images in a reconstruction grid


def pretrain(
    config: Pretrain, engine, loader: Loader, step: int, log: RunLog, world: World, identity: dict, statistics: tuple
) -> None:
    """Train from optimizer step `step` to the end: forward, backward, log, picture, checkpoint.

    Args:
        engine: DeepSpeed engine around an FCMAE
        loader: micro batches of this rank from `step` on
        identity: resolved configuration and data digest, stored with each checkpoint
        statistics: mean and standard deviation of each channel
    """
    optim, run = config.optim, Path(config.run.folder) / config.run.name
    steps_per_epoch = loader.batches.steps_per_epoch
    _, accumulation = optim.accumulation(world.ranks)
    mean, std = (torch.tensor(values, device=world.device) for values in statistics)
    losses = Mean(world.device)
    batches = iter(loader)
    engine.train()
    while step < optim.epochs * steps_per_epoch:
        lr = optim.lr_at(step, steps_per_epoch)
        set_lr(engine, lr)
        for _ in range(accumulation):
            batch = next(batches)
            image = normalize(batch["image"].to(world.device, non_blocking=True), mean, std)
            visible = batch["visible"].to(world.device, non_blocking=True)
            loss = engine(image, visible)
            engine.backward(loss)
            engine.step()
            losses.add(loss)
        step += 1
        epoch_ends = step % steps_per_epoch == 0
        epoch = (step - 1) // steps_per_epoch + 1
        if step % config.run.log_every == 0 or epoch_ends:
            log.train(step, f"epoch {epoch}/{optim.epochs}", losses, lr, engine.get_global_grad_norm())
        last = step == optim.epochs * steps_per_epoch
        if epoch_ends and (epoch % config.run.picture_every == 0 or last) and world.first:
            show(engine.module, image[:PICTURES], visible[:PICTURES], (mean, std), run, step, log)
        if epoch_ends and (epoch % config.run.save_every == 0 or last):
            checkpoints.save(engine, run, step, {}, identity, world, config.run.keep)
        if epoch_ends:
            log.restart_clock(step)


@torch.no_grad()
def show(model, image, visible, statistics, run: Path, step: int, log: RunLog) -> None:
    """Reconstructions and the feature-collapse measure, into TensorBoard and reconstruction.png."""
    model.eval()
    picture = reconstruction_grid(model, image, visible, *statistics)
    write_png(run / "reconstruction.png", picture)
    log.picture(step, "input, visible patches, reconstruction", picture)
    log.scores(step, "features", {"channel_distance": feature_distance(model.encoder, image)})
    model.train()
