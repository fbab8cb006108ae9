"""Base class of the models: a hierarchy of stages with the interface of timm's models.

Shape letters: B images, (H, W) image size, (h, w) map size, C channels, N = h*w tokens. Tokens stay channels-last.
"""

import logging
from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litvit.checkpoints import keep_own_classifier, load_weights
from litvit.downloads import cache_folder, fetch
from litvit.dtm.merging import need_not_be_called
from litvit.errors import InputError
from litvit.tokens import conv_tokens, in_parts

try:
    from timm.models._input import update_model_input_size
except ImportError:  # an older timm, whose data configs know only the size in the pretrained_cfg
    update_model_input_size = None

_logger = logging.getLogger(__name__)


class Backbone(nn.Module, ABC):
    """Stages of channels-last maps at strides 4, 8, 16 and 32, as dense backbone or, with a head, as classifier.

    A subclass creates `stages`, an nn.Sequential, and `norm`, which follows the last stage, then its classifiers by
    `reset_classifier`. It implements `_stem`, which turns images into the input of the first stage, and, if it has a
    class token, `_join_class_token`, which turns the last stage's map into tokens with it, and `forward_features`. It
    overrides `from_published` if its weights are published under other names, and `_resize_entry` and `set_input_size`
    if some of them depend on the image size.

    Args:
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        dims: Number of channels of each stage.
        class_token: Whether a class token comes before the tokens of the head.
        drop_rate: Dropout rate before the classifier.
    """

    total_stride = 32
    classifiers = ("head",)  # names of the linear layers to the classes

    def __init__(
        self, in_chans: int, num_classes: int, dims: tuple[int, ...], class_token: bool, drop_rate: float
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.num_prefix_tokens = int(class_token)
        self.output_fmt = "NLC" if class_token else "NHWC"
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.cls_token = None
        self.out_norms = nn.ModuleDict()
        self.head_drop = nn.Dropout(drop_rate)
        self._register_load_state_dict_pre_hook(Backbone._adapt_state_dict, with_module=True)

    @abstractmethod
    def _stem(self, x: Tensor) -> Tensor:
        """Turn images of any size, (B, in_chans, H, W), into the input of the first stage."""

    def _join_class_token(self, last_output: Tensor, last_input: Tensor) -> Tensor:
        """Turn the last stage's output into tokens, the class token first, before the last norm.

        A model whose class token joins in the last stage runs that stage again, on the last stage's input.
        """
        raise NotImplementedError(f"{type(self).__name__} has a class token but no _join_class_token")

    @staticmethod
    def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a published state dict to the names and layouts of this class.

        Args:
            state_dict: State dict, left as it is.

        Returns:
            New state dict, with the same entries if they have no published names of this class.
        """
        return dict(state_dict)

    def _adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        """Pre-hook of load_state_dict: translate published names, resize position tables.

        Entries of parts that the model was built without are dropped. A classifier for another number of classes is
        replaced by the model's own, with a warning.

        Args:
            state_dict: State dict to load, changed in place. (torch passes a copy of the caller's.)
            prefix: Prefix of the model's entries in it.
        """
        entries = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        for name in entries:
            del state_dict[prefix + name]
        entries = {name: value for name, value in self.from_published(entries).items() if not self._is_left_out(name)}
        own = self.state_dict()
        classes = keep_own_classifier(entries, own, self.classifiers)
        if classes:
            _logger.warning("the checkpoint holds %d classes, the model has %d: its classifier is new", *classes)
        for name, value in entries.items():
            if name in own and value.shape != own[name].shape:
                value = self._resize_entry(name, value, own[name].shape)
            state_dict[prefix + name] = value

    def _resize_entry(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        """Resize an entry that depends on the image size to the model's shape. Return others as they are."""
        return value

    def _is_left_out(self, name: str) -> bool:
        """Return whether an entry belongs to a part that the model was built without."""
        part, _, rest = name.partition(".")
        if part in ("norm", *self.classifiers):
            return isinstance(getattr(self, part), nn.Identity)
        if part in ("cls_token", "cls_pos_embed", "class_blocks"):
            return self.cls_token is None
        return part == "stages" and int(rest.partition(".")[0]) >= len(self.stages)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Record another image size where timm looks for it, as in `save_for_hf`.

        Args:
            img_size: Image size in pixels, an int or (H, W).

        Raises:
            InputError: img_size is smaller than 32.
        """
        if min(to_2tuple(img_size)) < self.total_stride:
            raise InputError(f"images must have {self.total_stride} pixels or more per side, not img_size={img_size}")
        if update_model_input_size is not None:
            update_model_input_size(self, to_2tuple(img_size))

    def _set_global_pool(self, global_pool: str) -> None:
        choices = ("token", "avg", "max", "") if self.num_prefix_tokens else ("avg", "max", "")
        if global_pool not in choices:
            raise InputError(f"global_pool must be one of {', '.join(map(repr, choices))}, got {global_pool!r}")
        self.global_pool = global_pool

    def _set_out_norms(self, out_norms: tuple[int, ...], dims: tuple[int, ...], **kwargs) -> None:
        if not set(out_norms) <= set(range(len(dims))):
            raise InputError(f"out_norms must be stages from 0 to {len(dims) - 1}, got {tuple(out_norms)}")
        self.out_norms = nn.ModuleDict({str(i): nn.LayerNorm(dims[i], **kwargs) for i in out_norms})

    def load_pretrained(self, file: str) -> None:
        """Load published weights, also for other classes, image sizes or image channels.

        Args:
            file: Checkpoint file, or a link to it.

        Raises:
            InputError: The file cannot be read, or holds weights of another model.
        """
        load_weights(self, file, new_classifier=True)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return names of further parameters without weight decay, besides biases and norms."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, an `nn.Identity` if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, and that of tokens if there is one.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: New pooling, None to keep the present one.
        """
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.stages.parameters())
        for name in self.classifiers:
            classifier = nn.Identity()
            if num_classes:
                classifier = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
                init_linear(classifier)
            setattr(self, name, classifier.train(self.training))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the dense outputs do not need: later stages, the class token, the last norm and the classifier.

        Args:
            indices: Indices of the wanted stages, or an int for the last n.
            prune_norm: Whether to drop the last norm.
            prune_head: Whether to drop the classifier and the class token.

        Returns:
            Indices of the wanted stages, counted from the first.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        prune_end = last < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        self.out_norms = nn.ModuleDict({i: norm for i, norm in self.out_norms.items() if int(i) in taken})
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or prune_end:
            self._drop_class_token()
            self.num_prefix_tokens = 0
            self.output_fmt = "NHWC"
            self.reset_classifier(0, "")
        return taken

    def _drop_class_token(self) -> None:
        self.cls_token = None

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """Return the maps at the end of stages, for images of any size from 32 up.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Indices of the wanted stages, an int for the last n, None for all.
            norm: Whether to apply the last norm to the last stage's map, if that has no norm of its own.
            stop_early: Whether to skip the stages after the last wanted one.
            output_fmt: Layout of the maps, "NCHW" or "NHWC".
            intermediates_only: Whether to return only the maps.
            return_prefix_tokens: Whether to return with each map the class token, if the model has one, as pairs (map,
                prefix tokens). Prefix tokens are (B, 1, C). They are zero for stages that have no class token yet.
            output_dict: Whether to return a dictionary: "image_intermediates" (maps), "image_intermediates_prefix"
                (prefix tokens, if asked for) and "image_features" (final tokens).

        Returns:
            Maps, (B, C, h, w) or (B, h, w, C), or a pair of final tokens and maps. The final tokens are those of
            `forward_features`, after an early stop those of the last stage that ran. Maps have no class token.

        Raises:
            InputError: The images are smaller than 32 pixels, or output_fmt is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        stop = last + 1 if stop_early or intermediates_only else len(self.stages)
        end = len(self.feature_info) - 1  # the index of the last stage, also if it was pruned

        has_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        maps, prefixes = [], []
        x = self._stem(x)
        for i, stage in enumerate(self.stages[:stop]):
            last_input, x = x, stage(x)
            if i not in taken:
                continue
            out = x
            if str(i) in self.out_norms:
                out = self.out_norms[str(i)](x)
            elif norm and i == end:
                out = self.norm(x)
            maps.append(out.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else out)
            if has_prefix:
                prefixes.append(x.new_zeros(len(x), self.num_prefix_tokens, x.shape[-1]))

        if stop == end + 1 and self.cls_token is not None and (has_prefix or not intermediates_only):
            x = self._join_class_token(x, last_input)
            if has_prefix and end in taken:
                token = x[:, : self.num_prefix_tokens]
                prefixes[-1] = self.norm(token) if norm else token
        if stop == end + 1 and not intermediates_only:
            x = self.norm(x)
        if output_dict:
            features = {} if intermediates_only else {"image_features": x}
            prefix = {"image_intermediates_prefix": prefixes} if has_prefix else {}
            return {"image_intermediates": maps, **prefix, **features}
        if has_prefix:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the tokens after the last norm from images, (B, in_chans, H, W).

        Returns:
            Tokens, (B, H/32, W/32, C), or with a class token, which comes first, (B, 1 + N, C).
        """
        x = self._stem(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        last = self.stages[-1](x)
        return self.norm(last if self.cls_token is None else self._join_class_token(last, x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens of `forward_features` and classify them.

        Args:
            x: Tokens, (B, H/32, W/32, C) or (B, 1 + N, C).
            pre_logits: Whether to return the classifier's input, (B, C).

        Returns:
            Logits, (B, num_classes). Without pooling, logits of each token.
        """
        x = self._pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _pool(self, x: Tensor) -> Tensor:
        """Pool tokens (B, h, w, C) or (B, 1 + N, C) to (B, C). Without pooling, return them as they are."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool:
            x = x.flatten(1, -2)[:, self.num_prefix_tokens :]
            x = x.mean(1) if self.global_pool == "avg" else x.amax(1)
        return self.head_drop(x)

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError("torch.jit.script does not take these models: use torch.jit.trace or torch.export")


class BackboneFeatures(FeatureGetterNet):
    """Dense maps of a model, as `features_only=True` builds it. It loads the checkpoints that the model loads."""

    def __init__(self, model: Backbone, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self._register_load_state_dict_pre_hook(self._name_as_wrapped)

    @staticmethod
    def _name_as_wrapped(state_dict: dict, prefix: str, *_) -> None:
        names = [name for name in state_dict if name.startswith(prefix)]
        if not any(name.startswith(f"{prefix}model.") for name in names):
            for name in names:
                state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def check_min_size(x: Tensor, least: int) -> None:
    """Raise InputError for images, (B, in_chans, H, W), of fewer than `least` pixels in one direction."""
    height, width = x.shape[-2:]
    if min(height, width) < least:
        raise InputError(f"images must have {least} pixels or more in both directions, got {(height, width)}")


def run_blocks(blocks: nn.ModuleList, x: Tensor, *args, recompute: bool) -> Tensor:
    """Run blocks one after the other.

    Args:
        blocks: Blocks of a stage.
        x: Input of the first block.
        *args: Further arguments of each block.
        recompute: Whether to recompute the blocks in the backward pass instead of keeping their activations.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *args, use_reentrant=False)
        else:
            x = block(x, *args)
    return x


class ConvMlp(nn.Module):
    """MLP with a 3 x 3 depthwise convolution before its activation, on (B, H, W, dim)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        # Hooks, and layers in the place of these (adapters, norms), have to see all images at once.
        plain = all(type(m) in (nn.Linear, nn.Conv2d, nn.Dropout) and need_not_be_called(m) for m in self.children())
        return in_parts(self._apply_to, x) if plain and not self.training else self._apply_to(x)

    def _apply_to(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(conv_tokens(self.conv, self.fc1(x))))))


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer: weights normal with a standard deviation of 0.02, bias zero."""
    if isinstance(module, nn.Linear) and not module.weight.is_meta:  # without numbers it would only take time
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def default_cfg(**kwargs) -> dict:
    """Return timm's pretrained_cfg of a model trained on ImageNet-1K at 224, updated by keyword arguments."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def create_backbone(
    cls: type[Backbone], variant: str, pretrained: bool = False, **kwargs
) -> Backbone | BackboneFeatures:
    """Create a variant as timm's create_model asks for it: a classifier, or dense maps with `features_only=True`.

    Args:
        cls: Class of the model.
        variant: Name of the variant.
        pretrained: Whether to load pretrained weights: the published ones, or those that `pretrained_cfg` or
            `pretrained_cfg_overlay` name.
        **kwargs: Arguments of the class, and of timm's `build_model_with_cfg`.

    Raises:
        InputError: Arguments do not fit, or the weights cannot be fetched.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    of_timm = cfg.source or cfg.state_dict or (cfg.hf_hub_id and not cfg.file)  # sources that timm reads well
    ours = pretrained and not of_timm
    if ours:  # timm's downloads may be cut off, and its reader refuses what others save beside weights
        file = fetch(cfg.file or published_weights(cfg), kwargs.get("cache_dir"))
        overlay = {**overlay, "file": str(file), "custom_load": True}
    feature_cfg = {"out_indices": (0, 1, 2, 3)}
    if "feature_cls" in kwargs:  # one of timm's: maps are the stages' outputs, (B, h, w, C)
        feature_cfg["flatten_sequential"] = True
    else:
        feature_cfg |= {"feature_cls": BackboneFeatures, "output_fmt": "NCHW"}
    model = build_model_with_cfg(
        partial(_build_dense, cls) if kwargs.get("features_only") else cls,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state_dict, _: cls.from_published(state_dict),
        feature_cfg=feature_cfg,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    if ours:
        model.pretrained_cfg.update(file=cfg.file, custom_load=cfg.custom_load)
    return model


def published_weights(cfg: PretrainedCfg) -> str:
    """Return the link of a model's published weights, or the file that a user has saved where there is no link.

    Raises:
        InputError: There is neither.
    """
    if cfg.url:
        return cfg.url
    file = cache_folder() / f"{cfg.architecture.removesuffix('_cls')}.pth"
    if not file.is_file():
        if not cfg.origin_url:
            raise InputError(f"no weights of {cfg.architecture} are published: build it with pretrained=False")
        raise InputError(
            f"the weights of {cfg.architecture} lie behind a page that no program can fetch: {cfg.origin_url} leads to "
            f"the ImageNet checkpoint, save it as {file}"
        )
    return str(file)


def _build_dense(cls: type[Backbone], **kwargs) -> Backbone:
    """Build a model for timm's feature extractors: its last stage gives a map, its modules are in the order of use."""
    model = cls(**kwargs)
    model.prune_intermediate_layers(len(model.stages))
    for name in ("out_norms", "head_drop"):
        part = getattr(model, name)
        delattr(model, name)
        setattr(model, name, part)
    return model
