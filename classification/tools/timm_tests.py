#!/usr/bin/env python
"""Run timm's own tests of models on ours: timm_tests.py PATH_TO_TIMM [argument of pytest ...].

PATH_TO_TIMM is a checkout of timm, or its source package from PyPI, of the version that is installed:

    pip download --no-binary :all: --no-deps timm==VERSION && tar xzf timm-VERSION.tar.gz

Needs pytest. The tests of timm/tests/test_models.py that take the name of a model run with each of our names.
"""

import functools
import sys
from pathlib import Path

import pytest
import timm

sys.path.insert(0, str(Path(__file__).parents[1]))
import litvit.models  # noqa: E402

NAMES = timm.list_models(module=["lit", "lvt"])
WITH_CLASS_TOKEN = ["lit_ti", "lvt", "lvt_cls"]  # timm's tests call models with one "non-standard"
MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")


def list_own_models(list_models, filter="", module="", pretrained=False, exclude_filters="", **kwargs):
    """Stand in for timm.list_models where the tests ask for the models to run on."""
    patterns, excluded = [filter] if isinstance(filter, str) else list(filter), list(exclude_filters)
    if "vit_*" in patterns:
        patterns += WITH_CLASS_TOKEN
    elif patterns != [""] or pretrained:
        return list_models(filter, module=module, pretrained=pretrained, exclude_filters=exclude_filters, **kwargs)
    if "vit_*" in excluded:
        excluded += WITH_CLASS_TOKEN
    found = list_models("" if patterns == [""] else patterns, exclude_filters=excluded, **kwargs)
    return [name for name in found if name.partition(".")[0] in NAMES]


class OnOurModels:
    """Plugin of pytest: leaves out the tests that name a model of timm's."""

    def pytest_configure(self, config):
        for marker in (*MARKERS, "timeout(seconds)"):
            config.addinivalue_line("markers", f"{marker}: of timm's tests")

    def pytest_collection_modifyitems(self, config, items):
        params = [item.callspec.params if hasattr(item, "callspec") else {} for item in items]
        ours = [
            item
            for item, values in zip(items, params, strict=True)
            if values.get("model_name", "").partition(".")[0] in NAMES
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


def main(argv):
    if not argv or not (tests := Path(argv[0], "tests", "test_models.py")).is_file():
        sys.exit(f"{__doc__}\nerror: {f'{tests} is not there' if argv else 'PATH_TO_TIMM is missing'}")
    timm.list_models = functools.partial(list_own_models, timm.list_models)
    own = ["-c", "/dev/null", "--rootdir", argv[0], "-p", "no:cacheprovider", tests, *argv[1:]]
    return pytest.main(list(map(str, own)), plugins=[OnOurModels()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
