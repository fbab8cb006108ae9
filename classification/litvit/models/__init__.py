"""The architectures, a file each. Importing this package registers them with timm."""

from litvit.models.lit import LIT, lit_b, lit_m, lit_s, lit_ti

__all__ = ["LIT", "lit_b", "lit_m", "lit_s", "lit_ti"]
