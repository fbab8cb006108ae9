"""A study as its command trains it: runs that are stopped and continued, that fail, that diverge; several GPUs."""

import csv
import signal
import subprocess
import sys
import time

import pytest

from litvit.commands import study as command
from litvit.errors import InputError
from litvit.processes import EXIT_DIVERGED, EXIT_INTERRUPTED
from litvit.studies.running import environment

PLAIN = {"mixup": 0, "cutmix": 0, "aug_repeats": 0, "reprob": 0, "batch_size": 20, "workers": 0, "log_interval": 1}
SHORT = {"img_size": 32, "warmup_epochs": 0, "cooldown_epochs": 0, "logger": [], **PLAIN}
WIDTHS = {"dims": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]}


def test_a_stopped_study_is_saved_and_continued(tmp_path, digits, small_study):
    models = {"A": {"model": "lit_ti", "model_kwargs": WIDTHS}}
    path = small_study(recipe={"epochs": 12, **SHORT}, models=models, seeds=[3], pairs=[])
    output = tmp_path / "out"
    arguments = [str(digits), "--study", str(path), "--output", str(output)]
    study = [sys.executable, "-m", "litvit", "study", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def epochs():
        file = output / "A/seed-3/summary.csv"
        return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []

    with subprocess.Popen(study, **options) as process:
        limit = time.monotonic() + 120
        while process.poll() is None and not epochs() and time.monotonic() < limit:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_INTERRUPTED, out
    assert "A, seed 3: stopped and saved" in out
    assert 0 < len(epochs()) < 12
    assert "0 of 1 runs are trained to their last epoch." in (output / "report.md").read_text()

    done = subprocess.run(study, check=False, timeout=120, **options)
    assert done.returncode == 0, done.stdout
    assert len(epochs()) == 12
    assert "(1 of 1; " in done.stdout
    assert "1 of 1 runs are trained to their last epoch." in (output / "report.md").read_text()
    assert (output / "A/seed-3/starts.yaml").read_text().count("step:") == 2


def test_a_run_that_finds_wrong_input_ends_the_study_in_its_own_words(tmp_path, digits, small_study):
    models = {"A": {"model": "lit_ti", "model_kwargs": {"depth": 3}}}
    path = small_study(recipe={"epochs": 1, **SHORT}, models=models, seeds=[1], pairs=[])
    with pytest.raises(InputError, match="^A, seed 1: lit_ti: .*'depth'; is it in --model-kwargs"):
        command.main([str(digits), "--study", str(path), "--output", str(tmp_path / "out")])


def test_a_diverged_run_is_told_of_and_not_tried_again(tmp_path, digits, small_study, capsys):
    recipe = {"epochs": 8, **SHORT, "batch_size": 10, "lr": 1e38, "opt": "sgd", "clip_grad": None}
    model = {"model": "lit_ti", "model_kwargs": WIDTHS}
    path = small_study(recipe=recipe, models={"A": model}, seeds=[1], pairs=[])
    arguments = [str(digits), "--study", str(path), "--output", str(tmp_path / "out")]
    assert command.main(arguments) == EXIT_DIVERGED
    told = f"Diverged, and in no number: A, seed 1 ({tmp_path}/out/A/seed-1/train.log)."
    assert told in (tmp_path / "out/report.md").read_text()
    assert ", diverged, see " in capsys.readouterr().out
    assert command.main(arguments) == EXIT_DIVERGED
    out = capsys.readouterr().out
    assert "A, seed 1: diverged, see" in out
    assert "started" not in out


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "2", "0"]), ("3,5,7", ["3", "5", "7", "3"]), ("1, 0", ["1", "0", "1", "0"])],
)
def test_each_run_has_a_gpu_and_its_share_of_the_cores(monkeypatch, visible, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = len(visible.split(",")) if visible else 3
    found = [environment(slot, 4, gpus) for slot in range(4)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == expected
    assert all(int(each["OMP_NUM_THREADS"]) >= 1 for each in found)
    assert "CUDA_VISIBLE_DEVICES" not in environment(0, 1, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in environment(0, 1, 1)
