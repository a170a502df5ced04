"""Names and shapes of a ConvNeXt's tensors in each project; see the table in docs/weights.md.

This project uses timm's names. A dict per format maps them to another project's, in both directions: {i} is a stage,
{j} a block, {k} 1 or 2, {n} 0 or 1, {p} `weight` or `bias`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from configs.errors import UserError
from models.sparse.taps import from_taps, to_taps

FIELDS = {"i": r"[0-3]", "j": r"\d{1,3}", "k": r"[12]", "n": r"[01]", "p": r"weight|bias"}

TABLES = {
    "official": {
        "stem.{n}.{p}": "downsample_layers.0.{n}.{p}",
        "stages.{i}.downsample.{n}.{p}": "downsample_layers.{i}.{n}.{p}",
        "stages.{i}.blocks.{j}.conv_dw.{p}": "stages.{i}.{j}.dwconv.{p}",
        "stages.{i}.blocks.{j}.norm.{p}": "stages.{i}.{j}.norm.{p}",
        "stages.{i}.blocks.{j}.mlp.fc{k}.{p}": "stages.{i}.{j}.pwconv{k}.{p}",
        "stages.{i}.blocks.{j}.mlp.grn.weight": "stages.{i}.{j}.grn.gamma",
        "stages.{i}.blocks.{j}.mlp.grn.bias": "stages.{i}.{j}.grn.beta",
        "stages.{i}.blocks.{j}.gamma": "stages.{i}.{j}.gamma",
        "head.norm.{p}": "norm.{p}",
        "head.fc.{p}": "head.{p}",
    },
    "official-sparse": {
        "stem.{n}.{p}": "encoder.downsample_layers.0.{n}.{p}",
        "stages.{i}.downsample.0.{p}": "encoder.downsample_layers.{i}.0.ln.{p}",
        "stages.{i}.downsample.1.weight": "encoder.downsample_layers.{i}.1.kernel",
        "stages.{i}.downsample.1.bias": "encoder.downsample_layers.{i}.1.bias",
        "stages.{i}.blocks.{j}.conv_dw.weight": "encoder.stages.{i}.{j}.dwconv.kernel",
        "stages.{i}.blocks.{j}.conv_dw.bias": "encoder.stages.{i}.{j}.dwconv.bias",
        "stages.{i}.blocks.{j}.norm.{p}": "encoder.stages.{i}.{j}.norm.ln.{p}",
        "stages.{i}.blocks.{j}.mlp.fc{k}.{p}": "encoder.stages.{i}.{j}.pwconv{k}.linear.{p}",
        "stages.{i}.blocks.{j}.mlp.grn.weight": "encoder.stages.{i}.{j}.grn.gamma",
        "stages.{i}.blocks.{j}.mlp.grn.bias": "encoder.stages.{i}.{j}.grn.beta",
        "proj.{p}": "proj.{p}",
        "mask_token": "mask_token",
        "decoder.{j}.conv_dw.{p}": "decoder.{j}.dwconv.{p}",
        "decoder.{j}.norm.{p}": "decoder.{j}.norm.{p}",
        "decoder.{j}.mlp.fc{k}.{p}": "decoder.{j}.pwconv{k}.{p}",
        "decoder.{j}.mlp.grn.weight": "decoder.{j}.grn.gamma",
        "decoder.{j}.mlp.grn.bias": "decoder.{j}.grn.beta",
        "pred.{p}": "pred.{p}",
    },
    "transformers": {
        "stem.0.{p}": "embeddings.patch_embeddings.{p}",
        "stem.1.{p}": "embeddings.layernorm.{p}",
        "stages.{i}.downsample.{n}.{p}": "encoder.stages.{i}.downsampling_layer.{n}.{p}",
        "stages.{i}.blocks.{j}.conv_dw.{p}": "encoder.stages.{i}.layers.{j}.dwconv.{p}",
        "stages.{i}.blocks.{j}.norm.{p}": "encoder.stages.{i}.layers.{j}.layernorm.{p}",
        "stages.{i}.blocks.{j}.mlp.fc{k}.{p}": "encoder.stages.{i}.layers.{j}.pwconv{k}.{p}",
        "stages.{i}.blocks.{j}.mlp.grn.{p}": "encoder.stages.{i}.layers.{j}.grn.{p}",
        "stages.{i}.blocks.{j}.gamma": "encoder.stages.{i}.layers.{j}.layer_scale_parameter",
        "head.norm.{p}": "layernorm.{p}",
        "head.fc.{p}": "classifier.{p}",
    },
}
TABLES["timm"] = {ours: ours for ours in TABLES["official"]}
TABLES["timm-features"] = {  # of features_only, and of the encoders in segmentation_models_pytorch
    ours: ours.replace("stem.", "stem_").replace("stages.", "stages_")
    for ours in TABLES["timm"]
    if not ours.startswith("head.")
}
TABLES["mmpretrain"] = {  # the official names with other words
    ours: theirs.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
    for ours, theirs in TABLES["official"].items()
} | {"head.norm.{p}": "norm3.{p}", "head.fc.{p}": "head.fc.{p}"}
TABLES["torchvision"] = {"stem.{n}.{p}": "0.{n}.{p}"}  # V1 only; odd numbers are stages
for _i in range(4):
    TABLES["torchvision"] |= {
        f"stages.{_i}.downsample.{{n}}.{{p}}": f"{2 * _i}.{{n}}.{{p}}",
        f"stages.{_i}.blocks.{{j}}.conv_dw.{{p}}": f"{2 * _i + 1}.{{j}}.block.0.{{p}}",
        f"stages.{_i}.blocks.{{j}}.norm.{{p}}": f"{2 * _i + 1}.{{j}}.block.2.{{p}}",
        f"stages.{_i}.blocks.{{j}}.mlp.fc1.{{p}}": f"{2 * _i + 1}.{{j}}.block.3.{{p}}",
        f"stages.{_i}.blocks.{{j}}.mlp.fc2.{{p}}": f"{2 * _i + 1}.{{j}}.block.5.{{p}}",
        f"stages.{_i}.blocks.{{j}}.gamma": f"{2 * _i + 1}.{{j}}.layer_scale",
    }
TABLES["torchvision"] |= {"head.norm.{p}": "classifier.0.{p}", "head.fc.{p}": "classifier.2.{p}"}

# torch.compile and FSDP add these anywhere in a name
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MARKS = {  # names that only one format has, after any prefix; `own` is the format's prefix of all but its classifier
    "official-sparse": r"encoder\.(stages|downsample_layers)\..*\.(kernel|ln\.\w+|linear\.\w+)",
    "mmpretrain": r"(?P<own>backbone\.)?stages\.\d+\.\d+\.(depth|point)wise_conv\d?\.\w+",
    "timm": r"stages\.\d+\.blocks\..*",
    "timm-features": r"stages_\d+\.blocks\..*",
    "transformers": r"(?P<own>convnext(v2)?\.)?encoder\.stages\.\d+\.layers\..*",
    "official": r"stages\.\d+\.\d+\.dwconv\.\w+",
    "torchvision": r"(?P<own>features\.)?\d\.\d+\.block\.\d\.\w+",
}
# outside of the format's own prefix
CLASSIFIERS = {"transformers": "classifier.", "mmpretrain": "head.fc.", "torchvision": "classifier."}
STAGE_NORMS = {  # added by backbones for detection and segmentation
    "transformers": r"hidden_states_norms\.", "mmpretrain": r"norm\d\.", "official": r"norm\d\.",
}  # fmt: skip
OTHERS = {  # models that are taken for a ConvNeXt, by a name
    "a vision transformer": r".*(blocks\.\d+\.attn\.(qkv|proj)|encoder\.layers?\.\d+\.(self_)?attention)\..*",
    "a Swin transformer": r".*attn\.relative_position_bias_table",
    "a ResNet": r".*layer1\.0\.(conv1|bn1)\..*",
    "an EfficientNet or MobileNet": r".*blocks\.\d+\.\d+\.conv_(pw|pwl|dw)\..*|features\.\d+\.\d+\.block\.\d\.0\..*",
}
CONV_MLP = ("atto", "femto", "pico", "nano")  # sizes whose fc1 and fc2 are 1x1 convolutions in timm


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(template)))


_TO = {form: [(_pattern(ours), theirs) for ours, theirs in rows.items()] for form, rows in TABLES.items()}
_FROM = {form: [(_pattern(theirs), ours) for ours, theirs in rows.items()] for form, rows in TABLES.items()}


def _rename(name: str, rows: list[tuple[re.Pattern, str]]) -> str | None:
    matches = ((pattern.fullmatch(name), template) for pattern, template in rows)
    return next((template.format(**match.groupdict()) for match, template in matches if match), None)


def to_name(ours: str, form: str) -> str | None:
    """A tensor's name in another format, without the format's prefix; None if the format has no such tensor."""
    return _rename(ours, _TO[form])


def from_name(theirs: str, form: str) -> str | None:
    """This project's name for a tensor of another format, without prefixes; None if the format has no such name."""
    return _rename(theirs, _FROM[form])


