"""Loader processes that hang, die, or have no room: what a loop over their batches meets."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from litvit.data import workers
from litvit.data.workers import DeadLoaderError, NoBatch, WatchedLoader, reading
from litvit.errors import InputError
from litvit.processes import StopSignals


class Numbers(Dataset):
    """Twelve numbers, of which the seventh is what a function makes of it."""

    def __init__(self, seventh):
        self.seventh = seventh

    def __len__(self):
        return 12

    def __getitem__(self, index):
        reading(f"image {index}")
        value = self.seventh() if index == 6 else torch.tensor(index)
        reading("")
        return value


class Full:
    """A value that cannot be sent, as a tensor is where shared memory is full."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def loader(seventh, num_workers=2, **kwargs):
    return WatchedLoader(Numbers(seventh), batch_size=2, num_workers=num_workers, collate_fn=list, **kwargs)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_batches_of_every_epoch(persistent):
    batches = loader(lambda: torch.tensor(6), persistent_workers=persistent)
    for _ in range(2):
        assert [int(value) for batch in batches for value in batch] == list(range(12))


def test_a_wait_is_told_and_answers_a_signal(tmp_path, monkeypatch, caplog):
    """The loader process hangs in a file that nobody writes: it is named, and killed when the trainer leaves."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(workers, "WAIT_TOLD", 1.5)
    with StopSignals(), caplog.at_level(logging.WARNING, "litvit"):
        timer = threading.Timer(5, os.kill, (os.getpid(), signal.SIGHUP))
        timer.start()
        start = time.monotonic()
        with pytest.raises(NoBatch):
            for _ in loader(pipe.read_text):
                pass
        assert time.monotonic() - start < 15
        timer.join()
    assert "waiting for data for 2 s: for the loader processes, which read image 6" in caplog.messages


def test_a_slow_start_of_an_epoch():
    """Processes that stay take a second or two to begin the next epoch. An own timeout is kept."""
    batches = loader(lambda: time.sleep(2) or torch.tensor(6), persistent_workers=True)
    next(iter(batches))  # left with batches under way
    assert len(list(batches)) == 6
    with pytest.raises(RuntimeError, match="timed out"):
        list(loader(lambda: time.sleep(60), timeout=2))


class Stream(IterableDataset):
    """A number in the first loader process, which then ends, and an error in the second."""

    def __iter__(self):
        if torch.utils.data.get_worker_info().id:
            time.sleep(1)
            raise RuntimeError("of a data set")
        yield 1


def test_a_loader_process_that_has_ended_is_not_dead():
    with pytest.raises(RuntimeError, match="of a data set"):
        list(WatchedLoader(Stream(), num_workers=2))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_loader_process_is_found_by_the_wait_alone(num_workers):
    """It names what was read. torch's handler would raise wherever the program is."""
    list(DataLoader(Numbers(lambda: torch.tensor(6)), num_workers=1))  # has torch's handler set already
    batches = iter(loader(die, num_workers))

    def wait_late():
        next(batches)  # the process may be dead already
        time.sleep(3)  # it is by now
        list(batches)

    with pytest.raises(DeadLoaderError, match="a loader process was killed( by SIGKILL)? while it read image 6: "):
        wait_late()


def test_a_loader_process_that_is_killed_while_it_sends_a_batch():
    """The pipe holds a part of the batch, and another process could still write to it."""
    loaded = WatchedLoader(
        Numbers(lambda: bytes(2**22)), batch_size=1, num_workers=2, collate_fn=lambda batch: bytes(2**22)
    )
    others = torch.multiprocessing.active_children()  # of loaders that are not collected yet
    batches = iter(loaded)
    time.sleep(3)  # both are in the midst of a batch, or wait for their turn
    next(process for process in torch.multiprocessing.active_children() if process not in others).kill()
    with pytest.raises(DeadLoaderError, match="a loader process was killed"):
        list(batches)


def test_a_dead_process_of_another_loader():
    """It is the other loader's to tell, where its batches are waited for."""
    older = torch.multiprocessing.active_children()
    other = iter(loader(lambda: time.sleep(60), num_workers=1))
    next(other)
    (process,) = (child for child in torch.multiprocessing.active_children() if child not in older)
    timer = threading.Timer(1, process.kill)
    timer.start()
    assert len([*loader(lambda: time.sleep(3) or torch.tensor(6))]) == 6
    timer.join()
    with pytest.raises(DeadLoaderError, match="a loader process was killed"):
        list(other)


def test_a_batch_for_which_shared_memory_has_no_room():
    with pytest.raises(InputError, match=r"the shared memory /dev/shm, of \d+ MiB, is full: .*--shm-size"):
        list(loader(Full))


def test_another_error_of_sending_is_raised_as_it_is():
    with pytest.raises(AttributeError, match="Caught AttributeError while a batch was sent"):
        list(loader(lambda: lambda: None))  # a function that cannot be pickled


def test_a_loader_of_another_library_is_watched_too():
    told = []
    other = DataLoader(Numbers(die), batch_size=2, num_workers=1, worker_init_fn=told.append)
    with pytest.raises(DeadLoaderError, match="image 6"):
        list(WatchedLoader.of(other))
    (batch,) = WatchedLoader.of(DataLoader(Numbers(lambda: torch.tensor(6)), batch_size=12))
    assert batch.tolist() == [*range(12)]


def test_loader_processes_end_with_a_killed_trainer(tmp_path):
    """One that hangs in a read does not look for its trainer."""
    os.mkfifo(tmp_path / "pipe")
    code = f"""
from pathlib import Path
from test_workers import *
for _ in loader(Path({str(tmp_path / "pipe")!r}).read_text, num_workers=1):
    print(*[process.pid for process in torch.multiprocessing.active_children()], flush=True)
"""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    child = int(trainer.stdout.readline())
    time.sleep(1)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while (process := Path(f"/proc/{child}/stat")).exists() and process.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fail():
    raise RuntimeError("of a data set")


def test_an_error_of_a_loader_process_is_its_own_cause_of_nothing():
    with pytest.raises(RuntimeError, match="of a data set") as raised:
        list(loader(fail))
    assert raised.value.__cause__ is not raised.value
