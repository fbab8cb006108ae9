#!/usr/bin/env python3
"""Run timm's own tests of models on ours, and print a table of what passed.

    python tools/timm_tests.py PATH_TO_TIMM [argument of pytest ...]        in classification/

PATH_TO_TIMM is a checkout of timm, or its source package, of the version that is installed:

    pip download --no-binary :all: --no-deps timm==1.0.31 && tar xzf timm-1.0.31.tar.gz

The tests of its tests/test_models.py that ask timm for the names of models run with ours. `-k lit_s` runs those of one
model. torch.jit.script is expected to fail (docs/models.md).
"""

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm

import litvit  # noqa: F401 (registers the models)
from litvit.cli import ArgumentParser, run
from litvit.errors import InputError

MODELS = timm.list_models(module=["lit", "litv2", "lvt"])
WITHOUT_CLASS_TOKEN = {"lit_s", "lit_m", "lit_b", "lit_s_plain", "pvt_small_msa_no1234", *timm.list_models("litv2_*")}
WITH_CLASS_TOKEN = [name for name in MODELS if name not in WITHOUT_CLASS_TOKEN]  # as timm lists ViTs apart
MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")


def list_own_models(
    list_models: Callable[..., list[str]],
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    **kwargs,
) -> list[str]:
    """Stand in for timm.list_models: our models where the tests ask for all of a kind, wherever they are defined."""
    wanted = [filter] if isinstance(filter, str) else list(filter)
    unwanted = [exclude_filters] if isinstance(exclude_filters, str) else list(exclude_filters)
    for patterns in (wanted, unwanted):
        if "vit_*" in patterns:
            patterns += WITH_CLASS_TOKEN
    names = list_models(wanted if any(wanted) else "", pretrained=pretrained, exclude_filters=unwanted, **kwargs)
    return [name for name in names if name.partition(".")[0] in MODELS]


class OurModels:
    """Plugin of pytest: runs the tests that were given our models, and prints the table."""

    def __init__(self) -> None:
        self.outcomes = defaultdict(dict)  # by test, then by model

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in (*MARKERS, "timeout(seconds)"):
            config.addinivalue_line("markers", f"{marker}: of timm's tests")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in list(items):
            values = item.callspec.params if hasattr(item, "callspec") else {}
            if str(values.get("model_name")).partition(".")[0] not in MODELS:
                items.remove(item)
            elif "torchscript" in item.name:
                item.add_marker(pytest.mark.xfail(reason="torch.jit.script, see docs/models.md"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, values = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        if report.when == "call" or report.outcome != "passed":
            outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
            self.outcomes[test][values.removeprefix("1-").removeprefix("2-")] = outcome

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test, outcomes in self.outcomes.items():
            for outcome in sorted(set(outcomes.values())):
                models = ", ".join(model for model, value in outcomes.items() if value == outcome)
                terminalreporter.write_line(f"{test:42} {outcome:8} {models}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH_TO_TIMM", type=Path, help="checkout or source package of timm")
    args, pytest_arguments = parser.parse_known_args(argv)
    tests = args.path / "tests" / "test_models.py"
    if not tests.is_file():
        raise InputError(f"{args.path} is no checkout of timm: it has no tests/test_models.py")
    timm.list_models = functools.partial(list_own_models, timm.list_models)
    own = ["-c", "/dev/null", "--rootdir", args.path, "-p", "no:cacheprovider", tests]
    return int(pytest.main([str(argument) for argument in (*own, *pytest_arguments)], plugins=[OurModels()]))


if __name__ == "__main__":
    run(main)
