"""The models, one file per architecture. Importing this package registers them with timm."""

from litvit.models.backbone import Backbone
from litvit.models.lit import LIT, lit_b, lit_m, lit_s, lit_ti
from litvit.models.lvt import LVT, lvt, lvt_cls
from litvit.models.published import identify_model, translate_published

__all__ = [
    "LIT",
    "LVT",
    "Backbone",
    "identify_model",
    "lit_b",
    "lit_m",
    "lit_s",
    "lit_ti",
    "lvt",
    "lvt_cls",
    "translate_published",
]
