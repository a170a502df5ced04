"""Layer-wise learning rate decay: the lower a layer, the smaller its learning rate.

Two ways of counting layers, as published with ConvNeXt V2 (appendix A.2): `single` gives each block its own, `group`
divides the network into 12, each of them a ninth of the third stage or one of the other stages.
"""

from collections.abc import Callable

GROUPS = 12
THIRD_STAGE_GROUPS = 9  # layers 3 to 11


def layer_decay(decay: float, depths: tuple[int, ...], kind: str) -> Callable[[str], float]:
    """Factor of the learning rate for a parameter name: decay ** (number of layers above it)."""
    layers = sum(depths) if kind == "single" else GROUPS
    number = single_layer if kind == "single" else group_layer
    return lambda name: decay ** (layers + 1 - number(name, depths))


def single_layer(name: str, depths: tuple[int, ...]) -> int:
    """Layer of a parameter where each block is one: 1 for stem and first block, ..., sum(depths) + 1 for the head."""
    if name.startswith("stem."):
        return 1  # with the first block: the published code leaves layer 0 empty
    if not name.startswith("stages."):
        return sum(depths) + 1
    _, stage, part, *rest = name.split(".")
    below = sum(depths[: int(stage)])
    return below + (int(rest[0]) if part == "blocks" else 0) + 1


def group_layer(name: str, depths: tuple[int, ...]) -> int:
    """Layer of a parameter in 12 groups: 0 stem, 1 and 2 the first stages, 3 to 11 the third, 12 the last, 13 head."""
    if name.startswith("stem."):
        return 0
    if not name.startswith("stages."):
        return GROUPS + 1
    _, stage, part, *rest = name.split(".")
    if stage == "3":
        return GROUPS
    if stage == "2" and part == "blocks":
        return 3 + int(rest[0]) * THIRD_STAGE_GROUPS // depths[2]  # depth 27: three blocks a group
    return int(stage) + 1
