"""Trained networks of this project, of timm and of transformers, as feature extractors for `models.teacher`.

No code of a file or of a hub is executed.
"""

import warnings
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError, few, nearest, reason
from configs.log import say
from configs.preprocessing import Preprocessing
from configs.schema import PATCH_PER_STEM_STRIDE, Encoder
from models.formats.containers import CONFIG, PROCESSOR, read_container
from models.formats.files import read_json
from models.formats.hub import hub_errors, localize
from models.formats.metadata import preprocessing
from models.opening import open_encoder
from models.sizes import SIZES
from models.sparse.layouts import Dense
from models.weights import load_strict

TIMM = "timm:"  # prefix of a timm model's name
LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}  # not from a file
OURS = {*SIZES, "convnext", "convnextv2"}  # architectures, in model folders, that this project has itself


class Network(nn.Module):
    """A trained network: forward maps normalised images [B, C, H, W] to features [B, h, w, D] and [B, E].

    Attributes:
        channels: C
        mean, std: of each channel, for pixels from 0 to 1
        stride: pixels along the side of a cell of its feature map
    """

    def __init__(self, source: str, model: nn.Module, stride: int, image: Preprocessing):
        super().__init__()
        self.source, self.model, self.stride = source, model, stride
        self.channels, self.mean, self.std = image.channels, image.mean, image.std

    def set_size(self, size: tuple[int, int]) -> None:
        """Prepare for images of this height and width, multiples of the stride."""

    def as_map(self, x: object, image: Tensor, prefixes: tuple[int, ...] = (0,), last: bool = False) -> Tensor:
        """A model's output as a map [B, h, w, D]: a map already, or rows of tokens behind a number of others.

        Args:
            x: [B, D, h, w], [B, h, w, D], or tokens [B, p + h * w, D]
            prefixes: possible numbers p
            last: whether maps are [B, h, w, D], where both would fit
        Raises:
            UserError: it is none of these
        """
        grid = image.shape[2] // self.stride, image.shape[3] // self.stride
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if isinstance(x, Tensor) and x.ndim == 4:
            if tuple(x.shape[2:]) == grid and not last:
                return x.permute(0, 2, 3, 1)
            if tuple(x.shape[1:3]) == grid:
                return x
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] - grid[0] * grid[1] in prefixes:
            return x[:, x.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)
        raise UserError(
            f"objective.teacher {self.source} has no feature map of {grid[0]}x{grid[1]} cells for an image of "
            f"{image.shape[2]}x{image.shape[3]} pixels, but {shape}: use another model"
        )


