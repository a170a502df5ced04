"""`--init`: other channels, another head, with or without a decoder."""

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from configs.schema import Data
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, from_flat
from models.formats import FORMATS
from models.formats.write import write_weights
from models.opening import Opened
from models.start import open_init, other_channels, start_autoencoder, start_classifier, with_statistics
from tests.conftest import has
from tests.models.formats.helpers import FILES, SMALL, assert_same, autoencoder, change, classifier, logits, weights_for
from tests.models.helpers import assert_close, masks

CLASSES = [f"class {i}" for i in range(5)]


@pytest.fixture
def start(tmp_path):
    """Write weights in a format and open them as --init."""

    def make(weights, form="ours"):
        write_weights(tmp_path / FILES[form], weights, form)
        return open_init(str(tmp_path / FILES[form]))

    return make


def test_none_is_from_scratch():
    assert open_init("none") is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_classifier_starts_from_any_format(form, start, capsys):
    weights = weights_for(form) if form != "ours" else classifier(**SMALL)
    model = ConvNeXt(weights.arch, 5)
    fresh = model.head.fc.weight.clone()
    kept = start_classifier(model, start(weights, form), CLASSES)
    said = capsys.readouterr().out
    assert f"({form})" in said or f"({form};" in said
    assert_same({name: t for name, t in model.state_dict().items() if name in weights.encoder}, weights.encoder)
    assert kept == (form not in ("official-sparse", "timm-features"))
    if kept:
        image = torch.randn(1, 3, 64, 64)
        assert has(said, "classifier 5 kept")
        assert_close(model.eval()(image), logits(weights, image))
    else:
        assert torch.equal(model.head.fc.weight, fresh)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (CLASSES[:3], "classifier 5 replaced 3"),
        ([*CLASSES[:4], "other"], "classifier replaced 5 names"),
    ],
)
def test_another_head_is_replaced_and_logged(classes, message, start, capsys):
    weights = classifier(**SMALL)
    model = ConvNeXt(weights.arch, len(classes))
    fresh = model.head.fc.weight.clone()
    assert not start_classifier(model, start(weights), classes)
    assert has(capsys.readouterr().out, message)
    assert torch.equal(model.head.fc.weight, fresh)
    assert torch.equal(model.head.norm.weight, weights.head["head.norm.weight"])


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels(channels, start, capsys):
    """Equal channels give the same logits if the old number of channels divides the new one, or for one channel."""
    weights = classifier(**SMALL)
    model = ConvNeXt(replace(weights.arch, channels=channels), 5).eval()
    assert start_classifier(model, start(weights), CLASSES)
    assert has(capsys.readouterr().out, f"3 {channels} channels stem adapted")
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        found, expected = model(grey.expand(-1, channels, -1, -1)), logits(weights, grey.expand(-1, 3, -1, -1))
    if channels in (1, 6):
        assert_close(found, expected, tolerance=1e-4)
    stem = weights.encoder["stem.0.weight"]
    if channels > 1:
        assert torch.equal(model.stem[0].weight[:, channels - 1], stem[:, (channels - 1) % 3] * (3 / channels))


def test_other_channels_of_the_prediction_layer():
    weights = autoencoder(**SMALL)
    adapted = other_channels(weights, 4).decoder
    old, new = (t["pred.bias"].view(32, 32, -1) for t in (weights.decoder, adapted))
    assert torch.equal(new[..., :3], old) and torch.equal(new[..., 3], old[..., 0])


@pytest.mark.parametrize("form", ["ours", "official-sparse"])
@pytest.mark.parametrize("channels", [3, 4])
def test_pretraining_continues_with_the_decoder(channels, form, start, capsys):
    weights = autoencoder(decoder_dim=24, **SMALL)
    given = from_flat({"decoder_dim": 24, "channels": channels, **SMALL})
    model = FCMAE(*given)
    start_autoencoder(model, start(weights, form))
    assert has(capsys.readouterr().out, "stem adapted") == (channels == 4)
    state = model.state_dict()
    adapted = other_channels(weights, channels).decoder
    assert_same({name: state[name] for name in weights.decoder}, {name: adapted[name] for name in weights.decoder})
    if channels == 3:
        reference = FCMAE(*given)
        reference.load_state_dict({f"encoder.{k}": t for k, t in weights.encoder.items()} | weights.decoder)
        image, visible = torch.randn(2, 3, 96, 96), masks(2, (3, 3), 0.6)
        assert torch.equal(model(image, visible), reference(image, visible))


@pytest.mark.parametrize("form", ["official", "timm", "transformers", "mmpretrain"])
def test_pretraining_from_an_encoder(form, start, capsys):
    weights = classifier(**SMALL)
    model = FCMAE(*from_flat(SMALL))
    fresh = model.mask_token.clone()
    start_autoencoder(model, start(weights, form))
    assert has(capsys.readouterr().out, "no decoder new")
    assert_same(model.encoder.state_dict(), weights.encoder)
    assert torch.equal(model.mask_token, fresh)


def test_settings_that_differ_are_logged(start, capsys):
    weights = autoencoder(grn_scope="batch", norm_pix=False, **SMALL)
    start_autoencoder(FCMAE(*from_flat(SMALL)), start(weights, "official-sparse"))
    said = capsys.readouterr().out
    assert has(said, "model.grn_scope batch image objective.norm_pix False True")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set --model.name convnextv2_atto --model.depths [1,2,1,1] --model.dims [8,16,24,32]$"),
        ({**SMALL, "stem_stride": 2}, "set .*--model.stem_stride 4$"),
        ({**SMALL, "name": "convnext_tiny"}, "set --model.name convnextv2_atto"),
        ({**SMALL, "decoder_dim": 48}, "decoder.* set --objective.decoder_dim 512"),
        ({**SMALL, "decoder_depth": 3}, "set --objective.decoder_dim 512 --objective.decoder_depth 1"),
    ],
)
def test_another_model_names_the_keys_to_set(settings, message, start):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        start_autoencoder(FCMAE(*from_flat(settings)), start(autoencoder(**SMALL)))


def test_statistics_belong_to_the_weights():
    weights = classifier(**SMALL)
    start = Opened("x.pt", weights)
    assert with_statistics(Data(), start, 3).mean == (0.1, pytest.approx(0.2), pytest.approx(0.3))
    assert with_statistics(Data(), start, 4).mean is None  # other channels: not theirs
    assert with_statistics(Data(), None, 3).mean is None
    with pytest.raises(UserError, match=r"x\.pt.* data\.mean"):
        with_statistics(Data(mean=(0.5, 0.5, 0.5)), start, 3)
    change(weights, mean=None, std=None)
    assert with_statistics(Data(mean=(0.5, 0.5, 0.5)), start, 3).mean == (0.5, 0.5, 0.5)
