"""AdamW's parameter groups: weight decay by shape and rule, learning rate scale by layer."""

import fnmatch
from collections.abc import Callable

from torch import nn

from configs.errors import UserError
from configs.schema import Optim


def parameter_groups(model: nn.Module, optim: Optim, lr_scale: Callable[[str], float] = lambda _: 1.0) -> list[dict]:
    """One group for each pair of weight decay and learning rate scale; frozen parameters are in none.

    Parameters of one dimension (biases, norms, GRN, layer scale, mask token) have no weight decay. `optim.decay_rules`
    overrides decays by name; `UserError` if one matches no parameter. `lr_scale` maps a parameter's name to its factor
    of the learning rate (layer decay).
    """
    rules = optim.decay_rules or {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in rules:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"optim.decay_rules: {pattern} matches no parameter; --dry-run --parameters prints their names"
            )
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim == 1 else optim.weight_decay
        for pattern, value in rules.items():
            decay = value if fnmatch.fnmatchcase(name, pattern) else decay
        scale = lr_scale(name)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())
