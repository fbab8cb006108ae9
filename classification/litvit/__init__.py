"""LIT and LVT: vision transformers that pay less attention. Importing this package registers its models with timm."""

from litvit import models

__all__ = ["models"]
