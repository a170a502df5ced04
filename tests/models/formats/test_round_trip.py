"""Round trips of every format, and comparison with the models of timm and transformers."""

import json

import pytest
import timm
import torch
import torchvision
import transformers

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from models.formats import FORMATS
from models.formats.names import TABLES
from models.formats.read import read_weights, translate
from models.formats.write import how_to_load, how_to_load_backbone, to_form, write_weights
from models.sizes import SIZES
from tests.models.formats.helpers import (
    FILES,
    PLAIN,
    SMALL,
    assert_same,
    autoencoder,
    change,
    classifier,
    logits,
    maps,
    numbered,
    weights_for,
)  # fmt: skip
from tests.models.helpers import assert_close

BIG = ("convnextv2_large", "convnextv2_huge", "convnext_large", "convnext_xlarge")
ALL_SIZES = [pytest.param(name, marks=pytest.mark.slow if name in BIG else ()) for name in SIZES]


SIZES_AND_FORMATS = [
    pytest.param(name, form, marks=pytest.mark.slow if name in BIG else ())
    for name in SIZES
    for form in TABLES
    if form not in ("official-sparse", "torchvision") or name.startswith("convnextv2") == (form == "official-sparse")
]


@pytest.mark.xdist_group("large")  # gigabytes each: never two at once
@pytest.mark.parametrize(("name", "form"), SIZES_AND_FORMATS)
def test_every_size_round_trips(name, form, tmp_path):
    sparse, classes = form == "official-sparse", 0 if form == "timm-features" else 5
    weights = autoencoder(name, fill=numbered, decoder_depth=2) if sparse else classifier(name, classes, numbered)
    tensors, remarks = to_form(weights, form)
    found = translate(tensors, tmp_path)
    assert (found.form, found.arch) == (form, weights.arch) and remarks == found.remarks == []
    assert_same(found.encoder | found.decoder | found.head, weights.encoder | weights.decoder | weights.head)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in PLAIN])
@pytest.mark.parametrize("shape", [{}, {"channels": 1, "stem_stride": 1, **SMALL}], ids=["atto", "small"])
def test_files_round_trip(form, shape, tmp_path):
    """Tensors, architecture, class names, preprocessing, settings of the decoder, and averaged weights."""
    make = autoencoder if form in ("ours", "official-sparse") else classifier
    weights = make(**shape)
    if form in ("ours", "official"):
        weights.ema = {name: tensor + 1 for name, tensor in (weights.encoder | weights.head).items()}
    path = tmp_path / FILES[form]
    assert write_weights(path, weights, form) == []
    found, detected, remarks = read_weights(path)
    assert detected == form and remarks == []
    assert found.arch == weights.arch and found.classes == weights.classes
    assert found.preprocessing == weights.preprocessing
    for key in ("mask_ratio", "norm_pix", "grn_scope", "decoder_dim", "decoder_depth"):
        assert found.decoder_config.get(key) == weights.decoder_config.get(key)
    for part in ("encoder", "decoder", "head"):
        assert_same(getattr(found, part), getattr(weights, part))
    assert (found.ema is None) == (weights.ema is None)
    assert_same(found.ema or {}, weights.ema or {})


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_a_trained_final_norm_without_a_classifier_is_kept(form, tmp_path):
    weights = classifier(**SMALL)
    del weights.head["head.fc.weight"], weights.head["head.fc.bias"]
    write_weights(tmp_path / FILES[form], weights, form)
    assert_same(read_weights(tmp_path / FILES[form])[0].head, weights.head)


