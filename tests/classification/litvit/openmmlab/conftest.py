"""Imports litvit.openmmlab before any test file imports mmdet: it makes mmcv.ops importable."""

import litvit.openmmlab  # noqa: F401
