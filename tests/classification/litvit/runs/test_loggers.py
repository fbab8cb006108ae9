"""TensorBoard, W&B and MLflow: what they are given, and that none of them ends a run."""

import json
import os
import signal
import sys

import pytest
import torch
import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from litvit.processes import EXIT_INTERRUPTED
from litvit.runs.folder import CHECKPOINT
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config

# Stand-ins that write down what they are called with, and raise from the call that FAIL names on.
RECORD = """
import json, os
def record(package, call, *args, **kwargs):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([package, call, args, kwargs]) + "\\n")
    if os.environ.get("FAIL") == call:
        raise SystemError("the server is\\ngone")
"""
WANDB = """
from recorded import record
class Run:
    def log(self, values, step): record("wandb", "log", values, step=step)
    def finish(self, **kwargs): record("wandb", "finish", **kwargs)
def init(**kwargs):
    record("wandb", "init", **kwargs)
    return Run()
"""
MLFLOW = """
from types import SimpleNamespace
from recorded import record
params = {}
def set_experiment(name): record("mlflow", "set_experiment", name)
def start_run(**kwargs):
    record("mlflow", "init", **kwargs)
    return SimpleNamespace(info=SimpleNamespace(run_id="run 7"), data=SimpleNamespace(params=params))
def log_params(values):
    assert not values.keys() & params.keys()
    params.update(values)
    record("mlflow", "params", values)
def log_metrics(values, step): record("mlflow", "log", values, step=step)
def end_run(status): record("mlflow", "finish", status)
"""
REMOTE = ["--logger", "wandb", "mlflow"]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A function that returns what W&B and MLflow were called with since its last call."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, code in {"recorded": RECORD, "wandb": WANDB, "mlflow": MLFLOW}.items():
        (packages / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)

    def read(package):
        lines = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return [(call, *args, kwargs) for name, call, args, kwargs in lines if name == package]

    yield read
    for name in ("recorded", "wandb", "mlflow"):
        sys.modules.pop(name, None)


def run(*flags):
    return build_trainer(parse_config([str(flag) for flag in flags])).run()


def interrupted(flags, step):
    """A run that a signal ends after a step."""
    trainer = build_trainer(parse_config(flags))
    guard_step = trainer.guard.step

    def step_and_signal(loss):
        if trainer.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return guard_step(loss)

    trainer.guard.step = step_and_signal
    assert trainer.run() == EXIT_INTERRUPTED


def test_tensorboard_has_scalars_and_hyperparameters_of_one_run(flags, tmp_path):
    interrupted(flags, 6)
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, 9))
    assert [scalar.step for scalar in events.Scalars("val/top1")] == [4, 8]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(start).session_start_info.hparams
    assert values["lr"].number_value == 2e-3
    assert values["model"].string_value == "lit_ti"
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"val/top1", "val/top5", "val/loss"}
    assert all(path.is_file() for path in (tmp_path / "run" / "tensorboard").iterdir())  # no second run


