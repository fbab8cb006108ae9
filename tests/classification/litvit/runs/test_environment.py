"""The record of a run's start."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from litvit.runs import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def copy_of_the_code(folder):
    """The module, as it is where it lies in `folder`."""
    (folder / "litvit" / "runs").mkdir(parents=True)
    file = shutil.copy(environment.__file__, folder / "litvit" / "runs")
    spec = importlib.util.spec_from_file_location("copied_environment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A repository with a copy of the code, and its commit."""
    module = copy_of_the_code(tmp_path / "repository" / "classification")
    git(tmp_path / "repository", "init", "-q")
    git(tmp_path / "repository", "add", ".")
    git(tmp_path / "repository", "commit", "-q", "-m", "code")
    git(tmp_path / "repository", "tag", "-a", "v1", "-m", "v1")
    return module, git(tmp_path / "repository", "rev-parse", "HEAD")


def start(module):
    return module.describe_start(torch.device("cpu"), 2)


def test_a_start_is_described(checkout, monkeypatch):
    module, commit = checkout
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "my data", "--lr", "1"])
    record = yaml.safe_load(yaml.safe_dump(start(module)))
    assert shlex.split(record["command"]) == ["python", "train.py", "my data", "--lr", "1"]
    assert record["folder"] == os.getcwd()
    assert (record["commit"], record["changed"]) == (commit, False)
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"].keys() == {"python", "litvit", "torch", "torchvision", "timm"}
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert (record["hardware"]["device"], record["hardware"]["processes"]) == ("cpu", 2)


def test_a_changed_tree_is_told(checkout):
    module, commit = checkout
    with open(module.__file__, "a") as file:
        file.write("# changed")
    assert (start(module)["commit"], start(module)["changed"]) == (commit, True)


def test_another_repository_of_the_environment_is_not_taken(checkout, tmp_path, monkeypatch):
    """As in a hook of git."""
    module, commit = checkout
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert start(module)["commit"] == commit


def test_a_package_that_is_installed_in_a_checkout_of_something_else_has_no_commit(checkout, tmp_path):
    installed = copy_of_the_code(tmp_path / "repository" / "venv" / "site-packages")
    assert (start(installed)["commit"], start(installed)["changed"]) == (None, None)


@pytest.mark.parametrize("git", [None, "exit 1", "sleep 60"])
def test_git_that_is_missing_or_fails_or_hangs_is_no_fault(checkout, tmp_path, monkeypatch, git):
    module, _ = checkout
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    (tmp_path / "bin").mkdir()
    if git is not None:
        (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}" + (f"{os.pathsep}/bin" if git else ""))
    assert start(module)["commit"] is None


def test_a_current_folder_that_is_gone_is_no_fault(tmp_path, monkeypatch):
    here = Path.cwd()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert start(environment)["folder"] is None
    finally:
        os.chdir(here)
