"""tools/timm_tests.py on a small checkout."""

import os
import subprocess
import sys
from pathlib import Path

CLASSIFICATION = Path(__file__).parents[3] / "classification"
PVT = "pvt_large, pvt_medium, pvt_small, pvt_small_dtm, pvt_small_msa, pvt_small_msa_no1, "
PVT += "pvt_small_msa_no12, pvt_small_msa_no123, {}pvt_tiny"
V2 = "litv2_b, litv2_m, litv2_s, " + ", ".join(
    f"litv2_s_alpha{tenths}" for tenths in ("00", "02", "04", "05", "07", "10")
)
EVERY = f"lit_m, lit_s, lit_s_plain, lit_ti, lit_ti_plain, {V2}, lvt, lvt_cls, " + PVT.format("pvt_small_msa_no1234, ")
TESTS = """
import pytest
import torch
from timm import create_model, list_models

NON_STD = ["vit_*", "pit_*"]


@pytest.mark.cfg
@pytest.mark.timeout(60)
@pytest.mark.parametrize("model_name", list_models(exclude_filters=["*huge*"] + NON_STD))
@pytest.mark.parametrize("batch_size", [1])
def test_standard(model_name, batch_size):
    assert create_model(model_name, device="meta").output_fmt == "NHWC"


@pytest.mark.parametrize("model_name", list_models(filter=NON_STD, exclude_filters=["*huge*"]))
def test_nonstandard(model_name):
    assert create_model(model_name, device="meta").output_fmt == "NLC"


@pytest.mark.parametrize("model_name", list_models(module=["resnet"], name_matches_cfg=True))
def test_every(model_name):
    assert model_name != "lit_b"


@pytest.mark.parametrize("model_name", list_models("lit_s"))
def test_torchscript(model_name):
    torch.jit.script(create_model(model_name))


@pytest.mark.parametrize("model_name", ["resnet18"])
def test_of_another_model(model_name):
    raise AssertionError("not ours")


def test_of_no_model():
    raise AssertionError("not ours")
"""


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(CLASSIFICATION), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, CLASSIFICATION / "tools" / "timm_tests.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_runs_the_tests_with_our_models_and_prints_a_table(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").write_text(TESTS)
    done = run(tmp_path, "-q")
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("test_")]
    assert rows == [
        ["test_standard", "passed", f"lit_b, lit_m, lit_s, lit_s_plain, {V2}, pvt_small_msa_no1234"],
        ["test_nonstandard", "passed", f"lit_ti, lit_ti_plain, lvt, lvt_cls, {PVT.format('')}"],
        ["test_every", "failed", "lit_b"],
        ["test_every", "passed", EVERY],
        ["test_torchscript", "xfailed", "lit_s"],
    ]
    assert done.returncode == 1
    assert run(tmp_path, "-q", "-k", "standard").returncode == 0


def test_a_folder_that_is_no_checkout(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path} is no checkout of timm: it has no tests/test_models.py\n",
    )
