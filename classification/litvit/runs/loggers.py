"""Where the metrics of a run are shown: TensorBoard, Weights & Biases, MLflow. None of them can end the run.

Each is a class with three methods, which may raise anything. `open` starts or continues a run with its settings, after
a number of optimizer steps. `log` shows metrics by name. `close` ends it with the exit status. A resumed run is
continued by the `id`, None for none.
"""

import importlib.util
import logging
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from litvit.errors import InputError, one_line
from litvit.processes import EXIT_INTERRUPTED
from litvit.runs.folder import replace_file

logger = logging.getLogger("litvit")

IDS = "loggers.yaml"
PROJECT = "litvit"  # project of W&B, experiment of MLflow
TRY_AGAIN = 600  # seconds until one that has failed is used again
MLFLOW_VALUE = 500  # characters that every version of MLflow takes


class TensorBoard:
    """Scalars and hyperparameters in files of the run's folder."""

    def __init__(self, folder: Path, id: str | None):
        self.events, self.id = folder / "tensorboard", None
        self.writer: SummaryWriter | None = None

    def open(self, settings: dict[str, Any], step: int) -> None:
        self.settings = settings
        # What a killed run has written after its last checkpoint is hidden: it comes again.
        self.writer = SummaryWriter(str(self.events), purge_step=step + 1 if step else None)
        simple = {name: _simple(value) for name, value in settings.items()}
        # SummaryWriter.add_hparams would show a second run, in a folder of its own.
        for summary in hparams(simple, dict.fromkeys(("val/top1", "val/top5", "val/loss")))[:2]:
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def log(self, values: dict[str, float], step: int) -> None:
        if self.writer is None or not self.events.exists():  # it has failed, or the run's folder was deleted
            self.open(self.settings, 0)
        writer, self.writer = self.writer, None
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self.writer = writer

    def close(self, status: int) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, id: str | None):
        self.folder, self.id = folder, id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]

    def open(self, settings: dict[str, Any], step: int) -> None:
        # A server that does not answer must hold up neither the run nor its end, which may be due by a time limit.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", self.folder.resolve().name),
            id=self.id,
            resume="allow",
            dir=str(self.folder),
            config=settings,
            allow_val_change=True,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, status: int) -> None:
        self.run.finish(exit_code=status)


class MLflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, id: str | None):
        self.folder, self.id = folder, id

    def open(self, settings: dict[str, Any], step: int) -> None:
        # By default MLflow tries for many minutes to reach a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        self.mlflow = mlflow
        if self.id is not None:
            run = mlflow.start_run(run_id=self.id)
        else:
            if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"} & os.environ.keys():
                mlflow.set_experiment(PROJECT)
            run = mlflow.start_run(run_name=os.environ.get("MLFLOW_RUN_NAME", self.folder.resolve().name))
            self.id = run.info.run_id
        known = run.data.params  # they cannot be changed
        simple = {name: str(_simple(value))[:MLFLOW_VALUE] for name, value in settings.items() if name not in known}
        try:
            mlflow.log_params(simple)
        except Exception:
            mlflow.end_run("FAILED")  # else it cannot be started again
            raise

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self, status: int) -> None:
        self.mlflow.end_run("KILLED" if status == EXIT_INTERRUPTED else "FAILED" if status else "FINISHED")


KINDS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}  # by the name of their package


def _simple(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def check_loggers(names: Sequence[str]) -> None:
    """Raise InputError for a logger that is unknown, or whose package is not installed."""
    for name in names:
        if name not in KINDS:
            raise InputError(f"--logger is any of {', '.join(KINDS)}, not {name}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, such as W&B leaves, is no package
            raise InputError(f"--logger {name}: its package is not installed: pip install {name}, or leave it out")


class Loggers:
    """The loggers of a run, of its first process. One that fails is warned of, and used again after ten minutes.

    Args:
        names: Names of loggers.
        folder: Folder of the run. It holds the ids by which a resumed run is continued.
        settings: Settings of the run by name.
        step: Optimizer steps that are done.
        resumed: Whether a run is continued.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any], step: int, resumed: bool):
        self.settings, self.file = settings, folder / IDS
        self.ids = self._read_ids() if resumed else {}
        self.loggers = {name: KINDS[name](folder, self.ids.get(name)) for name in dict.fromkeys(names)}
        self.open: set[str] = set()
        self.waits_until: dict[str, float] = {}
        self._ready(step)

    def _read_ids(self) -> dict[str, str]:
        try:
            ids = yaml.safe_load(self.file.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return {name: str(id) for name, id in ids.items()} if isinstance(ids, dict) else {}

    def _ready(self, step: int) -> list[str]:
        """Open what is not open yet. Returns the names of those that can be used."""
        now = time.monotonic()
        ready = [name for name in self.loggers if now >= self.waits_until.get(name, now)]
        for name in set(ready) - self.open:
            if self._try(name, self.loggers[name].open, self.settings, step):
                self.open.add(name)
        ids = self.ids | {name: each.id for name, each in self.loggers.items() if each.id is not None}
        if ids != self.ids:
            self.ids = ids
            try:
                replace_file(self.file, lambda temporary: temporary.write_text(yaml.safe_dump(ids)))
            except OSError as error:
                logger.warning("cannot write %s: %s", self.file, error)
        return [name for name in ready if name in self.open]

    def _try(self, name: str, call: Callable[..., None], *args: Any) -> bool:
        try:
            call(*args)
        except Exception as error:  # of a package, its server or a disk
            reason = textwrap.shorten(one_line(error), 300, placeholder=" ...")
            logger.warning("--logger %s fails: %s; the run goes on", name, reason)
            self.waits_until[name] = time.monotonic() + TRY_AGAIN
            return False
        return True

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show metrics by name, such as val/top1, after a number of optimizer steps."""
        for name in self._ready(step - 1):
            self._try(name, self.loggers[name].log, values, step)

    def close(self, status: int) -> None:
        """End with the exit status of the run."""
        for name in self.open:
            self._try(name, self.loggers[name].close, status)