def test_wandb_gets_settings_and_metrics_and_a_resumed_run_goes_on_there(flags, tmp_path, calls):
    interrupted([*flags, "--logger", "wandb"], 6)
    assert run(flags[0], "--resume", tmp_path / "run", "--epochs", 3) == 0
    inits = [call[-1] for call in calls("wandb") if call[0] == "init"]
    assert [init["config"]["epochs"] for init in inits] == [2, 3]
    assert inits[0]["config"]["lr"] == 2e-3
    assert inits[0]["id"] == inits[1]["id"]
    assert [init["resume"] for init in inits] == ["allow", "allow"]
    assert (inits[0]["name"], inits[0]["project"], inits[0]["dir"]) == ("run", "litvit", str(tmp_path / "run"))
    logged = [(call[2]["step"], call[1]) for call in calls("wandb") if call[0] == "log"]
    assert [step for step, values in logged if "train/loss" in values] == list(range(1, 13))
    assert [step for step, values in logged if "val/top1" in values] == [4, 8, 12]
    assert [call[-1] for call in calls("wandb") if call[0] == "finish"] == [{"exit_code": 75}, {"exit_code": 0}]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_mlflow_gets_settings_and_metrics_and_a_resumed_run_goes_on_there(flags, tmp_path, calls):
    interrupted([*flags, "--logger", "mlflow"], 6)
    assert run(flags[0], "--resume", tmp_path / "run", "--epochs", 3) == 0
    assert [call[1:] for call in calls("mlflow") if call[0] == "set_experiment"] == [("litvit", {})]
    assert [call[-1] for call in calls("mlflow") if call[0] == "init"] == [{"run_name": "run"}, {"run_id": "run 7"}]
    (params, _), (more, _) = [call[1:] for call in calls("mlflow") if call[0] == "params"]
    assert params["lr"] == "0.002"
    assert more == {}  # MLflow refuses changes
    logged = [(call[2]["step"], call[1]) for call in calls("mlflow") if call[0] == "log"]
    assert [step for step, values in logged if "val/top1" in values] == [4, 8, 12]
    assert [call[1] for call in calls("mlflow") if call[0] == "finish"] == ["KILLED", "FINISHED"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_logger_that_fails_does_not_end_the_run(
    flags, tmp_path, calls, monkeypatch, fails, undisturbed, assert_same_weights
):
    monkeypatch.setenv("FAIL", fails)
    assert run(*flags, *REMOTE) == 0
    assert_same_weights(tmp_path / "run", undisturbed)
    log = (tmp_path / "run" / "train.log").read_text()
    for name in ("wandb", "mlflow"):
        assert log.count(f"--logger {name} fails: SystemError: the server is gone; the run goes on\n") == 1
        assert sum(call[0] == fails for call in calls(name)) == 1  # it is not tried again in every step
    monkeypatch.delenv("FAIL")
    assert run(flags[0], "--resume", tmp_path / "run", "--epochs", 3) == 0
    assert len({call[-1].get("id") for call in calls("wandb") if call[0] == "init"}) == 1


def test_a_logger_that_has_failed_is_used_again(flags, tmp_path, calls, monkeypatch):
    monkeypatch.setattr("litvit.runs.loggers.TRY_AGAIN", 0)
    monkeypatch.setenv("FAIL", "init")
    trainer = build_trainer(parse_config([*flags, *REMOTE]))
    validate = trainer.validate

    def recover():
        os.environ.pop("FAIL", None)
        return validate()

    trainer.validate = recover
    assert trainer.run() == 0
    for name in ("wandb", "mlflow"):
        assert [call[2]["step"] for call in calls(name) if call[0] == "log"] == [4, 5, 6, 7, 8, 8]
    assert "mlflow: run 7" in (tmp_path / "run" / "loggers.yaml").read_text()


@pytest.mark.parametrize("damage", [b"", b"- 1", b"\xff\xfe", b"wandb: [", b"wandb: null"])
def test_damaged_ids_do_not_end_the_run(flags, tmp_path, calls, damage):
    interrupted([*flags, *REMOTE], 6)
    (tmp_path / "run" / "loggers.yaml").write_bytes(damage)
    assert run(flags[0], "--resume", tmp_path / "run") == 0


@pytest.mark.parametrize("there", ["nothing", "folder"])
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_one_line(flags, tmp_path, monkeypatch, run_main, name, there):
    """W&B leaves folders of its name."""
    if there == "folder":
        (tmp_path / "here" / name).mkdir(parents=True)
    path = [str(tmp_path / "here"), *(entry for entry in sys.path if not os.path.isdir(os.path.join(entry, name)))]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    outcome = run_main(train, *flags, "--logger", "tensorboard", name)
    assert outcome.status == 2
    assert outcome.err == (
        f"error: --logger {name}: its package is not installed: pip install {name}, or leave it out\n"
    )
    assert not (tmp_path / "run").exists()


def test_no_logger(flags, tmp_path):
    assert run(*flags, "--logger") == 0
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["update"] == 8
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_names_end_where_they_end(tmp_path):
    config = parse_config(["--logger", "tensorboard", "wandb", "data", "--model", "lit_ti"])
    assert (config.data.data_dir, config.run.logger) == ("data", ["tensorboard", "wandb"])
    (tmp_path / "r.yaml").write_text("model: lit_ti\nlogger: []\n")
    assert parse_config(["data", "--config", str(tmp_path / "r.yaml")]).run.logger == []


def test_wandb_itself_offline(flags, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted([*flags, "--logger", "wandb"], 6)
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len(set(runs)) == 1
    assert "fails" not in (tmp_path / "run" / "train.log").read_text()


def test_mlflow_itself_with_files(flags, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    interrupted([*flags, "--logger", "mlflow"], 6)
    assert run(flags[0], "--resume", tmp_path / "run", "--epochs", 3) == 0
    (found,) = mlflow.search_runs(experiment_names=["litvit"], output_format="list")
    assert (found.info.status, found.data.params["lr"]) == ("FINISHED", "0.002")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "val/top1")
    assert [metric.step for metric in history] == [4, 8, 12]
    assert "fails" not in (tmp_path / "run" / "train.log").read_text()