@pytest.mark.parametrize("form", ["official", "timm", "transformers", "mmpretrain"])
def test_an_encoder_round_trips(form, tmp_path):
    weights = classifier(classes=0, **SMALL)
    path = tmp_path / FILES[form]
    write_weights(path, weights, form)
    found, _, remarks = read_weights(path)
    assert found.head == {} and found.arch == weights.arch and remarks == []
    assert_same(found.encoder, weights.encoder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_half_precision_is_kept(form, dtype, tmp_path):
    weights = weights_for(form)
    for part in (weights.encoder, weights.decoder, weights.head):
        part.update({name: tensor.to(dtype) for name, tensor in part.items()})
    write_weights(tmp_path / FILES[form], weights, form)
    found, *_ = read_weights(tmp_path / FILES[form])
    assert_same(found.encoder | found.decoder | found.head, weights.encoder | weights.decoder | weights.head)


@pytest.mark.xdist_group("large")  # gigabytes each: never two at once
@pytest.mark.parametrize("name", ALL_SIZES)
def test_real_timm(name, tmp_path):
    """timm loads our file and computes the same; timm's own state dict comes back bit for bit."""
    weights, image = classifier(name), torch.randn(2, 3, 64, 96)
    path = tmp_path / ("x.safetensors" if name.endswith("tiny") else "x.pth")
    write_weights(path, weights, "timm")
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert_close(logits(weights, image), model(image))

    theirs = model.state_dict()
    torch.save(theirs, tmp_path / "theirs.pth")
    found, form, remarks = read_weights(tmp_path / "theirs.pth")
    assert form == "timm" and "ImageNet" in remarks[0]
    assert_same(to_form(found, "timm")[0], theirs)


@pytest.mark.xdist_group("large")  # gigabytes each: never two at once
@pytest.mark.parametrize("name", ALL_SIZES)
def test_real_transformers(name, tmp_path):
    """`from_pretrained` loads our folder and computes the same; its own folder comes back bit for bit."""
    weights, image = classifier(name), torch.randn(2, 3, 64, 96)
    write_weights(tmp_path / "x", weights, "transformers")
    model, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "x", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    with torch.no_grad():
        assert_close(logits(weights, image), model.eval()(image).logits)
    assert model.config.id2label == dict(enumerate(weights.classes)) and model.config.image_size == 64

    model.save_pretrained(tmp_path / "theirs")
    found, form, _ = read_weights(tmp_path / "theirs")
    assert form == "transformers" and found.classes == weights.classes
    assert_same(to_form(found, "transformers")[0], model.state_dict())


@pytest.mark.parametrize("classes", [0, 5])
def test_real_models_of_unusual_shape(classes, tmp_path):
    """One grey channel, stem stride 1, own widths; with and without a head."""
    weights = classifier(classes=classes, channels=1, stem_stride=1, **SMALL)
    image = torch.randn(2, 1, 16, 24)
    for form in ("timm", "transformers"):
        write_weights(tmp_path / FILES[form], weights, form)
    options = {"in_chans": 1, "patch_size": 1, "depths": SMALL["depths"], "dims": SMALL["dims"]}
    from_timm = timm.create_model(
        "convnextv2_atto", num_classes=classes, checkpoint_path=str(tmp_path / "x.pth"), **options
    ).eval()
    auto = transformers.AutoModelForImageClassification if classes else transformers.AutoModel
    from_hub = auto.from_pretrained(tmp_path / "x").eval()
    with torch.no_grad():
        ours, theirs = from_timm(image), from_hub(image)
        assert_close(ours, theirs.logits if classes else theirs.pooler_output)
        if classes:
            assert_close(logits(weights, image), ours)


BACKBONES = [("convnextv2_atto", 5, 3, 4), ("convnext_tiny", 0, 1, 1), ("convnext_atto", 5, 4, 4)]


@pytest.mark.parametrize(("name", "classes", "channels", "stride"), BACKBONES)
def test_timm_backbone(name, classes, channels, stride, tmp_path):
    """`features_only` of our file gives the maps of the four stages, with or without a classifier in it."""
    weights = classifier(name, classes, channels=channels, stem_stride=stride, **SMALL)
    image = torch.randn(2, channels, 16 * stride, 27 * stride)  # 27: no multiple of a patch
    write_weights(tmp_path / "x.pth", weights, "timm")
    model = eval(how_to_load_backbone(tmp_path / "x.pth", weights, "timm"), {"timm": timm}).eval()
    assert model.feature_info.reduction() == [stride, 2 * stride, 4 * stride, 8 * stride]
    with torch.no_grad():
        for ours, theirs in zip(maps(weights, image), model(image), strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("load", [how_to_load, how_to_load_backbone])
def test_timms_models_have_our_preprocessing(load, tmp_path):
    """Not ImageNet's, which timm assumes of a file."""
    weights = classifier("convnextv2_atto", 5, channels=3, **SMALL)
    image = Preprocessing((64, 96), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8, "bilinear")
    weights.preprocessing = image
    write_weights(tmp_path / "x.pth", weights, "timm")
    model = eval(load(tmp_path / "x.pth", weights, "timm"), {"timm": timm})
    found = timm.data.resolve_model_data_config(model)
    assert (found["mean"], found["std"], found["input_size"]) == (image.mean, image.std, (3, 64, 96))
    assert (found["crop_pct"], found["crop_mode"], found["interpolation"]) == (0.8, "center", "bilinear")


@pytest.mark.parametrize(("name", "classes", "channels", "stride"), BACKBONES)
def test_transformers_backbone(name, classes, channels, stride, tmp_path):
    """Its maps have an additional LayerNorm with initial weights; `hidden_states` are the maps."""
    weights = classifier(name, classes, channels=channels, stem_stride=stride, **SMALL)
    image = torch.randn(2, channels, 16 * stride, 24 * stride)
    write_weights(tmp_path / "x", weights, "transformers")
    model = eval(how_to_load_backbone(tmp_path / "x", weights, "transformers"), {"transformers": transformers}).eval()
    with torch.no_grad():
        found = model(image, output_hidden_states=True)
    triples = zip(maps(weights, image), found.hidden_states[1:], found.feature_maps, strict=True)
    for ours, plain, normed in triples:
        assert_close(plain, ours)
        expected = torch.nn.functional.layer_norm(ours.movedim(1, -1), ours.shape[1:2], eps=1e-6)
        assert_close(normed, expected.movedim(-1, 1))


@pytest.mark.parametrize(
    ("form", "weights", "message"),
    [
        ("timm", {"stem_stride": 2}, r"model\.stem_stride 2 .*timm"),
        ("official-sparse", {"name": "convnext_tiny"}, "sparse.* V2"),
        ("torchvision", {"name": "convnextv2_tiny"}, "torchvision .*V1"),
        ("torchvision", {"name": "convnext_tiny", "stem_stride": 2}, "torchvision .*stride 4"),
    ],
)
def test_unsupported_models_are_refused(form, weights, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_weights(tmp_path / "x", classifier(**weights, **SMALL), form)
    assert not list(tmp_path.iterdir())


def test_transformers_bare_model_and_older_files(tmp_path):
    """A folder without a classifier, in two safetensors parts or as pytorch_model.bin."""
    weights = classifier(classes=0, **SMALL)
    write_weights(tmp_path / "x", weights, "transformers")
    model = transformers.ConvNextV2Model.from_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts/model.safetensors.index.json").exists()
    assert_same(read_weights(tmp_path / "parts")[0].encoder, weights.encoder)
    (tmp_path / "x/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "x/pytorch_model.bin")
    assert_same(read_weights(tmp_path / "x")[0].encoder, weights.encoder)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in PLAIN])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_interpolation_round_trips(interpolation, form, tmp_path):
    weights = (autoencoder if form in ("ours", "official-sparse") else classifier)(**SMALL)
    change(weights, interpolation=interpolation)
    write_weights(tmp_path / FILES[form], weights, form)
    found, _, remarks = read_weights(tmp_path / FILES[form])
    assert found.preprocessing == weights.preprocessing and remarks == []


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_bicubic_is_written_and_the_default(form, tmp_path):
    """timm and transformers have other defaults; here it is bicubic."""
    write_weights(tmp_path / FILES[form], classifier(**SMALL), form)
    if form == "timm":
        assert torch.load(tmp_path / "x.pth")["pretrained_cfg"]["interpolation"] == "bicubic"
    else:
        assert json.loads((tmp_path / "x/preprocessor_config.json").read_text())["resample"] == 3
    assert read_weights(tmp_path / FILES[form])[0].preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("form", "stored"), [("timm", "lanczos"), ("timm", ["bilinear"]), ("transformers", 1), ("transformers", {})]
)
def test_unknown_interpolations_are_logged(form, stored, tmp_path):
    write_weights(tmp_path / FILES[form], classifier(**SMALL), form)
    if form == "timm":
        content = torch.load(tmp_path / "x.pth")
        content["pretrained_cfg"]["interpolation"] = stored
        torch.save(content, tmp_path / "x.pth")
    else:
        path = tmp_path / "x/preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": stored}))
    found, _, remarks = read_weights(tmp_path / FILES[form])
    assert found.preprocessing.interpolation == "bicubic" and ["bicubic" in remark for remark in remarks] == [True]


