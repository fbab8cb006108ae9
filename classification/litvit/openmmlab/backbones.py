"""LIT, LVT and Swin with token merging in mmengine's registry: the classification models without their heads."""

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import create_model, list_models
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import litvit  # noqa: F401 (registers the models with timm)
from litvit.checkpoints import read_state_dict
from litvit.errors import InputError
from litvit.openmmlab.checkpoints import fetch, load_or_explain


class MMBackbone(BaseModule):
    """A model of litvit as a dense backbone: from images to a tuple of maps at strides 4, 8, 16 and 32.

    The parameters have the same names as in the classification model, so that ImageNet weights, published or ours, load
    into a detector under "backbone." without a conversion. To this end the parts of the model are registered as parts
    of this module, and the model itself is not: registered too, it would put "model." in front of every name.

    Args:
        arch: Name of the model.
        out_indices: Indices of the stages whose maps are returned; stages after the last one are removed.
        drop_path_rate: Stochastic depth rate of the last block.
        with_cp: Whether to recompute the blocks in the backward pass instead of keeping their activations.
        frozen_stages: Number of stages that are not trained, together with the patch embedding; 0 freezes the patch
            embedding only, -1 nothing.
        norm_eval: Whether BatchNorms keep their statistics in training too.
        init_cfg: `dict(type="Pretrained", checkpoint=FILE_OR_URL)` for ImageNet weights; with `prefix="backbone."` for
            those of a detector or segmentor.
        **kwargs: Further arguments of the model (`img_size`, `out_norms`, ...).

    Raises:
        InputError: An unknown arch, or arguments that do not fit it.
    """

    family: str | tuple[str, ...] = ""  # patterns of the models' names, for timm.list_models

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
            if drop_path_rate:  # not every backbone has it
                kwargs["drop_path_rate"] = drop_path_rate
            model = create_model(arch, num_classes=0, **kwargs)
        except TypeError as error:
            raise InputError(f"{arch} does not take these arguments: {error}") from error
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        model.set_grad_checkpointing(with_cp)
        self.__dict__["model"] = model  # not registered, see above
        for name, part in model.named_children():
            self.add_module(name, part)
        for part in self._frozen():
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images (B, in_chans, H, W) of any size from 32 x 32.

        Returns:
            Maps (B, C, h, w) of the stages `out_indices`.
        """
        return tuple(self.model.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True))

    def train(self, mode: bool = True) -> "MMBackbone":
        """Switch to training mode, except for frozen parts and, with `norm_eval`, BatchNorms."""
        super().train(mode)
        norms = [module for module in self.modules() if self.norm_eval and isinstance(module, _BatchNorm)]
        for module in (*self._frozen(), *norms):
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = self.model.layers if hasattr(self.model, "layers") else self.model.stages  # Swin's, ours
        first = getattr(self.model, "patch_embed", None) or stages[0].patch_embed
        norms = getattr(self.model, "out_norms", {}).items()
        norms = [norm for i, norm in norms if int(i) < self.frozen_stages]
        return [first, *stages[: self.frozen_stages], *norms]

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names.

        Raises:
            InputError: A checkpoint that cannot be read, or one of another model.
        """
        if not isinstance(self.init_cfg, dict) or self.init_cfg["type"] != "Pretrained":
            super().init_weights()
            return
        checkpoint = self.init_cfg["checkpoint"]
        prefix = self.init_cfg.get("prefix", "")
        entries = read_state_dict(fetch(checkpoint), None if prefix else self.model)
        entries = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        error = load_or_explain(self.model, entries, self.arch)
        if error:
            raise InputError(f"{checkpoint} does not fit {self.arch}: {error}")
        self.is_init = True

    def _load_from_state_dict(self, *args) -> None:
        # The model's pre-hook translates published names. torch calls the hooks of registered modules only.
        self.model._load_from_state_dict(*args)


@MODELS.register_module()
class LIT(MMBackbone):
    """LIT (`arch`: lit_ti, lit_s, lit_m, lit_b) and LITv2 (litv2_s, litv2_m, litv2_b), see `MMBackbone`.

    PVT (pvt_tiny, pvt_small, pvt_medium, pvt_large) and the models of the papers' ablations are other values of `arch`.

    For models with relative position tables `img_size` is the image size of the tables, 800 in the published detectors
    and 512 in the published segmentors; `out_norms` are the stages whose maps get a LayerNorm. LITv2 takes
    `window_sizes`, the side of HiLo's windows in each stage.
    """

    family = ("lit_*", "litv2_*", "pvt_tiny", "pvt_small*", "pvt_medium", "pvt_large")

    def __init__(self, arch: str = "lit_ti", **kwargs) -> None:
        super().__init__(arch, **kwargs)


@MODELS.register_module()
class LVT(MMBackbone):
    """LVT as backbone of mmdet and mmseg, see `MMBackbone`."""

    family = "lvt*"

    def __init__(self, arch: str = "lvt", **kwargs) -> None:
        super().__init__(arch, **kwargs)


@MODELS.register_module()
class Swin(MMBackbone):
    """Swin with deformable token merging (`arch`: swin_tiny_dtm) as backbone of mmdet and mmseg, see `MMBackbone`.

    Images need sides that are multiples of 4, as detectors and segmentors pad them.
    """

    family = "swin_*_dtm"

    def __init__(self, arch: str = "swin_tiny_dtm", **kwargs) -> None:
        super().__init__(arch, strict_img_size=False, **kwargs)
        self.model._register_load_state_dict_pre_hook(_drop_classifier)


def _drop_classifier(state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Pre-hook of load_state_dict: drop what ImageNet weights of timm's have beside the backbone."""
    for name in list(state_dict):
        if name.startswith((f"{prefix}norm.", f"{prefix}head.")):
            del state_dict[name]
