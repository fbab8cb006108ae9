"""Progress of a run: log lines or a progress bar, summary.csv, loggers, its page."""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from litvit.errors import one_line, printable
from litvit.runs.folder import LOG, PAGE, SUMMARY, RunFolder, replace_file
from litvit.runs.loggers import Loggers
from litvit.runs.page import run_page
from litvit.runs.progress import Progress
from litvit.runs.summary import add_row

logger = logging.getLogger("litvit")

FIRST_LINE = 10  # seconds of training after which a step has a log line of its own
NO_LINE = 15  # seconds of training after which there is a line without a step


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
        progress: Progress of the run.
        total_steps: Number of optimizer steps of the whole run, for the time left.
        settings: Settings of the run by name, for loggers.
    """

    def __init__(self, folder: RunFolder, progress: Progress, total_steps: int, settings: dict[str, Any]):
        self.primary, self.progress, self.total_steps = folder.primary, progress, total_steps
        self.folder, self.loggers = folder.path, None
        self.hidden = not (self.primary and sys.stderr.isatty())
        self.start = self.last_line = time.monotonic()
        self.first_line = threading.Timer(NO_LINE, self._first_line)
        self.first_line.daemon = True
        if self.primary and self.hidden:
            self.first_line.start()
        if self.primary:
            names, resumed = folder.config.logger, folder.config.resume is not None
            self.loggers = Loggers(names, folder.path, settings, progress.step, resumed)
        self.start_time, self.start_step = time.perf_counter(), None

    @contextlib.contextmanager
    def _logs_never_stop_a_run(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a full disk, a file that something else has changed, a reader of the user's
            logger.warning("cannot write logs: %s; the run goes on", one_line(error))

    def _first_line(self) -> None:
        """Show that the run lives, in the place of a line that compilation, data or slow steps keep away."""
        progress = self.progress
        logger.info("epoch %d: step %d/%d after %d s", progress.epoch + 1, progress.step, self.total_steps, NO_LINE)

    def late(self) -> bool:
        """Whether training has been silent for so long that it should have a line before its next --log-interval.

        The lines are after 10, 20, 40, ... seconds, so that slow steps have some soon and fast ones no more than usual.
        """
        silence, before = time.monotonic() - self.last_line, self.last_line - self.start
        return self.primary and self.hidden and silence >= max(FIRST_LINE, before)

    def bar(self, epochs: int, steps: int) -> tqdm:
        """Return a progress bar of one epoch of so many steps. It shows nothing without a terminal."""
        name = f"epoch {self.progress.epoch + 1}/{epochs}"
        done = self.progress.steps_in_epoch
        return tqdm(total=steps, initial=done, desc=name, unit="step", disable=self.hidden, leave=False)

    def train(self, bar: tqdm, loss: float, lr: float, images: int, seconds: float, show: bool = True) -> None:
        """Report training after a step.

        Args:
            bar: Progress bar of this epoch.
            loss: Mean loss since the last report.
            lr: Learning rate.
            images: Number of images that all processes have seen since the last report.
            seconds: Time since the last report.
            show: Whether loggers get the metrics too.
        """
        if not self.primary:
            return
        self.first_line.cancel()
        self.last_line = time.monotonic()
        step = self.progress.step
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
                self.progress.epoch + 1,
                step,
                self.total_steps,
                loss,
                lr,
                rate,
                left,
            )
        if show:
            self.loggers.log(step, {"train/loss": loss, "train/lr": lr, "train/images_per_second": rate})

    def epoch(self, train: dict[str, float], val: dict[str, float], lr: float) -> None:
        """Report an epoch that has been counted: a log line, a row of summary.csv, loggers, the run's page.

        Args:
            train: Training metrics.
            val: Validation metrics.
            lr: Learning rate of the epoch's last step.
        """
        if not self.primary:
            return
        epoch, best = self.progress.epoch, self.progress.best_top1
        logger.info(
            "epoch %d: train loss %.4f, val loss %.4f, top1 %.2f, top5 %.2f, best top1 %s",
            epoch,
            train["loss"],
            val["loss"],
            val["top1"],
            val["top5"],
            f"{best:.2f}" if best >= 0 else "none",
        )
        self.last_line = time.monotonic()
        self.loggers.log(self.progress.step, {f"val/{name}": value for name, value in val.items()})
        with self._logs_never_stop_a_run():
            named = {f"train_{name}": value for name, value in train.items()}
            named |= {f"eval_{name}": value for name, value in val.items()}
            add_row(self.folder / SUMMARY, {"epoch": epoch, **named, "lr": lr})
        with self._logs_never_stop_a_run():
            page = run_page(self.folder)
            replace_file(self.folder / PAGE, lambda temporary: temporary.write_text(page, encoding="utf-8"))

    def show(self, name: str, describe: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Save what the run's page shows beside numbers.

        Args:
            name: Name of the file in the run's folder.
            describe: Function that returns its content, of what JSON can hold.
            args: Arguments of that function.
        """
        path = self.folder / name
        with self._logs_never_stop_a_run():
            try:
                content = json.dumps(describe(*args))
                replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
            except BaseException:
                path.unlink(missing_ok=True)  # it would be of other weights
                raise

    def close(self, status: int) -> None:
        """Write out what is left, with the exit status of the run."""
        self.first_line.cancel()
        if self.primary:
            self.loggers.close(status)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
