"""Parameter groups: weight decay by shape and rule, learning rate scale by layer, optimizer by layer."""

import fnmatch
from collections.abc import Callable

from torch import nn

from configs.errors import UserError
from configs.schema import Optim
from launch.training.muon import is_matrix


def parameter_groups(model: nn.Module, optim: Optim, lr_scale: Callable[[str], float] = lambda _: 1.0) -> list[dict]:
    """One group for each weight decay, learning rate scale and `optimizer`; frozen parameters are in none.

    Parameters of one dimension (biases, norms, GRN, layer scale, mask token) have no weight decay. `optim.decay_rules`
    overrides decays by name; `UserError` if one matches no parameter. `lr_scale` maps a parameter's name to its factor
    of the learning rate (layer decay). With `optim.name` muon, `optimizer` is muon for the matrices that
    `is_matrix` names, otherwise adamw; `UserError` if there are none.
    """
    rules = optim.decay_rules or {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in rules:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"optim.decay_rules: {pattern} matches no parameter; --dry-run --parameters prints their names"
            )
    groups: dict[tuple[float, float, str], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim == 1 else optim.weight_decay
        for pattern, value in rules.items():
            decay = value if fnmatch.fnmatchcase(name, pattern) else decay
        scale = lr_scale(name)
        kind = "muon" if optim.name == "muon" and is_matrix(name) else "adamw"
        empty = {"params": [], "weight_decay": decay, "lr_scale": scale, "optimizer": kind}
        groups.setdefault((decay, scale, kind), empty)["params"].append(parameter)
    if optim.name == "muon" and not any(group["optimizer"] == "muon" for group in groups.values()):
        raise UserError("optim.name is muon, but no matrix of a block is trained: use optim.name adamw")
    return list(groups.values())
