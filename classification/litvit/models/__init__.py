"""The architectures, a file each. Importing this package registers them with timm."""

from litvit.models.lit import LIT, lit_b, lit_m, lit_s, lit_ti
from litvit.models.lvt import LVT, lvt, lvt_cls

__all__ = ["LIT", "LVT", "lit_b", "lit_m", "lit_s", "lit_ti", "lvt", "lvt_cls"]
