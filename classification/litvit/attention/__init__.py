"""Attention over all tokens of a map with a relative position bias: the functional form and its GPU kernels."""

from litvit.attention.relative import relative_attention, relative_position_bias

__all__ = ["relative_attention", "relative_position_bias"]
