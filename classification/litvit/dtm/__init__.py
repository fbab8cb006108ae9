"""Deformable token merging: the module of the LIT paper and its functional form, for channels-last tokens."""

from litvit.dtm.deform_conv import deform_conv_tokens
from litvit.dtm.merging import DeformableTokenMerging, offset_parameters
from litvit.dtm.replacing import replace_merging

__all__ = ["DeformableTokenMerging", "deform_conv_tokens", "offset_parameters", "replace_merging"]
