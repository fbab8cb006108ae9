"""The console command: `litvit COMMAND`, which is also `python -m litvit COMMAND`."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from litvit.__main__ import COMMANDS

ROOT = Path(__file__).parents[3]


def litvit(*arguments, **environment):
    """Run `python -m litvit` in a process of its own."""
    command = [sys.executable, "-m", "litvit", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_help_lists_the_commands_and_imports_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    done = litvit("--help", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    assert (done.returncode, done.stderr) == (0, "")
    for name, (module, text) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
        assert callable(importlib.import_module(module).main)


def test_the_version_is_that_of_the_citation():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert litvit("--version").stdout == f"litvit {cited}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: unknown command 'trian'; did you mean train? (litvit --help lists the commands)\n"),
        (["make_token_labels"], "error: unknown command 'make_token_labels'; did you mean make-token-labels?"),
        ([], "error: which command? (litvit --help lists the commands)\n"),
        (
            ["train", "x", "--no-such"],
            "error: unrecognized arguments: --no-such (litvit train --help lists the flags)",
        ),
        (["train", "nowhere", "--model", "lit_x"], "error: unknown model 'lit_x'; did you mean"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message):
    done = litvit(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_threads_are_told_not_to_spin_before_torch_loads(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nraise SystemExit(os.environ.get('OMP_WAIT_POLICY'))")
    done = litvit("train", "--help", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    assert done.stderr.splitlines()[-1] == "PASSIVE"


def test_a_module_that_imports_litvit_finds_the_models(tmp_path):
    """Whether it is a script, or run by -m, with "litvit" among its arguments."""
    (tmp_path / "program.py").write_text("import litvit, timm\nprint(timm.is_model('lit_s'), litvit.models.__name__)")
    for start in (["program.py"], ["-m", "program"]):
        command = [sys.executable, *start, "litvit"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.stdout == "True litvit.models\n", done.stderr
