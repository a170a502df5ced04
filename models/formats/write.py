"""Write weights for this project and for others (`models.formats.FORMATS`)."""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch

from configs.errors import UserError
from configs.files import atomic_file, sync_folder, write_atomic
from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from configs.shell import quote
from models.convnext import EPS, LAYER_SCALE
from models.formats import is_folder
from models.formats.metadata import RESAMPLE, SQUASH_FROM, WHOLE_CENTRE
from models.formats.names import CLASSIFIERS, CONV_MLP, to_name, to_shape
from models.sizes import resolve
from models.weights import Tensors, Weights, save, use_ema


def write_weights(path: Path, weights: Weights, form: str, card: str = "") -> list[str]:
    """Write weights atomically, to a file or a model folder; returns remarks on omitted parts.

    `card` is the README.md of a folder.

    Raises `UserError` if the library cannot build the model: V1 in the official sparse code, V2 and other stem strides
    than 4 in torchvision, stem stride 2 in timm.
    """
    if path.suffix == ".safetensors" and form != "timm":
        raise UserError(f"{path}: only timm's format can be .safetensors: choose another file name for {form}")
    if form == "ours":
        save(path, weights)
        return []
    if form == "official-sparse" and weights.arch.name.startswith("convnext_"):
        raise UserError(f"{weights.arch.name} has no official-sparse format: the official sparse code is V2 only")
    if form.startswith("timm") and weights.arch.stem_stride == 2:
        raise UserError("model.stem_stride 2 has no timm format: timm's ConvNeXt of patch_size 2 has an extra layer")
    if form == "torchvision" and (weights.arch.name.startswith("convnextv2") or weights.arch.stem_stride != 4):
        raise UserError(f"{weights.arch.name} has no torchvision format: torchvision has ConvNeXt V1 of stem stride 4")
    tensors, remarks = to_form(weights, form)
    if weights.ema is not None and form != "official":
        remarks.append("omitted: the averaged weights (--ema writes them instead of the raw ones)")
    if is_folder(path, form):
        metadata, more = _transformers_files(weights) if form == "transformers" else _timm_files(weights)
        _write_folder(path, metadata | ({"README.md": card.encode()} if card else {}), tensors)
        return remarks + more
    content = _metadata(weights, form)
    if path.suffix == ".safetensors":
        write_atomic(path, _safetensors(tensors, {"config": json.dumps(content)}))
        return remarks
    if form in ("timm-features", "torchvision"):
        content = tensors  # for load_state_dict
    else:
        content["state_dict" if form in ("timm", "mmpretrain") else "model"] = tensors
    if weights.ema is not None and form == "official":
        content["model_ema"], _ = to_form(use_ema(weights, str(path)), form)
    with atomic_file(path) as file:
        torch.save(content, file)
    return remarks


def to_form(weights: Weights, form: str) -> tuple[Tensors, list[str]]:
    """(tensors under a format's names and in its shapes, remarks on omitted and added parts)."""
    kept, remarks = dict(weights.encoder), []
    for part, tensors in (("decoder", weights.decoder), ("head", weights.head)):
        if any(to_name(name, form) is None for name in tensors):
            remarks.append(f"omitted: the {part} (the format cannot store it)")
        else:
            kept |= tensors
    if form in ("timm", "transformers") and not weights.head:
        zeros = torch.zeros(weights.arch.dims[-1], dtype=kept["stem.1.weight"].dtype)
        kept |= {"head.norm.weight": torch.ones_like(zeros), "head.norm.bias": zeros}
        remarks.append("added: an identity as final norm (models of this format always have a norm)")
    conv_mlp = weights.arch.name.endswith(CONV_MLP)
    prefix = f"{_base_class(weights).lower()}." if form == "transformers" and "head.fc.weight" in kept else ""
    prefix = {"mmpretrain": "backbone.", "torchvision": "features."}.get(form, prefix)
    renamed = {}
    for name, tensor in kept.items():
        theirs = to_name(name, form)
        theirs = theirs if theirs.startswith(CLASSIFIERS.get(form, "\0")) else prefix + theirs
        renamed[theirs] = to_shape(name, tensor, form, conv_mlp).contiguous()
    return renamed, remarks


def _safetensors(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """Bytes of a safetensors file; tensors that share memory are copied."""
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, {"format": "pt"} | metadata)