@pytest.mark.parametrize(
    ("size", "crop", "kind", "interpolation"),
    [
        ([64, 64], 0.8, "ConvNextImageProcessor", "bilinear"),
        ([384, 384], 0.8, "BitImageProcessor", "bicubic"),
        ([48, 80], 1.0, "ViTImageProcessor", "bicubic"),
        ([48, 80], 1.0, "ViTImageProcessor", "bilinear"),
    ],
)
def test_transformers_preprocessing_is_ours(size, crop, kind, interpolation, tmp_path):
    from data.transforms import EvalTransform, normalize

    weights = classifier(**SMALL)
    change(weights, size=tuple(size), crop=crop, interpolation=interpolation)
    write_weights(tmp_path / "x", weights, "transformers")
    assert json.loads((tmp_path / "x/preprocessor_config.json").read_text())["image_processor_type"] == kind
    assert read_weights(tmp_path / "x")[0].preprocessing == weights.preprocessing
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 17) * 255, (200, 300), mode="bicubic")
    picture = picture[0].clamp(0, 255).to(torch.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")(picture, return_tensors="pt")
    mean, std = (torch.tensor(getattr(weights.preprocessing, key)) for key in ("mean", "std"))
    for share in (crop, 0.7):
        ours = normalize(EvalTransform(tuple(size), share, interpolation)(picture, None)["image"][None], mean, std)
        assert ours.shape == theirs["pixel_values"].shape
        levels = 255 * ((ours - theirs["pixel_values"]) * std[:, None, None]).abs().mean()
        assert levels <= 0.01 if share == crop else levels > 10  # another interpolation: .7 and more


@pytest.mark.parametrize(
    ("stored", "size", "crop"),
    [
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, [384, 384], 1.0),  # squashes from 384 on
        ({"size": {"shortest_edge": 224}, "crop_pct": 1.0}, [224, 224], 0.9999),  # a crop: not squashed
        ({"size": 224, "crop_pct": 0.875}, [224, 224], 0.875),  # as older files say it
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, [224, 224], 0.875),
        ({"size": {"height": 48}}, [64, 64], 0.875),  # half of it missing: the model's own size
    ],
)
def test_other_preprocessors(stored, size, crop, tmp_path):
    write_weights(tmp_path / "x", classifier(**SMALL), "transformers")
    (tmp_path / "x/preprocessor_config.json").write_text(json.dumps(stored))
    image = read_weights(tmp_path / "x")[0].preprocessing
    assert image.size == tuple(size) and image.crop == crop


