"""What a run tells while it trains: log lines or a progress bar, TensorBoard, summary.csv."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from timm.utils import trim_summary, update_summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger("litvit")


def set_up_logging(folder: Path | None, primary: bool) -> None:
    """Send log lines to the terminal and to `folder`/train.log; other processes than the first only warn."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and primary:
        handlers.append(logging.FileHandler(folder / "train.log"))
    logging.raiseExceptions = False  # a full disk under the log file is no reason for a traceback a line
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=handlers, force=True)
    logger.setLevel(logging.INFO if primary else logging.WARNING)


class Report:
    """Reports one run; does nothing in other processes than the first.

    Args:
        folder: of the run.
        primary: whether this process reports.
        start_epoch: later rows of an older summary.csv are dropped.
        total_updates: updates of the whole run, for the time left.
    """

    def __init__(self, folder: Path, primary: bool, start_epoch: int, total_updates: int):
        self.primary = primary
        self.total_updates = total_updates
        self.summary = folder / "summary.csv"
        self.tensorboard = None
        if primary:
            with self._logs_never_stop_a_run():
                trim_summary(str(self.summary), start_epoch)
                self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self.start_time, self.start_update = time.perf_counter(), None

    @contextlib.contextmanager
    def _logs_never_stop_a_run(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("cannot write logs: %s", error)

    def _scalars(self, update: int, **values: float) -> None:
        if self.tensorboard is not None:
            with self._logs_never_stop_a_run():
                for name, value in values.items():
                    self.tensorboard.add_scalar(name.replace("_", "/", 1), value, update)

    def bar(self, epoch: int, epochs: int, total: int, done: int) -> tqdm:
        """A progress bar of one epoch; it shows nothing where there is no terminal."""
        hidden = not (self.primary and sys.stderr.isatty())
        return tqdm(
            total=total, initial=done, desc=f"epoch {epoch + 1}/{epochs}", unit="update", disable=hidden, leave=False
        )

    def train(self, bar: tqdm, epoch: int, update: int, loss: float, lr: float, images: int, seconds: float) -> None:
        """Report training at an update.

        Args:
            bar: of this epoch.
            epoch: from 0.
            update: optimizer updates since the start of the run.
            loss: mean since the last report.
            lr: learning rate.
            images: seen by all processes since the last report.
            seconds: since then.
        """
        if not self.primary:
            return
        if self.start_update is None:  # the first report: its time holds start-up and compilation, the rest does not
            self.start_time, self.start_update = time.perf_counter(), update
            left = ""
        else:
            pace = (time.perf_counter() - self.start_time) / max(update - self.start_update, 1)
            left = f", {_duration(pace * (self.total_updates - update))} left"
        rate = images / seconds
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} images/s{left}")
        if bar.disable:
            logger.info(
                "epoch %d: update %d/%d, loss %.4f, lr %.3e, %.1f images/s%s",
                epoch + 1,
                update,
                self.total_updates,
                loss,
                lr,
                rate,
                left,
            )
        self._scalars(update, train_loss=loss, train_lr=lr, train_images_per_second=rate)

    def epoch(
        self, epoch: int, update: int, train: dict[str, float], val: dict[str, float], lr: float, best: float
    ) -> None:
        """Report the end of an epoch: a line, a row of summary.csv, TensorBoard.

        Args:
            epoch: from 0.
            update: updates since the start of the run.
            train: training metrics.
            val: validation metrics.
            lr: learning rate of the epoch's last update.
            best: best top-1 so far, percent.
        """
        if not self.primary:
            return
        logger.info(
            "epoch %d: train loss %.4f, val loss %.4f, top1 %.2f, top5 %.2f, best top1 %.2f",
            epoch + 1,
            train["loss"],
            val["loss"],
            val["top1"],
            val["top5"],
            best,
        )
        self._scalars(update, **{f"val_{name}": value for name, value in val.items()})
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
