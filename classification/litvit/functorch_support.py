"""Whether derivatives are taken by torch.func or in forward mode, which fused operators and kernels do not have."""

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def transforms_are_active() -> bool:
    """Return whether a transform of torch.func (vmap, grad, jvp, ...) or `forward_ad.dual_level` is running.

    Fused operators then give way to plain operations, which have every derivative and a rule for vmap.
    """
    # There are no public names for these.
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