class OwnNetwork(Network):
    """A ConvNeXt of this project."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.forward_features(image, Dense())
        return x, x.mean((1, 2))


class TimmNetwork(Network):
    """A model of timm without a classifier."""

    def set_size(self, size: tuple[int, int]) -> None:
        """Resample what depends on the size: position embeddings of transformers."""
        if hasattr(self.model, "set_input_size"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch, about the speed of Swin's interpolation
                self.model.set_input_size(img_size=size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.forward_features(image)
        prefix, last = getattr(self.model, "num_prefix_tokens", 0), getattr(self.model, "output_fmt", "") == "NHWC"
        return self.as_map(x, image, (prefix,), last), self.model.forward_head(x, pre_logits=True)


class TransformersNetwork(Network):
    """A vision model of transformers. Without pooling layers in its file, its class token or mean is pooled."""

    def __init__(self, source: str, model: nn.Module, stride: int, image: Preprocessing):
        super().__init__(source, model, stride, image)
        self.options = {}
        if "interpolate_pos_encoding" in signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=image, **self.options)
        x = output.last_hidden_state
        tokens = 1 + getattr(self.model.config, "num_register_tokens", 0)
        cells = self.as_map(x, image, (0, 1, 2, tokens))
        if output.pooler_output is not None:
            return cells, output.pooler_output.flatten(1)
        has_class = x.ndim == 3 and x.shape[1] > cells.shape[1] * cells.shape[2]
        return cells, x[:, 0] if has_class else cells.mean((1, 2))


def open_network(source: str) -> Network:
    """Open a weight file or model folder, also on a hub, or `timm:NAME`, a pretrained model of timm by its name.

    Model folders of timm and transformers may have any model with a feature map, files a ConvNeXt. Raises `UserError`
    if they are unreadable or have another model, or a library is missing.
    """
    if source.startswith(TIMM):
        return _named(source)
    path = localize(source).path
    config = read_json(path / CONFIG) if path.is_dir() and (path / CONFIG).is_file() else {}
    architecture, kind = config.get("architecture"), config.get("model_type")
    if isinstance(architecture, str) and architecture not in OURS:
        return _timm_folder(source, path, architecture, config)
    if isinstance(kind, str) and kind not in OURS:
        return _transformers_folder(source, path, config)
    trained = open_encoder(source)
    stride = PATCH_PER_STEM_STRIDE * trained.model.arch.stem_stride
    return OwnNetwork(source, trained.model, stride, trained.preprocessing)


def _named(source: str) -> Network:
    """A pretrained model of timm, from its cache or a hub."""
    import timm

    name = source.removeprefix(TIMM)
    if not timm.is_model(name.partition(".")[0]):
        hint = nearest(name, timm.list_models())
        raise UserError(
            f"objective.teacher {source} is not a model of timm{f' {hint}' if hint.startswith('(nearest') else ''}"
        )
    known = [each for each in timm.list_pretrained() if each.partition(".")[0] == name.partition(".")[0]]
    if not any(name in (each, each.partition(".")[0]) for each in known):
        raise UserError(f"objective.teacher {source} has no pretrained weights in timm ({few(known) or 'none at all'})")
    try:
        with hub_errors(source):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except OSError as error:  # of a download outside of the hub
        raise UserError(
            f"objective.teacher {source} could not be downloaded ({reason(error)}): check the network"
        ) from error
    return _of_timm(source, model, model.pretrained_cfg)


def _timm_folder(source: str, path: Path, architecture: str, config: dict) -> Network:
    """A model folder as timm pushes to a hub."""
    import timm

    if not timm.is_model(architecture):
        raise UserError(f"{source} has the architecture {architecture}, which timm does not have: update timm")
    given = config.get("model_args")
    options = {key: x for key, x in given.items() if key not in LOADING} if isinstance(given, dict) else {}
    try:
        model = timm.create_model(architecture, **{"num_classes": config.get("num_classes", 0), **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: timm cannot build its {architecture} ({reason(error)}): update timm") from error
    load_strict(model, read_container(path).tensors, source)
    model.reset_classifier(0)
    return _of_timm(source, model, config.get("pretrained_cfg") or config)


def _of_timm(source: str, model: nn.Module, config: dict) -> Network:
    try:
        stride = model.feature_info[-1]["reduction"]
    except (AttributeError, LookupError, TypeError):
        raise UserError(f"objective.teacher {source} has no feature map in timm: use another model") from None
    return TimmNetwork(source, model, stride, _image(source, {"pretrained_cfg": config}, "timm", model))


def _transformers_folder(source: str, path: Path, config: dict) -> Network:
    if find_spec("transformers") is None:
        raise UserError(f"objective.teacher {source} needs a library: pip install transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True, "dtype": torch.float32}
    try:
        model, info = transformers.AutoModel.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{source}: transformers cannot load it ({reason(error)}): give another folder") from error
    model = getattr(model, "vision_model", model)  # of CLIP, SigLIP and their like
    missing = [name for name in info["missing_keys"] if "pooler." not in name]
    if missing:
        raise UserError(f"{source} lacks weights of its {config['model_type']}: {few(missing, 5)}")
    metadata = {"image_size": config.get("image_size")}
    if (path / PROCESSOR).is_file():
        metadata["preprocessor"] = read_json(path / PROCESSOR)
    if info["missing_keys"]:
        model.pooler = None  # its weights would be random
    image = _image(source, metadata, "transformers", model)
    return TransformersNetwork(source, model, _stride(source, model.config), image)


def _stride(source: str, config: object) -> int:
    """Pixels along the side of a cell: the patch, twice as many for each stage after the first; without a patch 4."""
    stages, patch = len(getattr(config, "depths", None) or [0]), getattr(config, "patch_size", 4)
    sides = set(patch) if isinstance(patch, list | tuple) else {patch}
    if len(sides) != 1:
        raise UserError(f"objective.teacher {source} has patches of {patch} pixels: use a model with square ones")
    return sides.pop() * 2 ** (stages - 1)


def _image(source: str, metadata: dict, form: str, model: nn.Module) -> Preprocessing:
    """Channels of the model's first convolution; mean and std of the metadata. Assumed ones are logged."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise UserError(f"objective.teacher {source} is not a model of images: use another one")
    remarks: list[str] = []
    image = preprocessing(metadata, form, Encoder(channels=first.in_channels), remarks)
    if image.mean is None:
        raise UserError(f"{source} does not record mean and std of its {image.channels} channels: add them to it")
    for remark in remarks:
        say(f"{source}: {remark}")
    return image
