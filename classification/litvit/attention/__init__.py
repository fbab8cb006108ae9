"""Attention, with a relative position bias over all tokens of a map: the functional forms and GPU kernels."""

from litvit.attention.product import attend
from litvit.attention.relative import PATHS, choose_path, relative_attention, relative_position_bias

__all__ = ["PATHS", "attend", "choose_path", "relative_attention", "relative_position_bias"]
