"""The sizes of ConvNeXt by name. Does not import torch, so that a wrong name fails at once."""

from configs.errors import UserError, nearest
from configs.schema import CHANNELS, PATCH_PER_STEM_STRIDE, STEM_STRIDE, Encoder, visible_patches

SHAPES = {  # depths and first width; the width doubles from stage to stage
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "xlarge": ((3, 3, 27, 3), 256),
    "huge": ((3, 3, 27, 3), 352),
}
# From the papers; V2's small and V1's atto to nano are from timm
SIZES = {f"convnextv2_{size}": shape for size, shape in SHAPES.items() if size != "xlarge"}
SIZES |= {f"convnext_{size}": shape for size, shape in SHAPES.items() if size != "huge"}


def resolve(arch: Encoder) -> Encoder:
    """Fill in the depths and widths that the name implies. Raises `UserError` for an unknown or missing name."""
    if arch.name not in SIZES:
        raise UserError(f"model.name {arch.name!r} is not a model {nearest(str(arch.name), SIZES)}")
    depths, width = SIZES[arch.name]
    dims = tuple(arch.dims or (width * 2**i for i in range(4)))
    stride = arch.stem_stride or STEM_STRIDE
    return Encoder(arch.name, arch.channels or CHANNELS, stride, tuple(arch.depths or depths), dims)


def check_size(stem_stride: int, mask_ratio: float, grid: tuple[int, int]) -> None:
    """Raise `UserError` if a mask of this ratio hides no patch of this grid."""
    patches = grid[0] * grid[1]
    if visible_patches(patches, mask_ratio) == patches:
        raise UserError(
            f"data.size gives {patches} patch(es) of {PATCH_PER_STEM_STRIDE * stem_stride} pixels: none is hidden at "
            f"objective.mask_ratio {mask_ratio}; use larger images or a smaller model.stem_stride"
        )
