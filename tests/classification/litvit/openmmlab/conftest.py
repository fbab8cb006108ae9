"""Imports litvit.openmmlab before any test file imports mmdet: it makes mmcv.ops importable. Fixtures of small runs."""

import pytest
from mmengine.registry import DefaultScope

import litvit.openmmlab  # noqa: F401


@pytest.fixture(scope="module")
def mmengine_scope():
    """Leave the registries of other tests as they are."""
    with DefaultScope.overwrite_default_scope("mmengine"):
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A function that returns what a run without disturbances comes to."""
    from small_run import SEED, content, train

    known = {}

    def run(**changes):
        key = repr(changes)
        if key not in known:
            folder = tmp_path_factory.mktemp("run")
            assert train(folder, **SEED | changes) == 0
            known[key] = content(folder)
        return known[key]

    return run
