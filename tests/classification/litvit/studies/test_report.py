"""The report of a study."""

import json
import re

import pytest
from PIL import Image

from litvit.commands import study as command
from litvit.errors import InputError


def test_the_report_tells_what_runs_that_have_ended_came_to(tmp_path, digits, small_study, capsys):
    def epoch(folder, *top1):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{number},1.5,{100 * number - 50},{500 + number},{value}" for number, value in enumerate(top1, 1)]
        head = "epoch,train_loss,train_images_per_second,train_memory_mib,eval_top1"
        (folder / "summary.csv").write_text("\n".join((head, *rows)) + "\n")

    arguments = [str(digits), "--study", str(small_study()), "--output", str(tmp_path / "out"), "--report"]
    assert command.main(arguments) == 0
    assert "0 of 4 runs" in (tmp_path / "out/report.md").read_text()
    assert not list((tmp_path / "out").glob("*/recipe.yaml"))  # nothing of the runs is touched
    epoch(tmp_path / "out/A/seed-1", 40.0, 50.0)
    epoch(tmp_path / "out/A/seed-2", 40.0, 54.0)
    epoch(tmp_path / "out/B+/seed-1", 40.0, 49.0)
    epoch(tmp_path / "out/B+/seed-2", 60.0)  # one epoch of two
    capsys.readouterr()
    assert command.main(arguments) == 0
    out, report = capsys.readouterr().out, (tmp_path / "out/report.md").read_text()
    assert "study: 4 runs in" in out
    assert "3 of them trained" in out
    assert "3 of 4 runs are trained to their last epoch." in report
    for text in (out, report):
        assert re.search(r"\| A .*\| 2 \| 52.00 ± 2.83 \| 1.500 ± 0.000 \| 100 \(50 to 150\) \| 502 \|", text)
        assert re.search(r"\| B\+ .*\| 1 \| 49.00 \| 1.500 \| 100 \(50 to 150\) \| 502 \|", text)
        assert "| A - B+ | +1.00 | +1.00 |" in text
    figures = json.loads((tmp_path / "out/report.json").read_text())
    assert figures["models"][0]["top1"] == {"1": 50.0, "2": 54.0}
    assert Image.open(tmp_path / "out/curves.png").size[0] > 1000
    epoch(tmp_path / "out/A/seed-2", 40.0, "nan")
    assert command.main(arguments) == 0
    assert re.search(r"\| A .*\| 2 \| - \| 1.500 ± 0.000 \|", capsys.readouterr().out)
    assert json.loads((tmp_path / "out/report.json").read_text())["models"][0]["top1"] == {"1": 50.0, "2": None}
    for damage in ("epoch,eval_top1\n1,x\n", "epoch,eval_top1\n1,50.0\n", "epoch\n1,2,3\n"):
        (tmp_path / "out/A/seed-1/summary.csv").write_text(damage)
        with pytest.raises(InputError, match="A/seed-1/summary.csv.*; delete .* to train the run again"):
            command.main(arguments)
