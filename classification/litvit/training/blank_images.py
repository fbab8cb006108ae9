"""Blank images for a model before the first real ones: wrong settings are found before anything is written."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from litvit.data.dataset import Labels
from litvit.data.token_labels import TokenLabels, soft_targets
from litvit.errors import InputError, is_from_user_code
from litvit.training.model import ModelConfig, PrecisionConfig

# Errors of a device, of communication, or a lack of memory, which no setting mends. `torch.AcceleratorError` is new.
_OF_THE_MACHINE = re.compile(r"CUDA error|NCCL|can't allocate memory|cudaError").search


def check_scores(
    model: nn.Module,
    config: ModelConfig,
    precision: PrecisionConfig,
    input_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
) -> None:
    """Classify two blank images in eval mode. The model stays as it is.

    Args:
        model: Model on the device, not compiled.
        config: Settings of the model, for the message.
        precision: Precision of the forward pass.
        input_size: Channels, height and width of the images.
        num_classes: Number of classes of the images.
        device: Device of the model.

    Raises:
        InputError: the model cannot classify such images. An exception in a model of your own is raised unchanged.
    """
    images = torch.zeros(2, *input_size, device=device)
    with unchanged(model), wrong_settings("classify images", config, precision):
        model.eval()
        # Not inference mode: a table that a model keeps for later could not be trained with.
        with torch.no_grad(), precision.autocast(device)():
            scores = model(images)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != 2 or shape[1] < num_classes:
            raise InputError(f"for 2 images and {num_classes} classes its scores are {shape}, not (2, {num_classes})")
    if not scores.isfinite().all():
        raise InputError(f"the scores of {config.model} are not finite for blank images: its weights are broken")


def blank_targets(number: int, num_classes: int, token_labels: TokenLabels | None, device: torch.device) -> Tensor:
    """Return targets for blank images, of the shape that a batch of the run has.

    Args:
        number: Number of images.
        num_classes: Number of classes.
        token_labels: Label files; the first one's labels are every image's. None for classes.
        device: Device of the targets.
    """
    if token_labels is None:
        return torch.full((number,), num_classes - 1, device=device)
    maps = token_labels.read(0).expand(number, -1, -1, -1, -1)
    boxes, flipped = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(number, -1), torch.zeros(number, dtype=torch.bool)
    labels = Labels(*(tensor.to(device) for tensor in (maps, boxes, flipped)))
    return soft_targets(labels, num_classes, token_labels.size)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers and modes back after a block, and remove its gradients.

    Parameters change in an optimizer's step only. They are not copied, which would take as much memory again.
    """
    modes = [(module, module.training) for module in model.modules()]
    held = [
        (module._buffers, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, tensor, value in held:
                buffers[name] = tensor
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def wrong_settings(doing: str, config: ModelConfig, precision: PrecisionConfig) -> Iterator[None]:
    """Turn what a block raises into an InputError that names the settings it may come from.

    An exception in a model of your own, and a lack of memory, are raised unchanged.
    """
    try:
        yield
    # Wrong shapes make torch and timm raise nearly anything.
    except (ValueError, TypeError, LookupError, AssertionError, ArithmeticError, RuntimeError) as error:
        if is_from_user_code(error) or isinstance(error, torch.cuda.OutOfMemoryError) or _OF_THE_MACHINE(str(error)):
            raise
        amp = f", --amp-dtype {precision.amp_dtype}" if precision.amp else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{config.model} cannot {doing} with {config.as_flags()}{amp}: {reason}") from error