@pytest.mark.parametrize(("crop", "mode"), [(1.0, "squash"), (0.9999, "center"), (0.875, "center")])
def test_timm_crop_mode(crop, mode, tmp_path):
    weights = classifier(**SMALL)
    change(weights, crop=crop)
    write_weights(tmp_path / "x.pth", weights, "timm")
    stored = torch.load(tmp_path / "x.pth")["pretrained_cfg"]
    assert (stored["crop_pct"], stored["crop_mode"]) == (round(crop, 3), mode)
    assert read_weights(tmp_path / "x.pth")[0].preprocessing.crop == crop


def test_preprocessing_that_no_processor_has_is_logged(tmp_path):
    weights = classifier(**SMALL)
    change(weights, size=(48, 80))
    assert "preprocessor_config.json" in write_weights(tmp_path / "x", weights, "transformers")[0]
    assert not (tmp_path / "x/preprocessor_config.json").exists()
    assert read_weights(tmp_path / "x")[0].preprocessing.size == (48, 80)


def test_timm_hub_folder(tmp_path):
    """The config.json of timm's own hub folders."""
    weights = classifier(**SMALL)
    write_weights(tmp_path / "model.safetensors", weights, "timm")
    config = {"architecture": "convnextv2_atto", "label_names": weights.classes}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 96, 96]}}))
    found, form, _ = read_weights(tmp_path)
    assert form == "timm" and found.classes == weights.classes and found.preprocessing.size == (96, 96)