class Detected(NamedTuple):
    """The format of a state dict, and the prefixes of its names: the wrapper's, then the format's own."""

    form: str
    outer: str
    own: str

    def ours(self, name: str) -> str | None:
        """This project's name for a tensor of the state dict; None if it is not the model's."""
        outside = name.startswith(self.outer + CLASSIFIERS.get(self.form, "\0"))
        prefix = self.outer if outside else self.outer + self.own
        return from_name(name.removeprefix(prefix), self.form) if name.startswith(prefix) else None

    def theirs(self, ours: str) -> str:
        """The name in the state dict of a tensor that the format has."""
        name = to_name(ours, self.form)
        return self.outer + ("" if name.startswith(CLASSIFIERS.get(self.form, "\0")) else self.own) + name


def detect(names: Iterable[str]) -> Detected | None:
    """Format of a state dict, by names unique to a format, after any common prefix; None if there are none.

    Raises `UserError` if there are several encoders.
    """
    names = list(names)
    for form, mark in MARKS.items():
        matches = (re.fullmatch(rf"(?P<outer>(?:.*?\.)??){mark}", name) for name in names)
        found = {(m["outer"], m.groupdict().get("own") or "") for m in matches if m}
        if len(found) > 1:
            encoders = ", ".join(sorted(map("".join, found)))
            raise UserError(f"contains several encoders ({encoders}): save one of them alone")
        if found:
            return Detected(form, *found.pop())
    return None


