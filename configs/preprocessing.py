"""Image preprocessing of a model: recorded in its weight file, repeated by evaluation, prediction and export."""

import math
from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import Augment, require

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
MAX_SIDE = 1 << 16  # pixels


@dataclass(frozen=True)
class Preprocessing:
    """How an image is resized, cropped and normalised before it enters a model. This class alone validates the values.

    Raises `UserError` for a value out of range, or mean and std that do not match `channels`.
    """

    size: tuple[int, int]  # height and width, pixels
    channels: int
    mean: tuple[float, ...] | None = None  # of each channel, for pixels from 0 to 1; None = unknown
    std: tuple[float, ...] | None = None  # likewise
    crop: float = Augment.eval_crop  # side of the centre crop relative to the resized image; 1 = resize all to `size`
    interpolation: str = "bicubic"  # bicubic, bilinear or nearest, antialiased
    bit_depth: int | None = None  # bits per channel of the training images; None = not recorded

    def __post_init__(self):
        sides = len(self.size) == 2 and all(type(side) is int and 0 < side < MAX_SIDE for side in self.size)
        require(sides, "size", self.size, "height and width in pixels")
        require((self.mean is None) == (self.std is None), "std", self.std, "given with mean, or null with it")
        for key in ("mean", "std"):
            values = getattr(self, key)
            fits = values is None or (len(values) == self.channels and all(map(math.isfinite, values)))
            require(fits, key, values, f"null or {self.channels} finite numbers, one per input channel")
        require(self.std is None or min(self.std) > 0, "std", self.std, "positive")
        require(0 < self.crop <= 1, "eval_crop", self.crop, "above 0 and at most 1")
        known = self.interpolation in INTERPOLATIONS
        require(known, "interpolation", self.interpolation, f"one of {', '.join(INTERPOLATIONS)}")
        require(self.bit_depth is None or 0 < self.bit_depth <= 64, "bit_depth", self.bit_depth, "from 1 to 64")

    @classmethod
    def from_dict(cls, stored: dict, channels: int) -> "Preprocessing":
        """Preprocessing stored in a weight file: size, mean, std; optionally eval_crop, interpolation and bit_depth.

        Missing optional values take the defaults of the class. Raises `UserError` for a missing or invalid value.
        """
        if missing := {"size", "mean", "std"} - stored.keys():
            raise UserError(f"no {', '.join(sorted(missing))}")
        mean, std = (None if stored[key] is None else tuple(stored[key]) for key in ("mean", "std"))
        names = {"eval_crop": "crop", "interpolation": "interpolation", "bit_depth": "bit_depth"}
        optional = {name: stored[key] for key, name in names.items() if stored.get(key) is not None}
        return cls(tuple(stored["size"]), channels, mean, std, **optional)

    def to_dict(self) -> dict:
        """Plain values under the keys of a weight file; the inverse of `from_dict`."""
        mean, std = (None if values is None else list(values) for values in (self.mean, self.std))
        stored = {"size": list(self.size), "mean": mean, "std": std, "eval_crop": self.crop}
        stored["interpolation"] = self.interpolation
        return stored if self.bit_depth is None else stored | {"bit_depth": self.bit_depth}
