"""Opening classifiers, encoders and autoencoders from files, with their preprocessing; errors."""

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from configs.schema import FCMAESettings, PretrainModel
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.opening import open_autoencoder, open_classifier, open_encoder, open_weights
from models.start import start_autoencoder, start_classifier, start_encoder
from models.weights import save
from tests.models.formats.helpers import SMALL, assert_same, autoencoder, change, classifier


@pytest.fixture
def files(tmp_path):
    """Paths of a classifier with averaged weights, and of an autoencoder."""
    tuned = classifier(**SMALL)
    tuned.ema = {name: tensor + 1 for name, tensor in (tuned.encoder | tuned.head).items()}
    save(tmp_path / "best.pt", tuned)
    save(tmp_path / "fcmae.pt", autoencoder(**SMALL))
    return str(tmp_path / "best.pt"), str(tmp_path / "fcmae.pt")


def test_a_classifier(files):
    weights, raw, averaged = open_weights(files[0]).weights, open_classifier(files[0]), open_classifier(files[0], True)
    assert_same(raw.model.state_dict(), weights.encoder | weights.head)
    assert_same(averaged.model.state_dict(), weights.ema)
    assert not raw.model.training and raw.weights.classes == weights.classes
    assert raw.preprocessing == weights.preprocessing
    assert torch.equal(raw.mean, torch.tensor(weights.preprocessing.mean))


@pytest.mark.parametrize("number", [0, 1])
def test_an_encoder_has_no_head(number, files):
    weights, encoder = open_weights(files[number]).weights, open_encoder(files[number], size=96)
    assert_same(encoder.model.state_dict(), weights.encoder)
    assert not encoder.weights.outputs and encoder.weights.classes is None
    assert encoder.preprocessing.size == (96, 96)


def test_an_autoencoder_with_another_mask_ratio(files):
    found, trained = open_autoencoder(files[1], 0.75, (64, 96)), open_weights(files[1]).weights
    assert found.model.settings.mask_ratio == 0.75 and found.preprocessing.size == (64, 96)
    assert_same({name: found.model.state_dict()[name] for name in trained.decoder}, trained.decoder)


def test_parts_of_another_objective_and_task(tmp_path):
    """Written and read as they are; only the encoder is built from them."""
    path, tuned = str(tmp_path / "other.pt"), classifier(**SMALL)
    tuned.head = {"head.out.weight": torch.ones(1, 32)}
    tuned.ema, tuned.task, tuned.classes = tuned.encoder | tuned.head, "depth", None
    tuned.decoder, tuned.decoder_config, tuned.objective = {"pred.weight": torch.ones(3, 2)}, {"width": 2}, "blur"
    save(tmp_path / "other.pt", tuned)
    found, trained = open_weights(path), open_classifier(path)
    assert_same(found.weights.decoder, tuned.decoder)
    assert found.weights.decoder_config == {"width": 2} and found.weights.outputs == 0
    assert_same(trained.model.state_dict(), tuned.encoder)
    assert_same(trained.weights.head, tuned.head)
    assert_same(open_classifier(path, ema=True).weights.head, tuned.head)
    with pytest.raises(UserError, match="no decoder"):
        open_autoencoder(path)
    for channels in (3, 1):
        model = ConvNeXt(replace(tuned.arch, channels=channels), 2)
        assert not start_classifier(model, found, ["a", "b"])
        start_encoder(model, found)
        assert torch.equal(model.stem[1].weight, tuned.encoder["stem.1.weight"])
    start_autoencoder(FCMAE(PretrainModel(**vars(tuned.arch)), FCMAESettings(decoder_dim=8)), found)
    tuned.task = None
    save(tmp_path / "other.pt", tuned)
    with pytest.raises(UserError, match=r"unexpected head\.out"):
        open_weights(path)


def test_the_digest_is_of_the_content(files):
    assert open_weights(files[0]).digest == open_weights(files[0]).digest != open_weights(files[1]).digest


def test_bad_input(files, tmp_path):
    unknown = classifier(channels=2, **SMALL)
    change(unknown, mean=None, std=None)
    save(tmp_path / "unknown.pt", unknown)
    for call, message in [
        (lambda: open_classifier(files[1]), "no classifier"),
        (lambda: open_autoencoder(files[0]), "no decoder"),
        (lambda: open_encoder(files[1], ema=True), "--ema"),
        (lambda: open_classifier(files[0], size=50), "50"),
        (lambda: open_classifier(str(tmp_path / "unknown.pt")), "mean and std"),
        (lambda: open_weights("nowhere.pt"), r"nowhere\.pt"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
