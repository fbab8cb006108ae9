"""The set-up: its refusals, and what it pins."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def setup_env(*arguments, **environment):
    return subprocess.run(
        [ROOT / "setup_env.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_line(stderr):
    assert re.fullmatch(r"error: .+\n", stderr), stderr
    return stderr


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_help_says_what_it_does():
    result = setup_env("--help")
    assert result.returncode == 0
    for word in ("DIR", "--core", "LIT_VENV", "LIT_PYTHON"):
        assert word in result.stdout


def test_unknown_flag():
    result = setup_env("--full")
    assert result.returncode == 2
    assert "'--full'" in one_line(result.stderr)


def test_two_folders(tmp_path):
    result = setup_env(tmp_path / "a", tmp_path / "b")
    assert result.returncode == 2
    one_line(result.stderr)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    result = setup_env("--core", LIT_VENV=str(tmp_path))
    assert result.returncode == 1
    assert str(tmp_path) in one_line(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("python", ["/nowhere/python3", "/bin/false"])
def test_python_that_does_not_run(tmp_path, python):
    result = setup_env(tmp_path / "env", LIT_PYTHON=python)
    assert result.returncode == 1
    assert python in one_line(result.stderr)
    assert not (tmp_path / "env").exists()


def test_every_pin_is_exact():
    for pin in pins():
        assert pin.url is None
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin


def test_the_project_asks_for_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    for python in ("3.10", "3.13", "3.14"):
        pinned = {
            pin.name: next(iter(pin.specifier)).version
            for pin in pins()
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        }
        for requirement in map(Requirement, asked):
            assert requirement.name in pinned, f"{requirement} on Python {python}"
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
