"""The sizes of ConvNeXt by name. Does not import torch, so that a wrong name fails at once."""

from configs.errors import UserError, nearest
from configs.schema import (
    CHANNELS,
    PATCH_PER_STEM_STRIDE,
    STEM_STRIDE,
    Encoder,
    FCMAESettings,
    PretrainModel,
    visible_patches,
)

# name: depths and first width; the width doubles from stage to stage
SIZES = {
    "convnextv2_atto": ((2, 2, 6, 2), 40),
    "convnextv2_femto": ((2, 2, 6, 2), 48),
    "convnextv2_pico": ((2, 2, 6, 2), 64),
    "convnextv2_nano": ((2, 2, 8, 2), 80),
    "convnextv2_tiny": ((3, 3, 9, 3), 96),
    "convnextv2_base": ((3, 3, 27, 3), 128),
    "convnextv2_large": ((3, 3, 27, 3), 192),
    "convnextv2_huge": ((3, 3, 27, 3), 352),
    "convnextv2_small": ((3, 3, 27, 3), 96),  # from timm, like the four smallest of V1; the others are from the papers
    "convnext_atto": ((2, 2, 6, 2), 40),
    "convnext_femto": ((2, 2, 6, 2), 48),
    "convnext_pico": ((2, 2, 6, 2), 64),
    "convnext_nano": ((2, 2, 8, 2), 80),
    "convnext_tiny": ((3, 3, 9, 3), 96),
    "convnext_small": ((3, 3, 27, 3), 96),
    "convnext_base": ((3, 3, 27, 3), 128),
    "convnext_large": ((3, 3, 27, 3), 192),
    "convnext_xlarge": ((3, 3, 27, 3), 256),
}


def resolve(arch: Encoder) -> Encoder:
    """Fill in the depths and widths that the name implies. Raises `UserError` for an unknown or missing name."""
    if arch.name not in SIZES:
        raise UserError(f"model.name {arch.name!r} is not a model {nearest(str(arch.name), SIZES)}")
    depths, width = SIZES[arch.name]
    return Encoder(
        name=arch.name,
        channels=arch.channels or CHANNELS,
        stem_stride=arch.stem_stride or STEM_STRIDE,
        depths=tuple(arch.depths or depths),
        dims=tuple(arch.dims or (width * 2**i for i in range(4))),
    )


def check_size(config: PretrainModel, settings: FCMAESettings, grid: tuple[int, int]) -> None:
    """Raise `UserError` if a mask of this ratio hides no patch of this grid."""
    patches = grid[0] * grid[1]
    if visible_patches(patches, settings.mask_ratio) == patches:
        raise UserError(
            f"data.size gives {patches} patch(es) of {PATCH_PER_STEM_STRIDE * config.stem_stride} pixels: none "
            f"is hidden at objective.mask_ratio {settings.mask_ratio}; use larger images or a smaller model.stem_stride"
        )
