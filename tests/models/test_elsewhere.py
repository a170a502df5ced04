"""Weights in other libraries' own models: equal logits, or feature maps of the four stages, in both directions.

`python -m tests.models.test_elsewhere` prints the table of docs/weights.md: the library's files read here, and files
written here in the library. Libraries that are not installed are left out there, and skipped with a note in the tests.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.formats.read import read_weights
from models.formats.write import to_form, write_weights
from models.weights import Weights
from tests.models.formats.helpers import SMALL, classifier, logits, maps

V2, V1, CLASSES = "convnextv2_atto", "convnext_tiny", 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SHAPE = {"depths": list(SMALL["depths"]), "hidden_sizes": list(SMALL["dims"])}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
Outputs = torch.Tensor | list[torch.Tensor]
Pairs = Iterator[tuple[str, Outputs, Outputs]]  # read or written; ours, the library's


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random parameters: initial zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def weights_of(content: object, folder: Path) -> Weights:
    """Read what a library saves."""
    torch.save(content, folder / "theirs.pth")
    return read_weights(folder / "theirs.pth")[0]


def timm_classifier(folder: Path) -> Pairs:
    import timm

    for name in (V2, V1):
        model = randomize(timm.create_model(name, num_classes=CLASSES, **SMALL))
        yield "read", logits(weights_of(model.state_dict(), folder), IMAGE), model(IMAGE)
        ours = classifier(name, CLASSES, **SMALL)
        write_weights(folder / f"{name}.pth", ours, "timm")
        options = {"num_classes": CLASSES, "checkpoint_path": str(folder / f"{name}.pth")}
        yield "written", logits(ours, IMAGE), timm.create_model(name, **options, **SMALL).eval()(IMAGE)


def timm_features(folder: Path) -> Pairs:
    import timm

    model = randomize(timm.create_model(V2, features_only=True, **SMALL))
    yield "read", maps(weights_of(model.state_dict(), folder), IMAGE), model(IMAGE)
    ours = classifier(V2, 0, **SMALL)
    model.load_state_dict(to_form(ours, "timm-features")[0])
    yield "written", maps(ours, IMAGE), model(IMAGE)


def torchvision_classifier(folder: Path) -> Pairs:
    model = randomize(torchvision_model())
    yield "read", logits(weights_of(model.state_dict(), folder), IMAGE), model(IMAGE)
    ours = classifier(V1, CLASSES, **SMALL)
    model.load_state_dict(to_form(ours, "torchvision")[0])
    yield "written", logits(ours, IMAGE), model(IMAGE)


def torchvision_model() -> torch.nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    dims = (*SMALL["dims"], None)
    blocks = [CNBlockConfig(dims[i], dims[i + 1], depth) for i, depth in enumerate(SMALL["depths"])]
    return ConvNeXt(blocks, num_classes=CLASSES)


def torchvision_detector(folder: Path) -> Pairs:
    """The backbone inside of a Faster R-CNN, read from the file of the whole detector."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    layers = {str(2 * i + 1): str(i) for i in range(4)}
    model = randomize(BackboneWithFPN(torchvision_model().features, layers, list(SMALL["dims"]), 16))
    assert isinstance(model.body, IntermediateLayerGetter)
    found = weights_of({"model": {f"backbone.{k}": x for k, x in model.state_dict().items()}}, folder)
    yield "read", maps(found, IMAGE), [*model.body(IMAGE).values()]


def transformers_classifier(folder: Path) -> Pairs:
    import transformers

    for name, kind in ((V2, "ConvNextV2"), (V1, "ConvNext")):
        config = getattr(transformers, f"{kind}Config")(**SHAPE, num_labels=CLASSES, layer_norm_eps=1e-6)
        model = randomize(getattr(transformers, f"{kind}ForImageClassification")(config))
        model.save_pretrained(folder / f"theirs-{name}")
        yield "read", logits(read_weights(folder / f"theirs-{name}")[0], IMAGE), model(IMAGE).logits
        ours = classifier(name, CLASSES, **SMALL)
        write_weights(folder / name, ours, "transformers")
        model = transformers.AutoModelForImageClassification.from_pretrained(folder / name).eval()
        yield "written", logits(ours, IMAGE), model(IMAGE).logits


