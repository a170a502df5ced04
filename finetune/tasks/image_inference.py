"""What the tasks with one output row per image share in evaluate, predict and export."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError, nearest, printable
from configs.files import atomic_file, write_atomic
from data.decode import decode
from data.folder import read_image
from data.name_lists import csv_rows
from data.reading import Reading
from data.transforms import EvalTransform, RowTransform, seen_region
from data.vectors import reader, target_names
from models.convnext import Head
from models.opening import Trained
from models.weights import load_strict


class ImageInference:
    """Parts of `finetune.inference.Inference`. A prediction has `path`, `lines` and `as_plain`."""

    read_target = None

    def __init__(self, trained: Trained):
        self.trained, self.transform = trained, EvalTransform.of(trained.preprocessing)

    def run(self, model: nn.Module, image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return model(image)

    def annotate(self, folder: Path, number: int, prediction: Any, reading: Reading) -> None:
        from finetune.tasks.pictures import annotate  # matplotlib

        path = prediction.path
        kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
        image = decode(read_image(path, reading), self.trained.preprocessing.channels, max_pixels=reading.max_pixels)
        copy = annotate(image, prediction.lines)
        with atomic_file(folder / f"{number:05}-{path.stem}.{kind}") as file:
            copy.save(file, kind, quality=95)

    def explained(self, output: Tensor, name: str | None) -> Tensor:
        """Number [B] of the output that --cam explains: the one of this name, else each image's highest.

        Raises `UserError` for an unknown name.
        """
        if name is None:
            return output.argmax(1)
        if name not in self.names:
            raise UserError(f"--cam-of {name}: {self.trained.path} has no such output {nearest(name, self.names)}")
        return torch.full((len(output),), self.names.index(name), device=output.device)

    def draw_evidence(
        self, folder: Path, number: int, prediction: Any, evidence: Tensor, name: str, reading: Reading
    ) -> None:
        """Write a copy of a picture with the evidence [h, w] for an output drawn over it, NUMBER-NAME-cam.png."""
        from finetune.gradcam import draw
        from finetune.tasks.pictures import annotate  # matplotlib

        path, own = prediction.path, self.trained.preprocessing
        image = decode(read_image(path, reading), own.channels, max_pixels=reading.max_pixels)
        drawn = draw(image, evidence, seen_region(*image.shape[1:], own.size, own.crop))
        with atomic_file(folder / f"{number:05}-{path.stem}-cam.png") as file:
            annotate(drawn, [f"evidence for {name}", *prediction.lines]).save(file, "png")

    def write_json(self, file: Path, predictions: list[Any]) -> None:
        objects = (json.dumps({"path": str(p.path)} | p.as_plain()) for p in predictions)
        write_atomic(file, "[\n{}\n]\n".format(",\n".join(objects)).encode())


class RowInference(ImageInference):
    """Of a task whose targets are the rows of `data/vectors.py`; builds the head and loads it."""

    kind: str  # of the targets

    def __init__(self, trained: Trained, names: list[str], head: Head):
        super().__init__(trained)
        self.names, self.images = names, None
        head_tensors = trained.weights.head
        load_strict(head, {name.removeprefix("head."): x for name, x in head_tensors.items()}, trained.path)
        trained.model.head = head.eval()
        self.transform = RowTransform(self.transform, len(names))
        self.read_target = lambda data: None  # of pictures

    def match(self, images: Any) -> None:
        """Match the data's targets with the model's outputs by name."""
        own = target_names(images, self.kind)
        self.check_names(images, own)
        self.images, self.read_target = images, reader(self.kind, self.names, own)

    def name_outputs(self, file: str | None) -> None:
        """Names come from the weights."""
        if file is not None:
            raise UserError(f"--classes {file}: {self.trained.path} has its own names: leave the option out")


def check_finite(output: Tensor) -> Tensor:
    """A model's output in fp32. Raises `UserError` for NaN or infinity."""
    if not bool(torch.isfinite(output).all()):
        raise UserError("the weights give outputs that are not finite: try --precision fp32")
    return output.float()


def write_rows(path: Path, rows: list[list]) -> None:
    """Write a CSV file of printable texts, in UTF-8; formulas are defused as in `data.name_lists`."""
    texts = ([printable(x) if isinstance(x, (str, Path)) else x for x in row] for row in rows)
    write_atomic(path, csv_rows(texts))
