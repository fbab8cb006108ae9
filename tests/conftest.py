"""Fixtures that several test files share: a small real data set, a tiny LIT, and command lines run in this process."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import forked
import pytest
import torch
from forked import Outcome, end_loader_processes

from litvit import cli
from litvit.demo_data import Settings, build

CLASSIFICATION = Path(__file__).parents[1] / "classification"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; older torch reads it once

# Under nohup, or in the background of a script, these are ignored, and what is tested would go on after them.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# A LIT-Ti in everything but size: it trains an epoch of the `digits` in a second or two.
TINY = ["dims=(16,32,40,64)", "depths=(1,1,1,1)", "mlp_ratios=(2,2,2,2)"]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run GPU tests alone where there is no GPU: none would run, and none fail."""
    if config.option.markexpr == "gpu" and not torch.cuda.is_available() and not hasattr(config, "workerinput"):
        raise pytest.UsageError("-m gpu: torch sees no GPU here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests that need a GPU to machines that have one."""
    if not torch.cuda.is_available():
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is not marked `gpu` to the CPU, here and in processes that it starts."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def _end_loader_processes() -> Iterator[None]:
    """End the loader processes that a test leaves. Python waits 5 s for each of them where it collects their loader."""
    yield
    end_loader_processes()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data: 10 classes, 80 training and 40 validation images of 32 x 32 pixels. Not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    build(folder, Settings(train_per_class=8, val_per_class=4, image_size=32))
    return folder


@pytest.fixture
def digits_copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of `digits` to be spoilt."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a script's `main` with arguments, as its command line would, and return status and output."""

    def run(script: ModuleType, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.run(script.main)
        captured = capsys.readouterr()
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def run_script() -> Callable[..., Outcome]:
    """Run a script of `classification/` in a process of its own, with one thread, and return status and output."""
    return lambda script, *arguments, **environment: forked.run_script(
        CLASSIFICATION / script, *arguments, **environment
    )


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder on PATH with the commands of a stand-in for Slurm (`slurm.py`). What is left of its jobs is killed."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for command in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        (folder / command).symlink_to(Path(__file__).with_name("slurm.py"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield folder
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_STAND_IN={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """Flags of train.py for a tiny LIT-Ti on `digits` at 32 x 32, without the recipe's augmentation."""
    plain = "--img-size 32 -b 20 -j 0 --mixup 0 --cutmix 0 --aug-repeats 0 --reprob 0 --drop-path 0 --no-amp"
    schedule = "--epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --lr 2e-3 --log-interval 1"
    return ["--model", "lit_ti", *plain.split(), *schedule.split(), "--model-kwargs", *TINY]
