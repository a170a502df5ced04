"""DeepSpeed: the only module that imports it. Starting ranks, the optimizer, the engine, and what ranks do together."""

import argparse
import io
import logging
import os
import random
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import LostPeer, UserError, reason
from configs.schema import Optim, Run
from launch.memory import keep_memory
from models import kernels

LOST = ("onnection closed by peer", "onnection reset by peer", "NCCL error")  # in what collectives raise


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def start(run: Run) -> World:
    """Join the process group; alone where no launcher (deepspeed, torchrun) has set its variables.

    Args:
        run: device (auto, cpu or cuda) and kernels
    Raises:
        UserError: cuda asked for and not there; several tasks of srun
    """
    kernels.use(run.kernels == "triton")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU: install a driver, or use auto or cpu")
    use_cuda = run.device != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"  # else DeepSpeed picks, and may not agree
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            "srun started several tasks that do not know each other: start torchrun or deepspeed in one task a node"
        )
    if "RANK" not in os.environ:  # without a launcher DeepSpeed would look for MPI
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ |= {key: str(value) for key, value in alone.items()}
    local, ranks_here = int(os.environ["LOCAL_RANK"]), os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    local_ranks = int(os.environ.setdefault("LOCAL_WORLD_SIZE", ranks_here))  # DeepSpeed says LOCAL_SIZE, torchrun this
    if use_cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        keep_memory()
    deepspeed = _deepspeed()
    if not use_cuda:  # else an op for inference is compiled at the first start: half a minute, and needs a compiler
        deepspeed.ops.__compatible_ops__ = {}
    patience = timedelta(minutes=run.hang_minutes + 10)  # the watchdog comes first: it knows who is waited for
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", verbose=False, timeout=patience)
    where = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), where)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _deepspeed():
    """DeepSpeed, imported when it is needed (seconds) and without its chatter."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def precision(optim: Optim, device: torch.device) -> str:
    """fp32 or bf16. Raises `UserError` for bf16 on a GPU that has none."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if optim.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("optim.precision is bf16, but this GPU has no bf16: use fp32")
    if optim.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return optim.precision


def build_engine(model: nn.Module, groups: list[dict], optim: Optim, world: World):
    """Wrap a model into a DeepSpeed engine with AdamW.

    Args:
        model: on any device; its forward returns the loss of a micro batch
        groups: parameter groups with `weight_decay` and `lr_scale`
        optim: batch sizes, betas, clipping, precision, ZeRO stage
    Raises:
        UserError: the global batch is not a whole number of micro batches
    """
    micro, accumulation = optim.accumulation(world.ranks)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": optim.zero_stage},
        "zero_allow_untested_optimizer": True,
        # set, because DeepSpeed's own default is 1; without ZeRO `_measure` clips
        "gradient_clipping": optim.clip_grad if optim.zero_stage else 0.0,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
        # weights stay fp32, and so does the reduction of gradients
        "torch_autocast": {
            "enabled": precision(optim, world.device) == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    if optim.zero_stage == 0:
        optimizer.register_step_pre_hook(lambda *_: _measure(optimizer, optim.clip_grad))
    engine, *_ = _deepspeed().initialize(model=model.to(world.device), optimizer=optimizer, config=config)
    return engine


def _measure(optimizer: torch.optim.Optimizer, clip: float) -> None:
    """What only ZeRO's optimizer does: measure the gradient's norm, clip it, skip the step if it is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer._global_grad_norm = norm  # the engine reads these two
    optimizer.overflow = not bool(torch.isfinite(norm))
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # fused AdamW leaves weights and state alone where it is 1
    if clip and not optimizer.overflow:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def load_engine(engine, folder: Path, tag: str, universal: bool = False) -> dict:
    """Load a checkpoint of DeepSpeed's, the run's own: its files are pickles. Returns the client state."""
    engine._config.load_universal_checkpoint = universal
    try:
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    if path is None:
        raise UserError(f"{folder} could not be loaded: delete it to go on from the one before")
    return state


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO 1 or 2 so that any number of ranks can load it. One process calls this."""
    _deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options
            )
        )


def whole_weights(engine):
    """A context in which `engine.module` has all its weights on every rank; every rank enters it. For ZeRO 3."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(list(engine.module.parameters()))


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: Callable[[str], float] | None = None
) -> list[dict]:
    """AdamW's parameter groups, one for each pair of decay and learning rate scale.

    Biases, norms, GRN, layer scale and mask token have no weight decay: they are the parameters with one dimension.
    `lr_scale` gives a parameter's factor of the learning rate from its name (layer decay).
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        scale = lr_scale(name) if lr_scale else 1.0
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators; 0 <= seed < 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_lr(engine, lr: float) -> None:
    """Set the learning rate of every group, times the group's own scale (layer decay)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    torch.distributed.all_reduce(values)
    return values


def gather(value: object) -> list:
    """Each rank's value, on all ranks, in their order. For plain values, rarely: they are pickled."""
    values: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Agreement:
    """The greatest of all ranks' values, as they were one call before, so that asking waits for nobody.

    Args:
        count: values in a call
    """

    def __init__(self, world: World, count: int):
        self.group = torch.distributed.new_group(backend="gloo") if world.ranks > 1 else None
        self.values, self.work = torch.zeros(count, dtype=torch.int64), None

    def __call__(self, *values: int) -> list[int]:
        """Every rank calls this equally often. With one rank its own values come back at once."""
        if self.group is None:
            return [int(value) for value in values]
        if self.work:
            self.work.wait()
        agreed, self.values = self.values.tolist(), torch.tensor([int(value) for value in values])
        self.work = torch.distributed.all_reduce(self.values, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        return agreed


@contextmanager
def peers() -> Iterator[None]:
    """A context in which a connection lost to another rank is a `LostPeer`, and a dead loader process a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in LOST):
            raise LostPeer("another rank ended: look at what it printed") from error
        if str(error).startswith("DataLoader worker"):  # torch raises this wherever the training is at that moment
            raise UserError(f"a loader process died ({reason(error)}): lower data.workers if memory ran out") from error
        raise


def agree(value: str) -> str:
    """The first rank's value, on all ranks: what one machine sees of a file system another may not see yet."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def stop() -> None:
    """Leave the process group, so that nothing complains at exit."""
    torch.distributed.destroy_process_group()