def _base_class(weights: Weights) -> str:
    """First part of the names of transformers' classes for this model."""
    return "ConvNext" if weights.arch.name.startswith("convnext_") else "ConvNextV2"


def _metadata(weights: Weights, form: str) -> dict:
    """Content of a file besides its tensors, as plain values."""
    if form == "timm":
        settings = timm_preprocessing(weights.preprocessing)
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        metadata = {"architecture": weights.arch.name, "num_classes": weights.outputs, "pretrained_cfg": settings}
        return metadata | ({"label_names": weights.classes} if weights.classes else {})
    stored = weights.preprocessing.to_dict()
    if form == "mmpretrain":
        classes = {"dataset_meta": {"classes": weights.classes}} if weights.classes else {}
        return {"meta": classes | {"image": stored}}
    metadata = {"image": stored} | ({"classes": weights.classes} if weights.classes else {})
    return metadata | ({"pretraining": weights.decoder_config} if form == "official-sparse" else {})


def _write_folder(path: Path, metadata: dict[str, bytes], tensors: Tensors) -> None:
    """Write a model folder: the files of its metadata, by name, and model.safetensors."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, content in metadata.items():
            write_atomic(part / name, content)
        write_atomic(part / "model.safetensors", _safetensors(tensors, {}))
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _timm_files(weights: Weights) -> tuple[dict[str, bytes], list[str]]:
    """config.json for timm's `hf-hub:` and `local-dir:`, and remarks."""
    config = _metadata(weights, "timm")
    options, dims = timm_options(weights.arch), weights.arch.dims
    config["pretrained_cfg"] |= {"num_classes": weights.outputs, "first_conv": "stem.0", "classifier": "head.fc"}
    config |= {"num_features": dims[-1]} | ({"model_args": options} if options else {})
    return {"config.json": json.dumps(config, indent=2).encode()}, []


def _transformers_files(weights: Weights) -> tuple[dict[str, bytes], list[str]]:
    """config.json and preprocessor_config.json for transformers' `from_pretrained`, and remarks on omitted parts."""
    processor, remarks = _image_processor(weights.preprocessing), []
    files = {"config.json": json.dumps(_config(weights), indent=2).encode()}
    if processor:
        files["preprocessor_config.json"] = json.dumps(processor, indent=2).encode()
    else:
        remarks.append("omitted: preprocessor_config.json (no transformers processor does this preprocessing)")
    if weights.classes and not weights.outputs:
        remarks.append("omitted: the class names (transformers stores them with a classifier only)")
    return files, remarks


