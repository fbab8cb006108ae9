"""Weights of any model of this package: published names translated, the model identified."""

import torch
from timm.models import create_model, list_models
from torch import Size, Tensor

from litvit import checkpoints
from litvit.models.backbone import Backbone


def translate_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a published state dict of any model to our names and layouts.

    Args:
        state_dict: State dict, left as it is.

    Returns:
        New state dict, with the same entries if they have no published names.
    """
    for architecture in Backbone.__subclasses__():
        state_dict = architecture.from_published(state_dict)
    return state_dict


def identify_model(state_dict: dict[str, Tensor]) -> str | None:
    """Return the name of the model whose layers a state dict holds, under published names or ours. None if unknown."""
    layers = _layer_shapes(translate_published(state_dict))
    for architecture in Backbone.__subclasses__():
        for name in list_models(module=architecture.__module__.rpartition(".")[2]):
            with torch.device("meta"):
                model = create_model(name)
            if layers == _layer_shapes(model.state_dict()):
                return name
    return None


def _layer_shapes(state_dict: dict[str, Tensor]) -> dict[str, Size]:
    """Return shapes of linear layers and convolutions, which depend on neither image size nor number of classes."""
    return {
        name: value.shape
        for name, value in state_dict.items()
        if name.endswith(".weight") and value.dim() > 1 and not name.startswith(("head.", "aux_head."))
    }


checkpoints.identifiers.append(identify_model)
