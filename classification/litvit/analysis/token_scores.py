"""What a classifier says at every place of its last map, and the few scores of it that a label file keeps.

Shape letters: B images, (h, w) the places of the last map, C channels, K classes, P tokens before the patch tokens.
"""

import math

import torch
from torch import Tensor, nn

from litvit.errors import InputError


def token_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores at every place of a classifier's last map.

    A model that was trained with token labels has an `aux_head` for them (LVT, VOLO). In any other, the head that
    classifies an image gets each place of the map as if it were the whole of it. With mean pooling and a linear head,
    the mean of these scores over the places is the score of the image.

    Args:
        model: a classifier of timm's or ours, in eval mode: `forward_features` and `forward_head`.
        images: (B, in_chans, H, W), normalised.

    Returns:
        Logits, (B, h, w, K) float32.

    Raises:
        InputError: what the model gives is no map, or its head does not take single places of it.
    """
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise InputError(f"{type(model).__name__} has no single map of features: choose another teacher")
    aux_head = getattr(model, "aux_head", None)
    if features.dim() == 4:
        channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
        features = features.permute(0, 2, 3, 1) if channels_first else features
        places = features.reshape(-1, 1, 1, features.shape[-1])
        places = places.permute(0, 3, 1, 2) if channels_first else places
    else:
        prefix = num_prefix_tokens(model)
        features = features[:, prefix:].unflatten(1, _grid(features.shape[1] - prefix, images.shape[-2:], model))
        # any pooling, of the class token or of patch tokens, gives the place's own token back
        places = features.reshape(-1, 1, features.shape[-1]).expand(-1, prefix + 1, -1)
    scores = aux_head(features) if aux_head is not None else model.forward_head(places)
    return scores.float().reshape(*features.shape[:3], -1)


def num_prefix_tokens(model: nn.Module) -> int:
    """How many class, distillation and register tokens come before a model's patch tokens."""
    has_class_token = is_class_token_classifier(model) or getattr(model, "cls_token", None) is not None
    has_distillation_token = getattr(model, "head_dist", None) is not None
    return getattr(model, "num_prefix_tokens", int(has_class_token) + int(has_distillation_token))


def is_class_token_classifier(model: nn.Module) -> bool:
    """Whether a model classifies an image by a class token."""
    return getattr(model, "global_pool", None) == "token"


def _grid(tokens: int, size: tuple[int, int], model: nn.Module) -> tuple[int, int]:
    h = round(math.sqrt(tokens * size[0] / size[1]))
    if not h or tokens % h:
        raise InputError(f"{type(model).__name__}: its {tokens} last tokens are no map: choose another teacher")
    return h, tokens // h


def top_scores(scores: Tensor, k: int = 5) -> Tensor:
    """Keep the k best classes of every place, as token labelling's files do.

    Who reads such a file takes the softmax of its scores and of 0 for each class that is not in it. The scores are
    shifted so that this gives the k classes their probabilities under all K: by the logarithm of the mean of exp(score)
    over the classes left out, or, where none is, by the mean score.

    Args:
        scores: logits, (B, h, w, K).
        k: classes to keep, at most; all K where there are fewer.

    Returns:
        (B, 2, min(k, K), h, w): [:, 0] the shifted scores, best first, and [:, 1] the classes' numbers; float16, or
        float32 where numbers above 2048, float16's last whole one, are possible.
    """
    K = scores.shape[-1]
    best, classes = scores.topk(min(k, K), dim=-1)
    if k < K:
        left_out = scores.scatter(-1, classes, -math.inf)
        best = best - (left_out.logsumexp(-1, keepdim=True) - math.log(K - k))
    else:
        best = best - best.mean(-1, keepdim=True)
    labels = torch.stack([best, classes.to(best.dtype)], dim=1).permute(0, 1, 4, 2, 3)
    return labels.to(torch.float16 if K <= 2049 else torch.float32)
