"""Compare an exported model with its source on real images, and check that a model runs in fp16."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from configs.errors import UserError, reason
from finetune.exporters.graph import Deployed
from models import kernels

TOLERANCE = 1e-4  # of the largest output: runtimes sum in different orders
# fp16 rounds by up to 2^-11; about 400 roundings of random sign in a base model give sqrt(400) * 2^-11 = 1 %
FP16_TOLERANCE = 1e-2
OTHER_OBJECTS = 0.05  # share of a detector's objects that may differ
FP16_MAX = torch.finfo(torch.float16).max  # 65504

Difference = Callable[[list[Tensor], list[Tensor]], list[float]]  # of outputs from the expected ones
Predict = Callable[[Tensor], list[Tensor]]  # images [B, C, H, W] from 0 to 1 to [logits] or to four feature maps


def predict_with(module: Callable) -> Predict:
    """Wrap a torch module in a function that returns a list of outputs."""

    @torch.no_grad()
    def predict(images: Tensor) -> list[Tensor]:
        outputs = module(images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return predict


def comparison_batches(images: Tensor, free: tuple[bool, bool]) -> list[Tensor]:
    """Batches of 1, 3 and all images, and an image with those of its sides doubled that are free."""
    larger = [images[:1].repeat(1, 1, 1 + free[0], 1 + free[1])] if any(free) else []
    return [images[:1], images[torch.arange(3) % len(images)], images, *larger]


def relative_difference(outputs: list[Tensor], references: list[Tensor], one_class: bool = True) -> list[float]:
    """The maximum difference of outputs, relative to the largest output, as the only entry of a list.

    `one_class`: an output [B, K] is of K classes, of which an image has one. Raises `UserError` if it has another one.
    """
    largest = 0.0
    for output, reference in zip(outputs, references, strict=True):
        share = float((output - reference).abs().max() / reference.abs().max())
        largest = largest if share <= largest else share  # also NaN
        if one_class and output.ndim == 2 and (others := int((output.argmax(1) != reference.argmax(1)).sum())):
            raise UserError(f"assigns {others} of {len(output)} images to another class than the source")
    return [largest]


def compare(
    expected: list[list[Tensor]], predict: Predict, batches: list[Tensor], fp16: bool, subject: str,
    difference: Difference = relative_difference, objects: bool = False,
) -> str:  # fmt: skip
    """What follows "its outputs": how far they are from the expected ones of each batch, as `difference` measures it.

    `objects`: differences are of detected objects, of which NMS may choose a share of `OTHER_OBJECTS` otherwise, where
    an overlap is at its threshold in one of two runtimes. They are counted in the text.

    Raises:
        UserError: the difference exceeds the tolerance or is not finite, or the one of `difference`; the message begins
            with `subject`
    """
    found, tolerance = [], FP16_TOLERANCE if fp16 else TOLERANCE
    for images, references in zip(batches, expected, strict=True):
        outputs = predict(images)
        for output, reference in zip(outputs, references, strict=True):
            if output.shape != reference.shape:
                raise UserError(f"{subject} outputs {list(output.shape)} instead of {list(reference.shape)}")
        try:
            shares = difference(outputs, references)
        except UserError as error:
            raise UserError(f"{subject} {error}") from None
        if not objects and not shares[0] <= tolerance:
            far = f"{shares[0]:.1e} of the largest output in a batch of {len(images)}"
            raise UserError(f"{subject} differs from the source by {far}, more than {tolerance:.0e}")
        found += shares
    if not objects:
        return f"differ by at most {max(found):.1e} of the largest output"
    if not found:
        return "have no object to compare: give other --images"
    others = [share for share in found if not share <= tolerance]
    if len(others) > OTHER_OBJECTS * len(found):
        raise UserError(f"{subject} finds {len(others):,} of {len(found):,} objects elsewhere than the source")
    largest = max((share for share in found if share <= tolerance), default=0.0)
    text = f"have {len(found) - len(others):,} of {len(found):,} objects in common"
    rest = f", the others by up to {max(others):.1e}, as NMS may choose others" if others else ""
    return f"{text}, which differ by at most {largest:.1e}{rest}"


def check_fp16(
    source: Deployed, low: Deployed, expected: list[list[Tensor]], batches: list[Tensor],
    difference: Difference = relative_difference, objects: bool = False,
) -> None:  # fmt: skip
    """Raise `UserError` if a model does not run in fp16, in torch: other runtimes may use fp32 on a CPU.

    The message names the first layer that overflows, if any.
    """
    try:
        with explain_errors("torch"):
            subject = "--fp16 does not suit this model: it"
            compare(expected, predict_with(low), batches, True, subject, difference, objects)
    except UserError as error:
        name, value = first_overflow(source, batches)
        if not name:
            raise
        problem = f"{name} reaches {value:.3g}, beyond fp16's {FP16_MAX:.0f}"
        raise UserError(f"--fp16 does not suit this model: {problem}: leave it out") from error


def first_overflow(source: Deployed, batches: list[Tensor]) -> tuple[str, float]:
    """(first activation beyond fp16's range, its maximum absolute value); ("", 0) if there is none."""
    overflows: list[tuple[str, float]] = []

    def check(name: str, _, inputs: tuple, output: Tensor) -> None:
        for label, x in ((f"the input of {name}", inputs[0] if inputs else None), (name, output)):
            if not isinstance(x, Tensor):  # parts of a head take and give lists
                continue
            if (value := float(x.abs().max())) > FP16_MAX:
                overflows.append((label, value))

    modules = [(name, module) for name, module in source.model.named_modules() if name]
    handles = [module.register_forward_hook(partial(check, name)) for name, module in modules]
    with kernels.plain():  # the others do not call every module
        for images in batches:
            predict_with(source)(images)
    for handle in handles:
        handle.remove()
    return overflows[0] if overflows else ("", 0.0)


@contextmanager
def explain_errors(runtime: str) -> Iterator[None]:
    """Raise exceptions of a runtime as `UserError`, and suppress its warnings and logs."""
    try:
        with quiet_libraries():
            yield
    except UserError:
        raise
    except Exception as error:  # runtimes have their own exception classes
        problem = f"the runtime of {runtime} cannot run this model here ({reason(error)})"
        raise UserError(f"{problem}: choose another format or precision") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings and logs of libraries, such as torch.jit's deprecation."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
