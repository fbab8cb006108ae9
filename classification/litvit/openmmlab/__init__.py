"""LIT and LVT as backbones of mmdet and mmseg, and their checkpoints read without running code.

Importing this module registers `LIT` and `LVT` in mmengine's root registry, where every OpenMMLab project finds them
(`custom_imports = dict(imports=["litvit.openmmlab"])` in a config), puts a safe reader in the place of mmengine's
for checkpoint files and links, and makes `mmcv.ops` work where mmcv was not compiled.
"""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch

from litvit.errors import InputError

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise InputError(f"mmengine is needed ({error}): run ./setup_env.sh") from error

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file
from timm.models import create_model, list_models
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import litvit  # noqa: F401 (registers the models with timm)
from litvit.checkpoints import mismatch, read_checkpoint, read_state_dict
from litvit.openmmlab.mmcv_ops import provide_operators

provide_operators()

# What `mmseg::` in a config stands for: mmengine asks for a package mmsegmentation, and OneDL's has another name.
MODULE2PACKAGE["mmseg"] = "mmseg"


def _statistic(cls: type, name: str) -> Callable:
    if cls is HistoryBuffer and name in ("min", "max", "mean", "current"):
        return getattr(cls, name)
    raise UnpicklingError(f"global {name} of {cls}")


os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # for those of mmengine's readers that are not ours

# mmengine's checkpoints hold the history of the logged values, and that pickles its methods by getattr: getattr itself
# would hand out anything, this one gives those methods alone.
_statistic.__module__, _statistic.__qualname__ = "builtins", "getattr"
torch.serialization.add_safe_globals(
    [
        HistoryBuffer,
        _statistic,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(number)) for number in (np.float64, np.float32, np.int64)),
        *(value.__reduce__()[0] for value in (np.empty(0), np.float64())),
    ]
)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_file(filename: str, map_location: Any = None) -> dict:
    """Read a checkpoint file as mmengine wants it, without running code that it may hold.

    Args:
        filename: a .safetensors file, or one of torch.save: weights, a run of mmengine with its optimizer.
        map_location: as for torch.load.

    Raises:
        InputError: no such file, or no checkpoint that can be read safely.
    """
    path = Path(filename).expanduser()
    if path.suffix == ".safetensors":
        return read_checkpoint(path, load_file)
    return read_checkpoint(path, lambda file: torch.load(file, map_location=map_location, weights_only=True))


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_url(url: str, map_location: Any = None) -> dict:
    """Fetch a checkpoint once, then read it as `load_from_file` does."""
    return load_from_file(str(fetch(url)), map_location)


