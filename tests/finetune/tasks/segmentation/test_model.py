"""Heads and losses against torch's own operations and by hand."""

import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from configs.schema import Encoder
from finetune.tasks.segmentation.heads import interpolation, pooling, resize
from finetune.tasks.segmentation.inference import SegmenterInference
from finetune.tasks.segmentation.model import VOID, Loss, Segmenter, dice
from finetune.tasks.segmentation.task import class_weights
from models.opening import open_classifier
from models.sparse.layouts import Dense
from models.weights import save
from tests.finetune.tasks.segmentation.helpers import ARCH, config, weights_file


@pytest.mark.parametrize(("side", "count"), [(7, 14), (7, 5), (1, 6), (12, 48), (3, 3)])
def test_matrices_are_torchs_operations(side, count):
    x = torch.rand(2, 3, side, side)
    square = interpolation(side, count, x.device)
    expected = F.interpolate(x, (count, count), mode="bilinear")
    assert (square @ x @ square.T - expected).abs().max() < 1e-5
    assert (resize(x, count, count) - expected).abs().max() < 1e-5
    few = min(side, 3)
    square = pooling(side, few, x.device)
    assert (square @ x @ square.T - F.adaptive_avg_pool2d(x, few)).abs().max() < 1e-6


def test_cross_entropy_is_torchs():
    logits, target = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 5))
    target[0] = VOID
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    for chosen in (None, weights):
        expected = F.cross_entropy(logits, target, chosen, ignore_index=VOID)
        assert Loss("ce", chosen)(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)
    Loss("ce+dice")(logits, target).backward()
    assert (logits.grad[0] == 0).all() and logits.grad[1].abs().min() > 0  # pixels without a class teach nothing
    assert Loss("ce+dice")(logits, torch.full_like(target, VOID)) == 0


def test_dice_by_hand():
    share = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6]])
    found = dice(share.log(), torch.tensor([0, 0, VOID]))
    assert found.item() == pytest.approx(1 - (2 * 1.1 + 1) / (1.1 + 2 + 1), rel=1e-5)  # class 0 alone
    found = dice(share.log(), torch.tensor([0, 1, 1]))
    first, second = (2 * 0.8 + 1) / (1.3 + 1 + 1), (2 * 0.8 + 1) / (0.9 + 2 + 1)
    assert found.item() == pytest.approx(1 - (first + second) / 2, rel=1e-5)


@pytest.mark.parametrize("head", ["fpn", "upernet"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_parameter_learns(head, stride):
    arch = Encoder("convnextv2_atto", 5, stride, (1, 1, 1, 1), (8, 16, 16, 16))
    model = Segmenter(arch, config(head, auxiliary=True), 0.1, "block", Loss("ce+dice"), 0.4)
    size = 16 * stride
    target = torch.randint(-1, 3, (1, size, size))
    model(torch.randn(1, 5, size, size), target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(2, 5, size + 3, size + 8 * stride)).shape == (2, 3, size + 3, size + 8 * stride)
    names = model.state_dict()
    assert all(x.is_floating_point() for x in names.values())
    assert {name.split(".")[0] for name in names} == {"stem", "stages", "head"}


def test_the_loss_is_of_the_models_own_logits():
    """Training interpolates with matrices, evaluation with torch."""
    model = Segmenter(Encoder(ARCH.name, 3, 4, ARCH.depths, ARCH.dims), config("upernet"), criterion=Loss("ce")).eval()
    image, target = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    with torch.no_grad():
        expected = F.cross_entropy(model(image), target)
    assert model(image, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_weight_files(tmp_path):
    """A file builds its own model; one that says something else is refused in one line."""
    model = weights_file(tmp_path / "x.pt", config("upernet", auxiliary=True))
    found = SegmenterInference(open_classifier(str(tmp_path / "x.pt")))
    image = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(found.trained.model(image), model(image))
        tokens = list(found.trained.model.forward_stages(image, Dense()))
    assert [x.shape[-1] for x in tokens] == [8, 16, 16, 16]
    opened = open_classifier(str(tmp_path / "x.pt"))
    for changed, message in (({"width": 32}, "head.decoder"), ({"head": "x"}, "damaged"), ({"more": 1}, "damaged")):
        weights = opened.weights
        weights.task_config = weights.task_config | changed
        save(tmp_path / "y.pt", weights)
        with pytest.raises(UserError, match=message):
            SegmenterInference(open_classifier(str(tmp_path / "y.pt")))
        weights.task_config = {key: x for key, x in weights.task_config.items() if key != "more"} | {
            "width": 16, "head": "upernet",
        }  # fmt: skip


def test_class_weights():
    targets = {"names": ["a", "b", "c"], "pixels": [100, 50, 1, 7]}
    assert class_weights("balanced", targets).tolist() == [0.5, 1, 10]
    assert class_weights((1.0, 2.0, 3.0), targets).tolist() == [1, 2, 3]
    for chosen, about in (((1.0,), targets), ("balanced", {"names": ["a"]})):
        with pytest.raises(UserError, match=r"task\.class_weights"):
            class_weights(chosen, about)
