"""DeepSpeed: the only module that imports it. Starting ranks, the optimizer, the engine, and sums over ranks."""

import logging
import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Optim, Run
from launch.memory import keep_memory
from models import kernels


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
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", verbose=False)
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
        "gradient_clipping": optim.clip_grad,  # set, because DeepSpeed's own default is 1
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
    if optim.zero_stage == 0:  # the engine reports the norm that its optimizer measured; torch's own measures none
        optimizer.register_step_pre_hook(_measure_norm)
    engine, *_ = _deepspeed().initialize(model=model.to(world.device), optimizer=optimizer, config=config)
    return engine


def _measure_norm(optimizer: torch.optim.Optimizer, *_) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer._global_grad_norm = torch.nn.utils.get_total_norm(gradients)


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
