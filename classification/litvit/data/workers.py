"""Loader processes: what each of them reads, and a wait for them that answers signals and finds the dead."""

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from ctypes import Array, c_char
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from litvit.errors import InputError, printable
from litvit.processes import end_with_parent, leave_signals_to_the_trainer, stop_signal

logger = logging.getLogger("litvit")

WAIT_TOLD = 60.0  # seconds between warnings of a wait that lasts
_NAME_BYTES = 1024
_SHARED_MEMORY = "/dev/shm"

# How torch names processes that have died.
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited|is killed)")
_waited_for: frozenset[str] = frozenset()  # pids of the loader processes that this process waits for
_file_read: Array[c_char] | None = None  # in a loader process: memory that it shares with the trainer


class DeadLoaderError(InputError):
    """A loader process was killed. The batches that it was to bring are lost, and a new loader would bring them."""


class NoBatch(Exception):  # noqa: N818 - not an error, as KeyboardInterrupt
    """A signal asked the process to stop while it waited for a batch."""


def reading(name: str) -> None:
    """Tell the trainer which file this loader process begins to read. Other processes tell nothing.

    Args:
        name: Name of the file, empty when it is read.
    """
    if _file_read is not None:
        _file_read.value = name.encode("utf-8", "surrogateescape")[: _NAME_BYTES - 1]


class WatchedLoader(DataLoader):
    """DataLoader whose wait for a batch answers signals, says what it waits for, and ends if a loader process has died.

    Its iterator raises, besides what a DataLoader's raises,

    - `NoBatch` if a signal comes that a `StopSignals` context records,
    - `DeadLoaderError` if a loader process was killed,
    - `InputError` if batches do not fit into shared memory.

    It warns every minute that it waits. The warning names the files that loader processes told of by `reading`. A
    `timeout` of the DataLoader is kept.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._watch()

    @classmethod
    def of(cls, loader: DataLoader) -> "WatchedLoader":
        """Turn a DataLoader that another library has made, and that has not been iterated, into a watched one."""
        if not isinstance(loader, cls):
            loader.__class__ = type(cls.__name__, (cls, type(loader)), {}) if type(loader) is not DataLoader else cls
            loader._watch()
        return loader

    def _watch(self) -> None:
        self._files_read = [RawArray(c_char, _NAME_BYTES) for _ in range(self.num_workers)]
        self.worker_init_fn = partial(_start_worker, self._files_read, self.worker_init_fn)

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is not None:
            self._iterator._timeout = self.timeout  # its processes begin the epoch, which may take a while
        batches = super().__iter__()
        if not self.num_workers:
            return batches
        batches._timeout = 1  # seconds, after which `_watched` looks around
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == torch.utils.data._utils.signal_handling.__name__:
            # torch's handler raises for a dead loader process, which ends the read of a batch that has come in part. In
            # the middle of a step it must not. The next wait looks first.
            signal.signal(signal.SIGCHLD, partial(_raise_in_a_wait, handler))
        return self._watched(batches)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        start = told = time.monotonic()
        while True:
            before = self._files()
            try:
                batch = _next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two if a process dies while it sends a batch
                if "DataLoader timed out" not in str(error):
                    explained = self._explained(error, batches)
                    if explained is error:
                        raise
                    raise explained from error
                pinning = getattr(batches, "_pin_memory_thread", None)
                if pinning is not None and not pinning.is_alive():
                    raise RuntimeError("the thread that pins memory has died") from None
                if stop_signal() is not None:
                    for process in batches._workers:
                        process.kill()  # it may hang in a read, and would be waited for when this process ends
                    raise NoBatch from None
                now = time.monotonic()
                if 0 < self.timeout <= now - start:
                    raise
                if now - told > WAIT_TOLD:
                    told = now
                    files = [name for name, last in zip(self._files(), before, strict=True) if name and name == last]
                    whom = f"the loader processes, which read {', '.join(files)}" if files else "the loader processes"
                    logger.warning("waiting for data for %.0f s: for %s", now - start, whom)
                continue
            yield batch
            start = told = time.monotonic()

    def _files(self) -> list[str]:
        return [printable(file.value.decode("utf-8", "surrogateescape")) for file in self._files_read]

    def _explained(self, error: Exception, batches: Iterator[Any]) -> Exception:
        """Return the exception to raise for one that torch has raised."""
        message = str(error)
        if isinstance(error, OSError | EOFError):
            ended = multiprocessing.connection.wait([process.sentinel for process in batches._workers], timeout=1)
            for process in batches._workers:
                process.join(1 if process.sentinel in ended else 0)  # it may not be quite dead yet
        # A signal handler may have taken the status of a process that torch names.
        pids = _named_dead(error)
        dead = [
            (file, process.exitcode)
            for file, process in zip(self._files(), batches._workers, strict=True)
            if process.exitcode or str(process.pid) in pids
        ]
        full = "No space left on device" in message and re.search(r"shm|shared memory|torch_\d", message)
        if full or "Bus error" in message or any(status == -signal.SIGBUS for _, status in dead):
            return InputError(_shared_memory_is_full())
        if not dead:
            return error
        told = []
        for file, status in dead:
            if status and status > 0:
                end = f"ended with status {status}"
            else:
                end = f"was killed by {signal.Signals(-status).name}" if status else "was killed"
            told.append(f"{end} while it read {file}" if file else end)
        return DeadLoaderError(
            f"a loader process {'; another '.join(told)}: if memory is short, use fewer loader processes"
        )


def _shared_memory_is_full() -> str:
    size = ""
    if os.path.isdir(_SHARED_MEMORY):
        size = f", of {shutil.disk_usage(_SHARED_MEMORY).total / 2**20:.0f} MiB,"
    return (
        f"the shared memory {_SHARED_MEMORY}{size} is full: make it larger (docker run --shm-size 8g), use fewer "
        "loader processes, or none"
    )


def _next(batches: Iterator[Any]) -> Any:
    global _waited_for
    _waited_for = frozenset(str(process.pid) for process in batches._workers)
    try:
        if any(process.exitcode for process in batches._workers):
            raise RuntimeError("a loader process has died")
        return next(batches)
    finally:
        _waited_for = frozenset()


def _named_dead(error: Exception) -> list[str]:
    """Return the pids of the dead loader processes that an error of torch names."""
    named = _DEAD.search(str(error))
    return named[1].split(", ") if named else []


def _raise_in_a_wait(raising: Callable[..., None], *args: Any) -> None:
    global _waited_for
    try:
        raising(*args)
    except RuntimeError as error:
        dead = _named_dead(error)
        if _waited_for.intersection(dead) or not dead:
            _waited_for = frozenset()  # the wait is over, and what follows is not to be disturbed
            raise
        _raise_in_a_wait(raising, *args)  # a process of another loader. torch has forgotten it, and may know of more.


def _start_worker(files_read: list[Array], init: Callable[[int], None] | None, worker: int) -> None:
    global _file_read
    _file_read = files_read[worker]
    reading("")
    end_with_parent()
    leave_signals_to_the_trainer()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error
    if init is not None:
        init(worker)


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, item: Any) -> None:
    """Send an error in the place of the batch that could not be sent, which would be waited for without end."""
    if isinstance(item, tuple):
        index = item[0]
        queue.put((index, ExceptionWrapper((type(error), error, error.__traceback__), "while a batch was sent")))