def transformers_upernet(folder: Path) -> Pairs:
    """The maps before the norms of the backbone, as its decoder's inputs are those after untrained norms."""
    from transformers import ConvNextV2Backbone, ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextV2Config(**SHAPE, out_features=STAGES)
    config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=SMALL["dims"][2], num_labels=CLASSES)
    model, found = randomize(UperNetForSemanticSegmentation(config)), []

    def run() -> list[torch.Tensor]:
        found.clear()
        for stage in model.backbone.encoder.stages:
            stage.register_forward_hook(lambda _, inputs, output: found.append(output))
        assert model(pixel_values=IMAGE).logits.shape == (2, CLASSES, 64, 96)
        return found

    model.save_pretrained(folder / "theirs")
    yield "read", maps(read_weights(folder / "theirs")[0], IMAGE), run()
    ours = classifier(V2, 0, **SMALL)
    write_weights(folder / "ours", ours, "transformers")
    model.backbone = ConvNextV2Backbone.from_pretrained(folder / "ours", out_features=STAGES).eval()
    yield "written", maps(ours, IMAGE), run()


def smp_unet(folder: Path) -> Pairs:
    """The encoder's features without its first, the image."""
    import segmentation_models_pytorch as smp

    model = randomize(smp.Unet(f"tu-{V2}", encoder_weights=None, classes=CLASSES))
    assert model(IMAGE).shape == (2, CLASSES, 64, 96)
    found = weights_of({"state_dict": model.state_dict()}, folder)
    yield "read", maps(found, IMAGE), model.encoder(IMAGE)[-4:]
    ours = classifier(V2, 0)
    model.encoder.model.load_state_dict(to_form(ours, "timm-features")[0])
    yield "written", maps(ours, IMAGE), model.encoder(IMAGE)[-4:]


CHECKS: dict[str, tuple[str, str, Callable[[Path], Pairs]]] = {  # title: library, compared, check
    "timm, V2 and V1": ("timm", "logits", timm_classifier),
    "timm `features_only`": ("timm", "feature maps", timm_features),
    "torchvision, V1": ("torchvision", "logits", torchvision_classifier),
    "torchvision detection backbone, V1": ("torchvision", "feature maps", torchvision_detector),
    "transformers, V2 and V1": ("transformers", "logits", transformers_classifier),
    "transformers UperNet": ("transformers", "feature maps", transformers_upernet),
    "segmentation_models_pytorch Unet": ("segmentation_models_pytorch", "feature maps", smp_unet),
}
LIMIT = 1e-5  # of the largest output


@torch.no_grad()
def differences(check: Callable[[Path], Pairs], folder: Path) -> dict[str, float]:
    """The largest difference, as a share of the largest output, of files read and of files written."""
    worst: dict[str, float] = {}
    for direction, ours, theirs in check(folder):
        ours, theirs = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape and other.std() > 0
            worst[direction] = max(worst.get(direction, 0.0), float((one - other).abs().max() / other.abs().max()))
    return worst


@pytest.mark.parametrize("title", CHECKS)
def test_equal_outputs(title, tmp_path):
    library, _, check = CHECKS[title]
    pytest.importorskip(library, reason=f"{library} is not installed")
    found = differences(check, tmp_path)
    assert found and all(value < LIMIT for value in found.values()), found


def test_a_difference_is_seen(tmp_path):
    def swapped(folder: Path) -> Pairs:
        for direction, ours, theirs in torchvision_classifier(folder):
            yield direction, ours, theirs.flip(1)

    assert min(differences(swapped, tmp_path).values()) > 100 * LIMIT


def main() -> None:
    print("| library | version | compared | read | written |\n|---|---|---|---|---|")
    for title, (library, compared, check) in CHECKS.items():
        try:
            version = importlib.import_module(library).__version__.split("+")[0]
        except ImportError as error:
            print(f"{title}: {error}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = differences(check, Path(folder))
        cells = [f"{found[key]:.0e}" if key in found else "-" for key in ("read", "written")]
        print(f"| {title} | {version} | {compared} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
