"""Published figures of LITv2 and of the models in LIT's Tables 1 to 4, and which models each table compares."""

from typing import NamedTuple


class Published(NamedTuple):
    """Figures of a model as the paper gives them, None where it gives none."""

    title: str
    """Name of the model in the paper, or what it is there."""
    parameters: int
    """Number of parameters in M, rounded or rounded down."""
    macs: float
    """Multiply-adds in G."""
    inference_images_per_second: int | None = None
    """Images/s on an RTX 3090, batch 64."""
    training_memory: int | None = None
    """Training memory in MB, batch 64."""
    test_memory: int | None = None
    """Test memory in MB, batch 64."""
    top1: float | None = None
    """Top-1 accuracy on ImageNet in percent."""
    real_top1: float | None = None
    """Top-1 accuracy with the labels of ImageNet-Real in percent."""
    v2_top1: float | None = None
    """Top-1 accuracy on ImageNet-V2 in percent."""


class Table(NamedTuple):
    """A table of the paper."""

    title: str
    """What the table is about."""
    counterparts: dict[str, str | None]
    """Models in order, each with the one that it is compared with."""


PUBLISHED = {
    "resnet18": Published("ResNet-18", 12, 1.8, 4454, 2812, 1511, 69.8, 77.3, 57.1),
    "resnet50": Published("ResNet-50", 26, 4.1, 1279, 8051, 2908, 76.2, 82.5, 63.3),
    "resnet101": Published("ResNet-101", 45, 7.9, 722, 10710, 3053, 77.4, 83.7, 65.7),
    "deit_tiny_patch16_224": Published("DeiT-Ti", 5, 1.3, 3398, 2170, 314, 72.2, 80.1, 60.4),
    "deit_small_patch16_224": Published("DeiT-S", 22, 4.6, 1551, 4550, 713, 79.8, 85.7, 68.5),
    "deit_base_patch16_224": Published("DeiT-B", 86, 17.5, 582, 10083, 1939, 81.8, 86.7, 71.5),
    "pvt_tiny": Published("PVT-Ti", 13, 1.9, 1768, 4316, 1269, 75.1, 82.2, 63.0),
    "pvt_small": Published("PVT-S", 25, 3.8, 1007, 6996, 1356, 79.8, 85.8, 68.4),
    "pvt_medium": Published("PVT-M", 44, 6.7, 680, 9546, 1506, 81.2, 86.7, 70.1),
    "pvt_large": Published("PVT-L", 61, 9.8, 481, 13343, 1637, 81.7, 87.0, 71.2),
    "swin_tiny_patch4_window7_224": Published("Swin-Ti", 28, 4.5, 961, 6211, 1493, 81.3, 86.6, 69.7),
    "swin_small_patch4_window7_224": Published("Swin-S", 50, 8.7, 582, 9957, 1697, 83.0, 87.6, 72.1),
    "swin_base_patch4_window7_224": Published("Swin-B", 88, 15.4, 386, 13705, 2453, 83.3, 87.7, 72.3),
    "lit_ti": Published("LIT-Ti", 19, 3.6, 1294, 5868, 1194, 81.1, 86.6, 70.4),
    "lit_s": Published("LIT-S", 27, 4.1, 1298, 5973, 1264, 81.5, 86.4, 70.4),
    "lit_m": Published("LIT-M", 48, 8.6, 638, 12248, 1473, 83.0, 87.3, 72.0),
    "lit_b": Published("LIT-B", 86, 15.0, 444, 16766, 2150, 83.4, 87.6, 72.8),
    "litv2_s": Published("LITv2-S", 28, 3.7, 1471, 5100, 1200, 82.0),
    "litv2_m": Published("LITv2-M", 49, 7.5, 812, 8800, 1400, 83.3),
    "litv2_b": Published("LITv2-B", 87, 13.2, 602, 12200, 2100, 83.6),
    "lit_ti_plain": Published("LIT-Ti, plain merging", 19, 3.6, top1=80.4),
    "lit_s_plain": Published("LIT-S, plain merging", 27, 4.1, top1=81.3),
    "pvt_small_dtm": Published("PVT-S with DTM", 25, 3.8, top1=80.5),
    "swin_tiny_dtm": Published("Swin-Ti with DTM", 28, 4.5, top1=81.6),
    "pvt_small_msa": Published("PVT-S, MSA in stages 1 to 4", 20, 8.4, top1=80.9),
    "pvt_small_msa_no1": Published("PVT-S, MSA in stages 2 to 4", 20, 4.5, top1=80.8),
    "pvt_small_msa_no12": Published("PVT-S, MSA in stages 3 and 4", 19, 3.6, top1=80.4),
    "pvt_small_msa_no123": Published("PVT-S, MSA in stage 4", 17, 3.0, top1=75.0),
    "pvt_small_msa_no1234": Published("PVT-S, MSA in no stage", 14, 2.8, top1=66.8),
}
COUNTERPARTS = {
    "lit_ti": "pvt_small",
    "lit_s": "swin_tiny_patch4_window7_224",
    "lit_m": "swin_small_patch4_window7_224",
    "lit_b": "swin_base_patch4_window7_224",
    "litv2_s": "swin_tiny_patch4_window7_224",
    "litv2_m": "swin_small_patch4_window7_224",
    "litv2_b": "swin_base_patch4_window7_224",
}
TABLES = {
    1: Table(  # it alone has ImageNet-Real
        "image classification",
        {name: COUNTERPARTS.get(name) for name, published in PUBLISHED.items() if published.real_top1},
    ),
    2: Table(
        "deformable token merging (DTM) in LIT",
        {"lit_ti_plain": None, "lit_ti": "lit_ti_plain", "lit_s_plain": None, "lit_s": "lit_s_plain"},
    ),
    3: Table(
        "DTM in PVT and Swin",
        {
            "pvt_small": None,
            "pvt_small_dtm": "pvt_small",
            "swin_tiny_patch4_window7_224": None,
            "swin_tiny_dtm": "swin_tiny_patch4_window7_224",
        },
    ),
    4: Table(
        "multi-head self-attention (MSA) in fewer stages",
        {
            name: "pvt_small_msa" if name != "pvt_small_msa" else None
            for name in PUBLISHED
            if name.startswith("pvt_small_msa")
        },
    ),
}