def local_rank() -> int:
    """Return the number of this process on its machine, as torchrun or Slurm says it; 0 if it is alone."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def fetch(source: str) -> Path:
    """Return the file of a path or a link; a link's file is kept in torch.hub's folder.

    Raises:
        InputError: the link cannot be fetched.
    """
    if not source.startswith(("http://", "https://")):
        return Path(source).expanduser()
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(source).path).name)
    try:
        if local_rank() == 0 and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(file), progress=False)
    except (OSError, URLError) as error:
        raise InputError(f"cannot fetch {source}: {error}") from error
    finally:
        barrier()
    if not file.exists():
        raise InputError(f"cannot fetch {source}")
    return file


def misfit(model: nn.Module, entries: dict[str, Tensor], arch: str) -> str | None:
    """Load weights into a model of litvit; norms of its outputs, which ImageNet weights lack, may stay as they are.

    Args:
        model: the model.
        entries: the weights, under published names or ours.
        arch: the model's name.

    Returns:
        Why the weights do not fit, None if they did.
    """
    norms = {name: value for name, value in model.state_dict().items() if name.startswith("out_norms.")}
    try:
        model.load_state_dict(norms | entries)
    except RuntimeError as error:
        return mismatch(entries, arch, error)
    return None


class Backbone(BaseModule):
    """A model of litvit as dense backbone: images to a tuple of maps at strides 4, 8, 16 and 32.

    Entries of its state dict have the model's own names; published names load too, by every door.

    Args:
        arch: the model's name.
        out_indices: stages whose maps are returned; what they do not need is left out.
        drop_path_rate: stochastic depth of the last block.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        frozen_stages: the patch embedding and the first n stages stay as they are; -1 for none, 0 for the patch
            embedding alone.
        norm_eval: BatchNorms keep their statistics in training too.
        init_cfg: `dict(type="Pretrained", checkpoint=FILE_OR_URL)` for ImageNet weights; with `prefix="backbone."` for
            those of a detector or segmentor.
        **kwargs: further arguments of the model (`img_size`, `out_norms`, ...).

    Raises:
        InputError: an unknown arch, or arguments that do not fit it.
    """

    family = ""  # names of the models, as timm.list_models takes them

    def __init__(
        self,
        arch: str,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | None = None,
        **kwargs,
    ) -> None:
        super().__init__(init_cfg)
        known = list_models(self.family)
        if arch not in known:
            raise InputError(f"unknown arch '{arch}' of {type(self).__name__}: there are {', '.join(known)}")
        self.arch = arch
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.out_indices = tuple(out_indices)
        try:
            model = create_model(arch, num_classes=0, drop_path_rate=drop_path_rate, **kwargs)
        except TypeError as error:
            raise InputError(f"{arch} does not take these arguments: {error}") from error
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        model.set_grad_checkpointing(with_cp)
        # Its parts are this module's; the model itself is not registered, so that names have no "model." in front.
        self.__dict__["model"] = model
        for name, part in model.named_children():
            self.add_module(name, part)
        for part in self._frozen():
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) of any size from 32 up -> maps (B, C, h, w) of the stages `out_indices`."""
        return tuple(self.model.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True))

    def train(self, mode: bool = True) -> "Backbone":
        """Switch to training, but for what is frozen."""
        super().train(mode)
        norms = [module for module in self.modules() if self.norm_eval and isinstance(module, _BatchNorm)]
        for module in (*self._frozen(), *norms):
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        first = getattr(self.model, "patch_embed", None) or self.stages[0].patch_embed
        norms = [norm for i, norm in self.out_norms.items() if int(i) < self.frozen_stages]
        return [first, *self.stages[: self.frozen_stages], *norms]

    def init_weights(self) -> None:
        """Load what `init_cfg` names.

        Raises:
            InputError: a checkpoint that cannot be read, or of another model.
        """
        if not isinstance(self.init_cfg, dict) or self.init_cfg["type"] != "Pretrained":
            super().init_weights()
            return
        checkpoint = self.init_cfg["checkpoint"]
        entries = read_state_dict(fetch(checkpoint))
        prefix = self.init_cfg.get("prefix", "")
        entries = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        error = misfit(self.model, entries, self.arch)
        if error:
            raise InputError(f"{checkpoint} does not fit {self.arch}: {error}")
        self.is_init = True

    def _load_from_state_dict(self, *args) -> None:
        self.model._load_from_state_dict(*args)  # with its hook for published names


@MODELS.register_module()
class LIT(Backbone):
    """LIT (`arch`: lit_ti, lit_s, lit_m, lit_b) as backbone of mmdet and mmseg, see `Backbone`.

    For relative position tables `img_size` is the size they belong to, published 800 in detection and 512 in
    segmentation; `out_norms` are the stages whose maps get a LayerNorm.
    """

    family = "lit_*"

    def __init__(self, arch: str = "lit_ti", **kwargs) -> None:
        super().__init__(arch, **kwargs)


@MODELS.register_module()
class LVT(Backbone):
    """LVT as backbone of mmdet and mmseg, see `Backbone`."""

    family = "lvt*"

    def __init__(self, arch: str = "lvt", **kwargs) -> None:
        super().__init__(arch, **kwargs)
