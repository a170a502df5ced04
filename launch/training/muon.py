"""Muon for the matrices of a ConvNeXt, AdamW for its other parameters.

Muon orthogonalises the momentum of a weight matrix (Keller Jordan, kellerjordan.github.io/posts/muon). Its step is
scaled to the size of AdamW's, so learning rate and weight decay carry over (arXiv 2502.16982, section 2.2).

Muon needs whole matrices. ZeRO cuts the parameters of a group into one flat part for each rank, so a matrix optimizer
would get slices. DeepSpeed therefore runs this optimizer without ZeRO. With optim.zero_stage 1 it shards its state
itself, by whole parameters: a rank has the state of its own ones, updates them and broadcasts them.
"""

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import broadcast

from configs.schema import Optim

# pointwise layers of blocks, and 2x2 downsampling with stride 2, a product with [C_out, 4 C_in], wherever they are;
# hidden layers of the projector of an objective
MATRICES = ("*.mlp.fc[12].weight", "*.downsample.1.weight", "projector.[03].weight")
MOMENTUM = 0.95  # with Nesterov, as in both sources


def is_matrix(name: str) -> bool:
    """Whether Muon updates a parameter. AdamW has stem, depthwise convolutions, norms, biases, GRN, inputs, outputs."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MATRICES)


def state_size(group: dict, parameter: Tensor) -> int:
    """Elements of a parameter's optimizer state: the momentum, with AdamW two."""
    return parameter.numel() * (1 if group["optimizer"] == "muon" else 2)


def owners(groups: Sequence[dict], ranks: int) -> dict[nn.Parameter, int]:
    """The rank that has a parameter's state: the largest state first, always to the rank with the fewest elements."""
    sizes = {parameter: state_size(group, parameter) for group in groups for parameter in group["params"]}
    owner, loads = {}, [0] * ranks
    for parameter in sorted(sizes, key=sizes.__getitem__, reverse=True):
        owner[parameter] = rank = loads.index(min(loads))
        loads[rank] += sizes[parameter]
    return owner


def make_optimizer(groups: list[dict], optim: Optim, rank: int = 0, ranks: int = 1) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` for groups of `parameter_groups`; schedules set its learning rate."""
    if optim.name == "muon":
        return MuonAdamW(groups, optim.betas, rank, ranks)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for groups with `optimizer` muon, torch.optim.AdamW for those with adamw.

    `groups` are those of `parameter_groups`. Weights and gradients are whole on all ranks, only the state is sharded:
    this is `rank` of `ranks`; 0 of 1 on every rank = all have all of it. A checkpoint has the whole state, so another
    number of ranks can load it.

    Attributes:
        overflow: the next step is skipped, because a gradient is not finite
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], rank: int = 0, ranks: int = 1):
        super().__init__(groups, {"lr": 0.0, "fused": True})  # fused: AdamW's step counter is on the device
        self.overflow, self.ranks, self.rank = False, ranks, rank
        self.owner = owners(self.param_groups, ranks)
        self._gathered: dict[Tensor, dict] | None = {} if ranks == 1 else None
        # Muon takes [rows, columns]: views of the weights, also of the 2x2 kernels
        self._updated = {p: p for p, owner in self.owner.items() if owner == rank}
        for group in self.param_groups:
            if group["optimizer"] == "muon":
                own = [p for p in group["params"] if p in self._updated]
                self._updated |= {p: p.detach().view(len(p), -1) for p in own}
        self._own_groups = [self._own_group(group) for group in self.param_groups]
        kinds = {kind: [g for g in self._own_groups if g["optimizer"] == kind] for kind in ("muon", "adamw")}
        scale = {"adjust_lr_fn": "match_rms_adamw", "momentum": MOMENTUM}
        self._parts = [torch.optim.Muon(kinds["muon"], lr=0.0, **scale)] if kinds["muon"] else []
        self._parts += [torch.optim.AdamW(kinds["adamw"], lr=0.0, betas=betas, fused=True)] if kinds["adamw"] else []
        self._share_state()

    def _own_group(self, group: dict) -> dict:
        params = [self._updated[p] for p in group["params"] if p in self._updated]
        return {"params": params, "weight_decay": group["weight_decay"], "optimizer": group["optimizer"]}

    def _share_state(self) -> None:
        """Let `state` and the states of the two optimizers be the same dicts, which are filled by the first step."""
        for group in self.param_groups:
            part = self._parts[0] if group["optimizer"] == "muon" else self._parts[-1]
            for parameter in group["params"]:
                if parameter in self._updated:
                    part.state[self._updated[parameter]] = self.state[parameter]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights, on all ranks, unless `overflow`."""
        if self.overflow:
            return
        for group, own in zip(self.param_groups, self._own_groups, strict=True):
            own["lr"] = group["lr"]
        matrices = [(p, view) for p, view in self._updated.items() if view is not p and p.grad is not None]
        for parameter, view in matrices:
            view.grad = parameter.grad.reshape(view.shape)
        for part in self._parts:
            part.step()
        for _, view in matrices:
            view.grad = None
        if self.ranks > 1:
            for work in [broadcast(p.detach(), owner, async_op=True) for p, owner in self.owner.items()]:
                work.wait()

    def gather_state(self) -> None:
        """Send all ranks' states to the main memory of the first, for its next `state_dict`; all ranks call this."""
        if self.ranks == 1:
            return
        names: list = [None] * self.ranks
        own = {i: {name: x.shape for name, x in self.state.get(p, {}).items()} for i, p in enumerate(self.owner)}
        torch.distributed.all_gather_object(names, own)
        self._gathered = {}
        for i, (parameter, owner) in enumerate(self.owner.items()):
            for name, shape in names[owner][i].items():
                mine = owner == self.rank
                x = self.state[parameter][name] if mine else torch.empty(shape, device=parameter.device)
                broadcast(x, owner)
                if self.rank == 0 and not mine:
                    self._gathered.setdefault(parameter, {})[name] = x.cpu()

    def state_dict(self) -> dict:
        """The whole state. With several ranks, `gather_state` comes first, and only the first rank may call this."""
        if self._gathered is None:
            raise RuntimeError("state_dict of a sharded optimizer without gather_state")
        own, self.state = self.state, {**self.state, **self._gathered}
        self._gathered = {} if self.ranks == 1 else None
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a whole state, of any number of ranks; the states of other ranks' parameters are left out."""
        params = [p for group in self.param_groups for p in group["params"]]
        own = {i: x for i, x in state_dict["state"].items() if params[i] in self._updated}
        super().load_state_dict({**state_dict, "state": own})
        self._share_state()
