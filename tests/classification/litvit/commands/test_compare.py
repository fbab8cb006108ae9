"""litvit compare: two reports of the same images."""

import csv
import json

import pytest

from litvit.commands import compare
from litvit.errors import InputError


def report(folder, right, root="data/val", **result):
    """Write a report of six images of two classes, of which `right` are right."""
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"model": "lit_ti", "checkpoint": folder.name, **result}))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "correct"])
        for number in range(6):
            name = "cat" if number < 4 else "dog"
            writer.writerow([f"{root}/{name}/{number}.png", name, int(number in right)])
    return folder


def test_what_differs(tmp_path, capsys):
    first = report(tmp_path / "first", {0, 4}, top1=33.3, loss=2.5)
    second = report(tmp_path / "second", {0, 1, 2, 3}, "/elsewhere/val", top1=66.7, loss=None)
    assert compare.main([str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "top1  33.3   66.7    +33.4" in out
    assert "loss" not in out
    assert "right in the first alone 1, in the second alone 3, of 6 images" in out
    assert "p = 0.625, chance alone may well do that" in out  # 2 (1 + 4) / 16
    lines = [line.split() for line in out.splitlines()[-2:]]
    assert lines == [["cat", "4", "25.0", "100.0", "75.0"], ["dog", "2", "50.0", "0.0", "-50.0"]]


def test_wrong_input_is_one_line(tmp_path):
    first, second = report(tmp_path / "first", {0}), report(tmp_path / "second", {0})
    (second / "predictions.csv").write_text("image,class,correct\ndata/val/cat/0.png,cat,1\n")
    with pytest.raises(InputError, match="of different images"):
        compare.main([str(first), str(second)])
    (second / "predictions.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match="cannot read the report"):
        compare.main([str(first), str(second)])
    with pytest.raises(InputError, match="holds no report .*litvit validate DATA_DIR --checkpoint RUN --report"):
        compare.main([str(first), str(tmp_path / "none")])
