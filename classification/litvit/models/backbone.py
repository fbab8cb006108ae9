"""What LIT and LVT have in common: a hierarchy of stages behind the interface of timm's models.

Shape letters: B images, (H, W) image size, (h, w) map size, C channels, N = h*w tokens. Tokens stay channels-last.
"""

from abc import ABC, abstractmethod

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litvit.checkpoints import adapt_state_dict, to_own_names
from litvit.devices import is_static
from litvit.errors import InputError

# What a hidden layer may have, a thread, in one part of a batch in inference on a CPU. 7 to 11 MiB in all did best for
# LIT-Ti, S, B and LVT on two threads with 32 MiB of cache; arrays of more than 32 MiB are new pages each time.
_THREAD_BYTES = 9 * 2**19
_MOST_BLOCKS = 32  # a stage in one graph of torch.compile, each part counted
# torch before 2.7 doesn't tell an export from other graphs.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Backbone(nn.Module, ABC):
    """Stages of channels-last maps at strides 4, 8, 16 and 32, as dense backbone or, with a head, as classifier.

    A subclass makes `stages` and `norm` (after the last stage), then its classifiers by `reset_classifier`. It says how
    an image becomes what the first stage takes (`_embed`), and the last stage's map the head's tokens (`_last_tokens`).

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for no classifier.
        dims: channels of the stages.
        class_token: whether a class token comes before the tokens that the head gets.
        drop_rate: dropout before the classifier.
    """

    classifiers = ("head",)  # linear layers to the classes

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
        self._register_load_state_dict_pre_hook(adapt_state_dict, with_module=True)

    @abstractmethod
    def _embed(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) of any size -> what the first stage takes."""

    @abstractmethod
    def _last_tokens(self, x: Tensor, stage_input: Tensor) -> Tensor:
        """What the last stage gave and got -> the tokens of `forward_features`."""

    def _set_global_pool(self, global_pool: str) -> None:
        choices = ("token", "avg", "") if self.num_prefix_tokens else ("avg", "")
        if global_pool not in choices:
            raise InputError(f"global_pool must be one of {', '.join(map(repr, choices))}, got {global_pool!r}")
        self.global_pool = global_pool

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
        """Put a fresh classifier on the model, of tokens too if it has one.

        Args:
            num_classes: classes, 0 for no classifier.
            global_pool: a new pooling, None to keep it.
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
            setattr(self, name, classifier)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the dense outputs `indices` do not need: later stages, class token, last norm and classifier.

        Args:
            indices: the stages wanted; an int for the last n.
            prune_norm: drop the last norm.
            prune_head: drop the classifier, and the class token with it.

        Returns:
            The indices of the stages wanted, counted from the first.
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
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps at the end of stages, for images of any size from 32 up.

        Args:
            x: images, (B, in_chans, H, W).
            indices: the stages wanted; an int for the last n, None for all.
            norm: put the last norm on the last stage's map, if it has no norm of its own.
            stop_early: do not run stages after the last one wanted.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone.

        Returns:
            The maps, (B, C, h, w) or (B, h, w, C), or (final tokens, maps). The final tokens are those of
            `forward_features`; the maps are dense ones, without class token. After an early stop the final tokens are
            the last stage's that ran.

        Raises:
            InputError: an image smaller than 32 pixels, an unknown output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        stop = last + 1 if stop_early or intermediates_only else len(self.stages)

        maps = []
        x = self._embed(x)
        for i, stage in enumerate(self.stages[:stop]):
            stage_input, x = x, stage(x)
            if i not in taken:
                continue
            out = x
            if str(i) in self.out_norms:
                out = self.out_norms[str(i)](x)
            elif norm and i == len(self.feature_info) - 1:
                out = self.norm(x)
            maps.append(out.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else out)
        if intermediates_only:
            return maps
        if stop == len(self.feature_info):
            x = self._last_tokens(x, stage_input)
        return x, maps

    def _pool(self, x: Tensor) -> Tensor:
        """Tokens (B, h, w, C) or (B, 1 + N, C) -> (B, C), or as they are without pooling."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1) if x.dim() == 3 else x.mean((1, 2))
        return self.head_drop(x)


class Features(FeatureGetterNet):
    """What `features_only=True` builds: dense maps of a model, which loads the checkpoints that the model loads."""

    def __init__(self, model: Backbone, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self._register_load_state_dict_pre_hook(self._name_as_wrapped)

    @staticmethod
    def _name_as_wrapped(state_dict: dict, prefix: str, *_) -> None:
        names = [name for name in state_dict if name.startswith(prefix)]
        if not any(name.startswith(f"{prefix}model.") for name in names):
            for name in names:
                state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def refuse_small(x: Tensor) -> None:
    """Raise InputError for images (B, C, H, W) of less than 32 pixels a side, which leave nothing of the last map."""
    if min(x.shape[-2:]) < 32:
        raise InputError(f"images must have 32 pixels or more in both directions, got {tuple(x.shape[-2:])}")


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, *args, hidden: int, recompute: bool, tokenwise: bool = False
) -> Tensor:
    """Run blocks one after the other, `recompute`-ing them in the backward pass where there is one.

    On a CPU in inference, large batches go through all blocks in parts which stay in its cache: taken at once, the
    hidden layers of early blocks are so large that every product reads them from memory, into pages that the system
    clears first.

    Args:
        blocks: which look at each image of a batch alone.
        x: (B, ..., C).
        args: what else the blocks take.
        hidden: channels of the widest layer within blocks.
        recompute: keep nothing that is within blocks for the backward pass.
        tokenwise: blocks look at each token of (B, N, C) alone, so that a part may be some tokens, (1, n, C).
    """
    batch, dim = (x.reshape(1, -1, x.shape[-1]), 1) if tokenwise else (x, 0)
    parts = _parts(blocks, batch, dim, hidden)
    if parts == 1:
        return _run_blocks(blocks, x, *args, recompute=recompute)
    outs = [_run_blocks(blocks, part, *args, recompute=False) for part in batch.tensor_split(parts, dim)]
    return torch.cat(outs, dim).view(x.shape)


def _run_blocks(blocks: nn.ModuleList, x: Tensor, *args, recompute: bool) -> Tensor:
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *args, use_reentrant=False)
        else:
            x = block(x, *args)
    return x


def _parts(blocks: nn.ModuleList, x: Tensor, dim: int, hidden: int) -> int:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.jit.is_tracing() or _is_exporting():
        return 1
    # Hooks see whole batches, and stochastic depth, which may be on alone, draws for whole images.
    if any(m.training or m._forward_hooks or m._forward_pre_hooks for m in blocks.modules()):
        return 1
    size = x.numel() // x.shape[-1] * hidden * x.element_size()
    if torch.compiler.is_compiling() and not is_static(size):
        return 1  # a graph for all sizes must not ask for one
    parts = max(min(round(size / _part_bytes()), x.shape[dim]), 1)
    return 1 if torch.compiler.is_compiling() and parts * len(blocks) > _MOST_BLOCKS else parts


@torch.compiler.assume_constant_result
def _part_bytes() -> int:
    return _THREAD_BYTES * torch.get_num_threads()


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's weights from a normal distribution of 0.02, and set its bias to zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def default_cfg(**kwargs) -> dict:
    """timm's data and head settings of a model trained on ImageNet-1K at 224, beside those given."""
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


def build(cls: type[Backbone], variant: str, pretrained: bool, config: dict) -> Backbone | Features:
    """Build a variant as timm's create_model asks for it: classifier, or Features with `features_only=True`."""
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state_dict, _: to_own_names(state_dict),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": Features},
        **config,
    )
