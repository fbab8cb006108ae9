"""benchmark.py as a user runs it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from litvit.errors import InputError

SCRIPT = Path(__file__).parents[2] / "classification" / "benchmark.py"


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


def test_dtm_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "dtm.json"
    result = run("dtm", "--batch-size", 1, "--repeats", 1, "--threads", 1, "--json", file)
    assert result.returncode == 0, result.stderr
    assert "| 96 x 56 x 56 -> 192 | forward |" in result.stdout
    assert "| sum | forward + backward |" in result.stdout
    report = json.loads(file.read_text())
    *rows, total = report["rows"]
    assert len(rows) == 3
    for name in ("ours", "torchvision", "linear"):
        assert total["forward"][name] == pytest.approx(sum(row["forward"][name] for row in rows))
        assert total["forward"][name] > 0
    assert "torch" in report["environment"]


def test_models_prints_a_table():
    result = run("models", "lit_ti", "published_lvt", "resnet10t", "--batch-size", 1, "--repeats", 1, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert "| lit_ti | 19.89 | 3.61 |" in result.stdout
    assert "| published_lvt | 5.52 | 0.89 |" in result.stdout
    assert "| resnet10t |" in result.stdout


def test_wrong_input_is_one_line():
    result = run("models", "lit_z")
    assert result.returncode == 2
    assert "unknown model 'lit_z'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dtm", "--batch-size", "abc"], "'abc' is not a whole number above 0"),
        (["dtm", "--device", "tpu9"], "'tpu9'"),
        (["dtm", "--json", "/no/such/folder/x.json"], "no folder /no/such/folder"),
    ],
)
def test_wrong_flags(args, message):
    main = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(InputError, match=message):
        main(args)
