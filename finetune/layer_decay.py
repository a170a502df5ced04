"""Layer-wise learning rate decay: the learning rate decreases from the head to the stem.

Two definitions of a layer, as in ConvNeXt V2 (2301.00808, appendix A.2): with `single` every block is a layer; with
`group` there are 12: each of the other stages, and the third stage in ninths.
"""

from collections.abc import Callable

THIRD_STAGE_GROUPS = 9  # layers 3 to 11


def layer_decay(decay: float, depths: tuple[int, ...], kind: str) -> Callable[[str], float]:
    """Learning rate factor by parameter name: decay ** (number of layers above)."""
    number = single_layer if kind == "single" else group_layer
    head = number("head", depths)
    return lambda name: decay ** (head - number(name, depths))


def single_layer(name: str, depths: tuple[int, ...]) -> int:
    """Layer of a parameter, one per block: 1 for stem and first block, ..., sum(depths) + 1 for the head."""
    if name.startswith("stem."):
        return 1  # as in the published code, layer 0 is empty
    if not name.startswith("stages."):
        return sum(depths) + 1
    _, stage, part, *rest = name.split(".")
    return 1 + sum(depths[: int(stage)]) + (int(rest[0]) if part == "blocks" else 0)


def group_layer(name: str, depths: tuple[int, ...]) -> int:
    """Layer of a parameter in 12 groups: 0 stem, 1 and 2 first stages, 3 to 11 third, 12 last, 13 head."""
    if name.startswith("stem."):
        return 0
    if not name.startswith("stages."):
        return 13
    _, stage, part, *rest = name.split(".")
    if stage == "2" and part == "blocks":
        return 3 + int(rest[0]) * THIRD_STAGE_GROUPS // depths[2]  # depth 27: three blocks per group
    return (1, 2, 3, 12)[int(stage)]
