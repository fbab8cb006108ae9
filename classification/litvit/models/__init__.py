"""The models, one file per architecture. Importing this package registers them with timm."""

from litvit.models.backbone import Backbone
from litvit.models.lit import (
    LIT,
    lit_b,
    lit_m,
    lit_s,
    lit_s_plain,
    lit_ti,
    lit_ti_plain,
    pvt_large,
    pvt_medium,
    pvt_small,
    pvt_small_dtm,
    pvt_small_msa,
    pvt_small_msa_no1,
    pvt_small_msa_no12,
    pvt_small_msa_no123,
    pvt_small_msa_no1234,
    pvt_tiny,
)
from litvit.models.lvt import LVT, lvt, lvt_cls
from litvit.models.published import identify_model, translate_published
from litvit.models.swin import swin_tiny_dtm

__all__ = [
    "LIT",
    "LVT",
    "Backbone",
    "identify_model",
    "lit_b",
    "lit_m",
    "lit_s",
    "lit_s_plain",
    "lit_ti",
    "lit_ti_plain",
    "lvt",
    "lvt_cls",
    "pvt_large",
    "pvt_medium",
    "pvt_small",
    "pvt_small_dtm",
    "pvt_small_msa",
    "pvt_small_msa_no1",
    "pvt_small_msa_no12",
    "pvt_small_msa_no123",
    "pvt_small_msa_no1234",
    "pvt_tiny",
    "swin_tiny_dtm",
    "translate_published",
]