def seems(names: Iterable[str]) -> str:
    """What a state dict of no known format seems to be, for a message; empty if that is not known either."""
    names = list(names)
    kinds = (kind for kind, mark in OTHERS.items() if any(re.fullmatch(mark, name) for name in names))
    return next(kinds, "")


def to_shape(ours: str, tensor: Tensor, form: str, conv_mlp: bool = False) -> Tensor:
    """The tensor `ours` in another format's shape and order of kernel taps; `conv_mlp` is for timm, see `CONV_MLP`."""
    sparse = form == "official-sparse"
    if sparse and re.fullmatch(r"stages\..*(conv_dw|downsample\.1)\.weight", ours):
        return to_taps(tensor).squeeze(1) if "conv_dw" in ours else to_taps(tensor)
    if sparse and re.fullmatch(r"stages\..*(conv_dw\.bias|downsample\.1\.bias|grn\..*)", ours):
        return tensor[None]
    if form in ("official", "official-sparse", "transformers") and ".grn." in ours:
        return tensor[None, None, None]
    if form == "torchvision" and ours.endswith(".gamma"):
        return tensor[:, None, None]
    convolution = form.startswith("timm") and conv_mlp and re.search(r"\.mlp\.fc\d\.weight", ours)
    if convolution or ours in ("proj.weight", "pred.weight"):
        return tensor[:, :, None, None]
    return tensor[None, :, None, None] if ours == "mask_token" else tensor


def from_shape(ours: str, tensor: Tensor, form: str, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `to_shape`; `shape` is that of this project's tensor."""
    if form == "official-sparse" and tensor.ndim in (2, 3) and len(shape) == 4:  # a kernel of MinkowskiEngine
        return from_taps(tensor[:, None] if tensor.ndim == 2 else tensor).contiguous()
    return tensor.reshape(shape)  # all others differ in axes of length 1 only
