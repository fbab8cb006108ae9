"""Errors of the user's own code keep their traceback; wrong input is one line, which can show where it was found."""

import os

import pytest
from torch.utils.data import DataLoader, Dataset

from litvit.errors import InputError, require

MODULE = """
import timm, torch
from timm.models import register_model

class Broken(torch.nn.Module):
    def __init__(self, num_classes=10, in_chans=3, width=8):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_chans, width, "three")

@register_model
def broken_net(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(Broken, "broken_net", pretrained, **kwargs)
"""


@pytest.fixture
def own_module(tmp_path):
    """The environment in which a module of the user's own can be imported."""
    (tmp_path / "own_model.py").write_text(MODULE)
    return {"PYTHONPATH": str(tmp_path)}


def test_a_bug_in_a_model_of_ones_own_keeps_its_traceback(digits, run_script, own_module):
    flags = ["--model", "broken_net", "--import", "own_model", "--img-size", 64, "--dry-run"]
    outcome = run_script("train.py", digits, *flags, **own_module)
    assert outcome.status == 1
    assert "unexpected keyword argument" not in outcome.err  # img_size, which the model does not take: not its bug
    assert 'torch.nn.Conv2d(in_chans, width, "three")' in outcome.err
    assert "error:" not in outcome.err


def test_wrong_arguments_of_a_model_are_one_line(digits, run_script):
    flags = ["--model", "lit_ti", "--model-kwargs", "dephts=3", "--dry-run"]
    outcome = run_script("train.py", digits, *flags)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "unexpected keyword argument 'dephts'; is it in --model-kwargs? (LIT_TRACEBACK=1 shows where)" in outcome.err


@pytest.mark.parametrize(("flags", "environment"), [(["--traceback"], {}), ([], {"LIT_TRACEBACK": "1"})])
def test_the_traceback_of_wrong_input_can_be_seen(digits, run_script, flags, environment):
    outcome = run_script("train.py", digits, "--model", "lit_ti", "--lr-base", "-1", *flags, **environment)
    assert outcome.status == 2
    assert "check_range" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("litvit.errors.InputError: --lr-base must be at least 0")


def test_a_module_that_is_missing_is_one_line(digits, run_script):
    outcome = run_script("train.py", digits, "--model", "lit_ti", "--import", "no_such_module")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "--import no_such_module: no such module" in outcome.err


def test_a_bug_in_an_imported_module_keeps_its_traceback(digits, run_script, tmp_path):
    (tmp_path / "own_bug.py").write_text("import no_such_package_of_mine")
    flags = ["--model", "lit_ti", "--import", "own_bug"]
    outcome = run_script("train.py", digits, *flags, PYTHONPATH=str(tmp_path))
    assert outcome.status == 1
    assert "ModuleNotFoundError: No module named 'no_such_package_of_mine'" in outcome.err


NAME = os.fsdecode(b"new\nline\xff.png")


class Broken(Dataset):
    """A data set whose only item is wrong input, in a file of an odd name."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError(f"image {NAME} is broken")


def test_the_message_is_one_line_also_across_processes():
    for workers in (0, 1):
        with pytest.raises(InputError) as raised:
            next(iter(DataLoader(Broken(), num_workers=workers)))
        assert str(raised.value) == r"image new\nline\xff.png is broken"


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.module", "timm.no_such_module"])
def test_what_is_not_installed_is_named_with_its_extra(name):
    require("train", "timm", "timm.models")
    with pytest.raises(InputError) as error:
        require("train", "timm", name)
    assert str(error.value) == f'{name} is not installed: pip install "litvit[train]"'
    assert isinstance(error.value, ImportError)