def _config(weights: Weights) -> dict:
    """config.json of transformers' ConvNextConfig or ConvNextV2Config."""
    arch, (height, width) = weights.arch, weights.preprocessing.size
    base, outputs = _base_class(weights), weights.outputs
    config = {
        "architectures": [base + ("ForImageClassification" if outputs else "Model")], "model_type": base.lower(),
        "num_channels": arch.channels, "patch_size": arch.stem_stride,
        "num_stages": 4, "hidden_sizes": list(arch.dims), "depths": list(arch.depths), "hidden_act": "gelu",
        "layer_norm_eps": EPS,  # as trained; the library's default is 1e-12
        "image_size": height if height == width else [height, width],
    }  # fmt: skip
    if base == "ConvNext":
        config["layer_scale_init_value"] = LAYER_SCALE
    if outputs:
        names = weights.classes or [f"LABEL_{i}" for i in range(outputs)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _image_processor(image: Preprocessing) -> dict | None:
    """Content of preprocessor_config.json with the same preprocessing; None if no processor of transformers has it.

    A crop of 1 squashes the image; with a smaller one, the centre crop is this share of the resized image's side.
    """
    (height, width), crop = image.size, image.crop
    if image.mean is None or (crop < 1 and height != width):
        return None
    common = {
        "do_resize": True, "resample": RESAMPLE[image.interpolation],
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(image.mean), "image_std": list(image.std),
    }  # fmt: skip
    if crop == 1:
        return common | {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    if height < SQUASH_FROM:
        kind = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": height}}
        return common | kind | {"crop_pct": 1.0 if crop == WHOLE_CENTRE else crop}
    kind = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": round(height / crop)}}
    return common | kind | {"do_center_crop": True, "crop_size": {"height": height, "width": width}}


def how_to_load(path: Path | str, weights: Weights, form: str, repo: str | None = None) -> str:
    """The command or Python expression that loads a converted file or folder, or the repository it was pushed to."""
    arch, outputs, path = weights.arch, weights.outputs, Path(repo or path)
    if form == "timm" and is_folder(path, form):
        return f"timm.create_model({_timm_folder(path, repo)!r}, pretrained=True)"
    if form == "timm":
        options = {"num_classes": outputs} | timm_options(arch) | {"checkpoint_path": str(path)}
        return _timm_call(arch, options | {"pretrained_cfg_overlay": timm_preprocessing(weights.preprocessing)})
    pretrain = f"python pretrain/main.py --init {quote(str(path))} ...  or  " if weights.decoder and not outputs else ""
    text = json.dumps(str(path))  # a string of Python, whatever the name
    auto = "AutoModelForImageClassification" if outputs else "AutoModel"
    options = {"in_chans": arch.channels} | timm_options(arch) | {"features_only": True}
    return {
        "timm-features": f"{_timm_call(arch, options)}.load_state_dict(torch.load({text}))",
        "torchvision": f"torchvision.models.{arch.name}(num_classes={outputs}).load_state_dict(torch.load({text}))",
        "ours": f"{pretrain}python finetune/main.py --init {quote(str(path))} ...",
        "official": f'model.load_state_dict(torch.load({text})["model"])  # the official code\'s model',
        "official-sparse": f"python main_finetune.py --finetune {quote(str(path))} ...    # of the official code",
        "transformers": f"transformers.{auto}.from_pretrained({text})",
        "mmpretrain": f"mmengine.runner.load_checkpoint(model, {text})",
    }[form]


def how_to_load_backbone(path: Path, weights: Weights, form: str) -> str | None:
    """The Python expression that loads a converted file as a backbone: feature maps of the four stages.

    None if the format's library has no backbones. transformers adds an untrained LayerNorm after each map.
    """
    if form == "timm" and is_folder(path, form):
        return f"timm.create_model({_timm_folder(path, None)!r}, pretrained=True, features_only=True)"
    if form == "timm":
        return _timm_call(weights.arch, timm_backbone(path, weights))
    if form == "transformers":
        stages = ["stage1", "stage2", "stage3", "stage4"]  # AutoBackbone (5.23) accepts hub names only
        text = json.dumps(str(path))
        return f"transformers.{_base_class(weights)}Backbone.from_pretrained({text}, out_features={stages})"
    return None


def _timm_folder(path: Path, repo: str | None) -> str:
    """timm's name of a model folder or of a hub's repository."""
    return f"hf-hub:{repo}" if repo else f"local-dir:{path}"


def timm_options(arch: Encoder) -> dict:
    """Options of `timm.create_model` besides the name."""
    options = {"in_chans": arch.channels} if arch.channels != 3 else {}
    options |= {"patch_size": arch.stem_stride} if arch.stem_stride != 4 else {}
    named = resolve(Encoder(arch.name))
    if (arch.depths, arch.dims) != (named.depths, named.dims):
        options |= {"depths": tuple(arch.depths), "dims": tuple(arch.dims)}
    return options


def timm_preprocessing(image: Preprocessing) -> dict:
    """Preprocessing by timm's names. timm does not read it from a file: without it, it assumes ImageNet's."""
    settings = {
        "input_size": (image.channels, *image.size), "interpolation": image.interpolation,
        "crop_pct": 1.0 if image.crop == WHOLE_CENTRE else image.crop,
        "crop_mode": "squash" if image.crop == 1 else "center",
    }  # fmt: skip
    return settings if image.mean is None else settings | {"mean": tuple(image.mean), "std": tuple(image.std)}


def timm_backbone(path: Path, weights: Weights) -> dict:
    """Options of `timm.create_model` that load a converted file as a backbone.

    timm renames a backbone's tensors, which only `pretrained` handles, not `checkpoint_path`.
    """
    file = {"file": str(path)} | timm_preprocessing(weights.preprocessing)
    return {"features_only": True} | timm_options(weights.arch) | {"pretrained": True, "pretrained_cfg_overlay": file}


def _timm_call(arch: Encoder, options: dict) -> str:
    """The Python expression that creates timm's model."""
    return f"timm.create_model({arch.name!r}{''.join(f', {key}={value!r}' for key, value in options.items())})"
