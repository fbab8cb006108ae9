"""Attention over all tokens of a map with a relative position bias: the functional form and its GPU kernels."""

from litvit.attention.relative import PATHS, choose_path, relative_attention, relative_position_bias

__all__ = ["PATHS", "choose_path", "relative_attention", "relative_position_bias"]
