"""A study as its command trains it: stopped by a signal, continued by the same command."""

import csv
import signal
import subprocess
import sys
import time

from litvit.processes import EXIT_INTERRUPTED

WIDTHS = {"dims": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]}


def test_a_stopped_study_is_saved_and_continued(tmp_path, digits, small_study):
    plain = {"mixup": 0, "cutmix": 0, "aug_repeats": 0, "reprob": 0, "batch_size": 20, "workers": 0, "log_interval": 1}
    path = small_study(
        recipe={"img_size": 32, "epochs": 400, "warmup_epochs": 0, "cooldown_epochs": 0, **plain},
        models={
            "A": {"model": "lit_ti", "model_kwargs": WIDTHS},
            "B": {"model": "lit_ti_plain", "model_kwargs": WIDTHS},
        },
        seeds=[3],
        pairs=[["A", "B"]],
    )
    output = tmp_path / "out"
    arguments = [str(digits), "--study", str(path), "--output", str(output), "--jobs", "2"]
    command = [sys.executable, "-m", "litvit", "study", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def epochs(model):
        file = output / model / "seed-3/summary.csv"
        return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []

    with subprocess.Popen(command, **options) as process:
        limit = time.monotonic() + 120
        while process.poll() is None and not (epochs("A") and epochs("B")) and time.monotonic() < limit:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_INTERRUPTED, out
    assert "stopped (2 of 2" in out
    trained = len(epochs("A"))
    assert 0 < trained < 400
    assert "0 of 2 runs are trained to their last epoch." in (output / "report.md").read_text()

    path.write_text(path.read_text().replace('"epochs": 400', f'"epochs": {trained + 1}'))
    done = subprocess.run(command, check=False, timeout=120, **options)
    assert done.returncode == 0, done.stdout
    assert len(epochs("A")) == trained + 1
    report = (output / "report.md").read_text()
    assert "2 of 2 runs are trained to their last epoch." in report
    assert report.count("| 1 | ") == 2
    assert (output / "A/seed-3/starts.yaml").read_text().count("step:") == 2
