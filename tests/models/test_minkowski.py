"""MinkowskiEngine against the packed layout: outputs and all parameter gradients."""

import os
import subprocess
import sys

import pytest
import torch

from models.fcmae import FCMAE
from tests.conftest import ROOT, losses, run
from tests.models.helpers import assert_close, assert_same_training, masks, random_weights, tiny

FULL = {"stem_stride": 4, "depths": None, "dims": None}


def pair(**settings) -> tuple[FCMAE, FCMAE]:
    """The same autoencoder with the minkowski and with the packed backend."""
    theirs, ours = FCMAE(*tiny(backend="minkowski", **settings)), FCMAE(*tiny(**settings))
    random_weights(ours)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def assert_equal(theirs: FCMAE, ours: FCMAE, image: torch.Tensor, visible: torch.Tensor) -> None:
    """The encoder's tokens on the grid, the loss, and the gradients of all parameters."""
    n, fill, found = int(visible[0].sum()), torch.zeros(ours.encoder.arch.dims[-1]), []
    for model in (theirs, ours):
        layout = model.layout(visible, n)
        found.append(layout.to_grid(model.encoder.forward_features(image, layout), fill))
    assert_close(*found, "encoder")
    deep = ours.encoder.arch.dims[0] > 64  # rounding adds up
    assert_same_training(theirs, ours, image, visible, 2e-5 if deep else 1e-5)


@pytest.mark.minkowski
@pytest.mark.parametrize("grn_scope", ["image", "batch"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])
def test_equals_packed(name, batch, grn_scope):
    theirs, ours = pair(name=name, grn_scope=grn_scope, channels=4, **FULL)
    assert_equal(theirs, ours, torch.randn(batch, 4, 96, 128), masks(batch, (3, 4), 0.6))


@pytest.mark.minkowski
def test_equals_packed_v1():
    assert_equal(*pair(name="convnext_tiny", **FULL), torch.randn(2, 3, 96, 96), masks(2, (3, 3), 0.6))


@pytest.mark.minkowski
@pytest.mark.parametrize("grn_scope", ["image", "batch"])
def test_border_rows_and_columns_fully_masked(grn_scope):
    visible = torch.zeros(2, 4, 5, dtype=torch.bool)
    visible[0, 1:3, 1:4], visible[1, 1:3, 2:5] = True, True
    assert_equal(*pair(mask_ratio=0.7, grn_scope=grn_scope), torch.randn(2, 3, 32, 40), visible)


@pytest.mark.minkowski
def test_zero_pixels_and_zero_tokens_are_kept():
    """A black patch, and a stem that maps it to exactly zero, must not vanish from the sparse tensor."""
    theirs, ours = pair()
    for model in (theirs, ours):
        for parameter in model.encoder.stem.parameters():
            if parameter.ndim == 1:
                parameter.data.zero_()  # the stem's LayerNorm then gives zero for every token
    visible, image = masks(2, (4, 4), 0.6), torch.randn(2, 3, 32, 32)
    image[:, :, 8:24] = 0
    tokens = ours.encoder.stem[1](ours.layout(visible, 6).embed(image, ours.encoder.stem[0]))
    assert (tokens == 0).all()
    assert_equal(theirs, ours, image, visible)


@pytest.mark.minkowski
def test_asymmetric_kernels():
    """One tap of each kernel is set: a transposed or mirrored order moves it."""
    theirs, ours = pair(depths=(1, 1, 1, 1), mask_ratio=0.4)
    for model in (theirs, ours):
        for stage in model.encoder.stages:
            kernel = stage.blocks[0].conv_dw.weight.data
            kernel.zero_()
            kernel[:, 0, 1, 5] = 1.0  # row 1, column 5
            if stage.downsample is not None:
                kernel = stage.downsample[1].weight.data
                kernel[:, :, 0, 0] = kernel[:, :, 1, 0] = kernel[:, :, 1, 1] = 0.0
    assert_equal(theirs, ours, torch.randn(3, 3, 32, 40), masks(3, (4, 5), 0.4))


@pytest.mark.minkowski
def test_building_it_draws_no_random_numbers():
    model = FCMAE(*tiny(backend="minkowski", dims=(24, 40, 56, 72)))  # widths that no other test uses: not cached
    visible, image = masks(1, (4, 4), 0.6), torch.randn(1, 3, 32, 32)
    before = torch.get_rng_state()
    model(image, visible)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.minkowski
@pytest.mark.parametrize("grn_scope", ["image", "batch"])
def test_pretraining_gives_the_same_losses(grn_scope, digits, tmp_path):
    common = ["--data.path", digits, "--run.folder", tmp_path, "--optim.epochs", "1", "--optim.batch_size", "240"]
    common += ["--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--objective.decoder_dim", "16"]
    common += ["--data.workers", "0", "--run.log_every", "1", "--run.device", "cpu", "--model.grn_scope", grn_scope]
    for backend in ("packed", "minkowski"):
        run("python", "pretrain/main.py", *common, "--run.name", backend, "--model.backend", backend)
    packed, minkowski = ([loss for _, loss in losses(tmp_path / name)] for name in ("packed", "minkowski"))
    assert len(packed) == 6 and minkowski == pytest.approx(packed, rel=1e-5)


def test_not_installed_is_an_error_that_names_the_script(digits, tmp_path):
    """There is no silent fallback to another backend."""
    (tmp_path / "MinkowskiEngine.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "pretrain/main.py", "--data.path", str(digits), "--run.folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model.backend", "minkowski", "--run.device", "cpu"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "bash launch/install_minkowski.sh" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
