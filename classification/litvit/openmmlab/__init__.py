"""LIT and LVT as backbones of mmdet and mmseg, and their checkpoints read without running code.

Importing this package (`custom_imports = dict(imports=["litvit.openmmlab"])` in a config)

- registers the backbones `LIT` and `LVT` in mmengine's root registry, where every OpenMMLab project finds them,
- replaces mmengine's reader of checkpoint files and links by one that runs no code,
- makes `mmcv.ops` importable where mmcv was installed without compiled operators,
- makes `mmseg::` in a config's `_base_` find OneDL's package of mmsegmentation.
"""

from litvit.errors import require

require("detection,segmentation", "mmengine", "mmcv")

from mmengine.config.utils import MODULE2PACKAGE

from litvit.openmmlab.backbones import LIT, LVT
from litvit.openmmlab.checkpoints import load_from_file, load_from_url
from litvit.openmmlab.mmcv_ops import provide_operators

provide_operators()
MODULE2PACKAGE["mmseg"] = "mmseg"  # mmengine asks for a package called mmsegmentation

__all__ = ["LIT", "LVT", "load_from_file", "load_from_url"]
