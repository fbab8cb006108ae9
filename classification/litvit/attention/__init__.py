"""Attention: with a relative position bias over all tokens of a map (function and GPU kernels), and HiLo (module)."""

from litvit.attention.hilo import HiLo
from litvit.attention.product import attend
from litvit.attention.relative import PATHS, choose_path, relative_attention, relative_position_bias

__all__ = ["PATHS", "HiLo", "attend", "choose_path", "relative_attention", "relative_position_bias"]
