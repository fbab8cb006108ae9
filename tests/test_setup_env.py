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


def test_an_environment_of_ones_own_is_left_alone(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin")
    result = setup_env(tmp_path)
    assert result.returncode == 1
    assert "is not an environment that this script made" in one_line(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_an_interrupted_environment_is_kept_until_there_is_a_python_to_make_it_again(tmp_path):
    (tmp_path / "lit-setup.log").write_text("as an interrupted set-up leaves it")
    result = setup_env(tmp_path, LIT_PYTHON="/bin/false")
    assert result.returncode == 1
    assert "LIT_PYTHON=/bin/false" in one_line(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["lit-setup.log"]


STUB = """#!/bin/sh
# A Python that makes environments of itself, and installs and imports everything at once.
case "$*" in
    *_base_executable*) echo "$0" ;;
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"pip"*"install"*) [ ! -e "$(dirname "$0")/../fail" ] || exit 3 ;;
esac
"""


@pytest.fixture
def stub(tmp_path):
    file = tmp_path / "stub" / "python3"
    file.parent.mkdir()
    file.write_text(STUB)
    file.chmod(0o755)
    return str(file)


def test_a_set_up_from_the_start(tmp_path, stub):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "env").symlink_to(folder)
    result = setup_env(tmp_path / "env", LIT_PYTHON=stub)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"setup: {tmp_path / 'env'} is ready"
    assert (tmp_path / "env").is_symlink()
    assert (folder / "bin" / "python").is_file()
    assert len(setup_env(tmp_path / "env").stdout.splitlines()) == 1  # nothing is done twice


def test_an_interrupted_set_up_is_made_again(tmp_path, stub):
    assert setup_env(tmp_path / "env", LIT_PYTHON=stub).returncode == 0
    (tmp_path / "env" / "lit-setup.txt").unlink()
    (tmp_path / "env" / "half").touch()
    result = setup_env(tmp_path / "env", LIT_PYTHON=stub)
    assert result.returncode == 0
    assert "setup: making" in result.stdout
    assert not (tmp_path / "env" / "half").exists()


def test_a_step_that_fails_is_status_1(tmp_path, stub):
    assert setup_env(tmp_path / "env", "--core", LIT_PYTHON=stub).returncode == 0
    (tmp_path / "env" / "fail").touch()
    result = setup_env(tmp_path / "env")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: failed: build tools; the whole log is")
    assert not (tmp_path / "env" / "lit-setup.txt").exists()


def test_nothing_is_made_again_that_is_complete(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "lit-setup.log").touch()
    (tmp_path / "lit-setup.txt").write_text(f"{tmp_path} of {ROOT}: full\n")
    for flags in ([], ["--core"]):
        result = setup_env(tmp_path, *flags)
        assert (result.returncode, result.stdout) == (0, f"setup: {tmp_path} is ready\n")


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
            if requirement.name == project["name"]:  # an extra that brings another one
                assert requirement.extras <= set(project["optional-dependencies"])
                continue
            assert requirement.name in pinned, f"{requirement} on Python {python}"
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