def test_logits_do_not_hide_a_missing_tensor():
    """Logits detect a change of any tensor."""
    weights, image = classifier(**SMALL), torch.randn(2, 3, 64, 64)
    before = logits(weights, image)
    for part in (weights.encoder, weights.head):
        for name in list(part):
            kept = part[name]
            part[name] = kept + 0.5 * torch.rand_like(kept)
            assert not torch.allclose(logits(weights, image), before, rtol=1e-4, atol=1e-5), name
            part[name] = kept


@pytest.mark.parametrize("name", ["convnext_tiny", pytest.param("convnext_large", marks=pytest.mark.slow)])
def test_real_torchvision(name, tmp_path):
    """torchvision loads our file and computes the same; its own state dict comes back bit for bit."""
    weights, image = classifier(name), torch.randn(2, 3, 64, 96)
    write_weights(tmp_path / "x.pth", weights, "torchvision")
    model = getattr(torchvision.models, name)(num_classes=5).eval()
    model.load_state_dict(torch.load(tmp_path / "x.pth"))
    with torch.no_grad():
        assert_close(logits(weights, image), model(image))
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    found, form, _ = read_weights(tmp_path / "theirs.pth")
    assert form == "torchvision"
    assert_same(to_form(found, "torchvision")[0], model.state_dict())


@pytest.mark.parametrize("prefix", ["", "encoder.model."])  # the second: of segmentation_models_pytorch
@pytest.mark.parametrize(("name", "classes", "channels", "stride"), BACKBONES)
def test_state_of_timms_features(name, classes, channels, stride, prefix, tmp_path):
    weights = classifier(name, 0, channels=channels, stem_stride=stride, **SMALL)
    write_weights(tmp_path / "x.pth", weights, "timm-features")
    more = {"in_chans": channels, "patch_size": stride, **SMALL}
    model = timm.create_model(name, features_only=True, **more).eval()
    model.load_state_dict(torch.load(tmp_path / "x.pth"))
    image = torch.randn(2, channels, 16 * stride, 24 * stride)
    with torch.no_grad():
        for ours, theirs in zip(maps(weights, image), model(image), strict=True):
            assert_close(ours, theirs)
    theirs = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    torch.save(theirs | ({"decoder.x": torch.ones(1)} if prefix else {}), tmp_path / "theirs.pth")
    found, form, _ = read_weights(tmp_path / "theirs.pth")
    assert form == "timm-features"
    assert_same(found.encoder, weights.encoder)


def test_state_of_transformers_backbone(tmp_path):
    weights = classifier(classes=0, **SMALL)
    write_weights(tmp_path / "x", weights, "transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    model = transformers.ConvNextV2Backbone.from_pretrained(tmp_path / "x", out_features=stages)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "transformers" and any("left out: the norms" in remark for remark in remarks)
    assert_same(found.encoder, weights.encoder)
