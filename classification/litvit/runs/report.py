"""Progress of a run: log lines or a progress bar, TensorBoard, summary.csv."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from logging.handlers import WatchedFileHandler
from pathlib import Path

from timm.utils import trim_summary, update_summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from litvit.errors import printable
from litvit.runs.folder import LOG, SUMMARY

logger = logging.getLogger("litvit")


def set_up_logging(folder: Path | None, primary: bool) -> None:
    """Send log lines to the terminal and to `folder`/train.log. Processes other than the first log warnings only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and primary:
        handlers.append(_LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(_OneLine("%(message)s"))
    logging.raiseExceptions = False  # a full disk under the log file must not give one traceback per line
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logger.setLevel(logging.INFO if primary else logging.WARNING)


class _LogFile(WatchedFileHandler):
    """A log file that is made again where its folder was deleted and made again."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)


class _OneLine(logging.Formatter):
    """Messages on one line each, whatever names of files they hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - a method of logging's
        return printable(super().formatMessage(record))


class Report:
    """Reports one run, in its first process.

    Args:
        folder: Folder of the run.
        primary: Whether this process reports.
        start_epoch: First epoch to come. Later rows of an older summary.csv are dropped.
        total_steps: Number of optimizer steps of the whole run, for the time left.
    """

    def __init__(self, folder: Path, primary: bool, start_epoch: int, total_steps: int):
        self.primary = primary
        self.total_steps = total_steps
        self.summary, self.events = folder / SUMMARY, folder / "tensorboard"
        self.tensorboard = None
        if primary:
            with self._logs_never_stop_a_run():
                trim_summary(str(self.summary), start_epoch)
                self.tensorboard = SummaryWriter(str(self.events))
        self.start_time, self.start_step = time.perf_counter(), None

    @contextlib.contextmanager
    def _logs_never_stop_a_run(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("cannot write logs: %s", error)

    def _scalars(self, step: int, **values: float) -> None:
        if self.tensorboard is not None:
            with self._logs_never_stop_a_run():
                if not self.events.exists():  # the run's folder was deleted
                    self.tensorboard = SummaryWriter(str(self.events))
                for name, value in values.items():
                    self.tensorboard.add_scalar(name.replace("_", "/", 1), value, step)

    def bar(self, epoch: int, epochs: int, total: int, done: int) -> tqdm:
        """Return a progress bar of one epoch. It shows nothing without a terminal."""
        hidden = not (self.primary and sys.stderr.isatty())
        return tqdm(
            total=total, initial=done, desc=f"epoch {epoch + 1}/{epochs}", unit="step", disable=hidden, leave=False
        )

    def train(self, bar: tqdm, epoch: int, step: int, loss: float, lr: float, images: int, seconds: float) -> None:
        """Report training at a step.

        Args:
            bar: Progress bar of this epoch.
            epoch: Index of the epoch, from 0.
            step: Optimizer steps since the start of the run.
            loss: Mean loss since the last report.
            lr: Learning rate.
            images: Number of images that all processes have seen since the last report.
            seconds: Time since the last report.
        """
        if not self.primary:
            return
        if self.start_step is None:  # the time of the first report includes start-up and compilation
            self.start_time, self.start_step = time.perf_counter(), step
            left = ""
        else:
            pace = (time.perf_counter() - self.start_time) / max(step - self.start_step, 1)
            left = f", {_duration(pace * (self.total_steps - step))} left"
        rate = images / seconds
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} images/s{left}")
        if bar.disable:
            logger.info(
                "epoch %d: step %d/%d, loss %.4f, lr %.3e, %.1f images/s%s",
                epoch + 1,
                step,
                self.total_steps,
                loss,
                lr,
                rate,
                left,
            )
        self._scalars(step, train_loss=loss, train_lr=lr, train_images_per_second=rate)

    def epoch(
        self, epoch: int, step: int, train: dict[str, float], val: dict[str, float], lr: float, best: float
    ) -> None:
        """Report the end of an epoch: a log line, a row of summary.csv, TensorBoard.

        Args:
            epoch: Index of the epoch, from 0.
            step: Optimizer steps since the start of the run.
            train: Training metrics.
            val: Validation metrics.
            lr: Learning rate of the epoch's last step.
            best: Best top-1 accuracy so far, in percent; below 0 for none.
        """
        if not self.primary:
            return
        logger.info(
            "epoch %d: train loss %.4f, val loss %.4f, top1 %.2f, top5 %.2f, best top1 %s",
            epoch + 1,
            train["loss"],
            val["loss"],
            val["top1"],
            val["top5"],
            f"{best:.2f}" if best >= 0 else "none",
        )
        self._scalars(step, **{f"val_{name}": value for name, value in val.items()})
        with self._logs_never_stop_a_run():
            update_summary(epoch, train, val, str(self.summary), lr=lr)
            if self.tensorboard is not None:
                self.tensorboard.flush()

    def close(self) -> None:
        """Write out what is left."""
        if self.tensorboard is not None:
            with self._logs_never_stop_a_run():
                self.tensorboard.close()


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
