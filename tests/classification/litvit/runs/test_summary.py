"""summary.csv: rows of epochs, also of runs that older versions began."""

import csv

import pytest

from litvit.runs.summary import add_row, read_summary


def test_a_run_of_an_older_version_is_continued_with_more_columns(tmp_path):
    file = tmp_path / "summary.csv"
    file.write_text("epoch,train_loss,eval_top1,lr\n0,2.5,10.0,0.1\n1,2.25,20.0,0.05\n2,2.0,30.0,0.01\n")
    add_row(file, {"epoch": 3, "train_loss": 1.5, "train_grad_norm": 4.0, "eval_top1": 40.0, "lr": 0.01})
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["train_loss"] for row in rows] == ["2.5", "2.25", "1.5"]  # as they were written
    assert [row["train_grad_norm"] for row in rows] == ["", "", "4.0"]
    assert read_summary(file)[1] == {"epoch": 2, "train_loss": 2.25, "eval_top1": 20.0, "lr": 0.05}
    assert read_summary(file)[2]["train_grad_norm"] == 4.0


@pytest.mark.parametrize(
    "content",
    ["epoch,loss\nfirst,2\n", "epoch,loss\n1,2,3\n", "a,b\n1,2\n", "text", "epoch,loss\ninf,2\n", "epoch,loss\n1,x\n"],
)
def test_something_else_is_kept_under_another_name(tmp_path, content):
    file = tmp_path / "summary.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match="not a table of epochs"):
        read_summary(file)
    add_row(file, {"epoch": 1, "lr": 0.1})
    assert read_summary(file) == [{"epoch": 1, "lr": 0.1}]
    assert (tmp_path / "summary.csv.damaged").read_text() == content
