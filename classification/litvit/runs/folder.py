"""The folder of a run, and its files that must never be half-written: checkpoint, best weights, settings."""

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
import yaml

from litvit.archives import verify_archive
from litvit.checkpoints import read_checkpoint
from litvit.downloads import fetch, is_link
from litvit.errors import InputError, printable
from litvit.settings import setting

logger = logging.getLogger("litvit")

CHECKPOINT = "last.pth"
PREVIOUS = "previous.pth"
DIVERGED = "diverged.pth"
BEST_WEIGHTS = "model_best.safetensors"
SETTINGS = "settings.yaml"
STARTS = "starts.yaml"
LOG = "train.log"
SUMMARY = "summary.csv"
PAGE = "report.html"
FIRST_BATCH = "first_batch.json"
BEST_VALIDATION = "best_validation.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


# What a file of weights says of its model: entries, a function that knows their values, and what these are.
DESCRIPTION: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("model", "interpolation"), _is_text, "a name"),
    (("model_kwargs",), lambda value: isinstance(value, dict), "a mapping"),
    (("num_classes", "in_chans"), _is_count, "a number from 1"),
    (("classes",), lambda value: value is None or _are(_is_text, value), "a list of names"),
    (("held_out",), partial(_are, _is_text), "a list of names"),
    (("exif_transpose",), lambda value: isinstance(value, bool), "true or false"),
    (("img_size",), lambda value: _is_count(value) or _are(_is_count, value), "a size in pixels"),
    (("mean", "std"), partial(_are, _is_number), "a list of numbers"),
    (("crop_pct", "top1", "epoch", "val_fraction"), _is_number, "a number"),
)
# Settings that say where a run is carried out, not what it computes.
LOCATION_SETTINGS = (
    *("data_dir", "config", "cfg", "resume", "dry_run", "device", "output", "experiment", "chosen", "changed"),
)
# Settings that a continued run may change: how it is carried out, and how long it is. Batch size and micro-batches may
# change together with the world size; the total batch may not.
RESUMABLE_CHANGES = (
    "epochs",
    "cooldown_epochs",
    "patience",
    "batch_size",
    "grad_accum_steps",
    "val_batch_size",
    "workers",
    "log_interval",
    "logger",
    "checkpoint_every",
    "max_unreadable",
    "grad_checkpointing",
    "imports",
    "token_label_data",
    "token_label_size",  # the model's own, however it is given
)


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out, and where its files are."""

    config: str | None = setting(None, "FILE", "recipe: a file, a run's folder, or a name such as demo (the model's)")
    cfg: str | None = setting(None, None, argparse.SUPPRESS)  # of old commands, not read
    output: str = setting("output", "DIR", "folder of all runs")
    experiment: str | None = setting(None, "NAME", "name of the run's folder in --output (date, time and model)")
    resume: str | None = setting(
        None, "RUN", "run to continue, with its settings: its folder; auto: --experiment's, if begun"
    )
    checkpoint_every: str = setting("10m", "T", "interval of checkpoints within an epoch: 10m, 90s, 500 steps")
    max_unreadable: float = setting(0.01, "X", "share of images that may fail to decode")
    fit_to_data: bool = setting(False, None, "choose what is left open by the number of images (recipe finetune)")
    chosen: Sequence[str] = ()  # what was chosen so, and why
    # Names of the settings that are not the recipe's, or not the defaults where it has none.
    changed: Sequence[str] = ()
    patience: int | None = setting(None, "N", "epochs without a better top-1 after which the run ends (never)")
    seed: int = setting(42, "N", "seed of weights, sample order, augmentation")
    device: str | None = setting(None, "NAME", "cuda, cuda:1, cpu, mps ... (cuda if available)")
    dry_run: int | None = setting(
        None, "N", "check input of N processes, a step on blank images; show the run, stop", nargs="?", const=1
    )
    log_interval: int = setting(50, "N", "steps between log lines; slow steps have some before")
    logger: Sequence[str] = setting(
        ("tensorboard",),
        "NAME",
        "where metrics go: tensorboard, wandb, mlflow, or nowhere (tensorboard)",
        nargs="*",
        choices=("tensorboard", "wandb", "mlflow"),
    )


def interval(text: str) -> tuple[str, float]:
    """Parse an interval: `10m`, `90s`, `2h` to ("seconds", 600.0), ...; `500` to ("steps", 500).

    Raises:
        ValueError: neither a time nor a number.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "")
    try:
        value = float(number) if unit else int(number)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"'{text}' is neither a time (10m, 90s, 2h) nor a number of steps (500)")
    return ("seconds", value * {"s": 1, "m": 60, "h": 3600}[unit]) if unit else ("steps", value)


def replace_file(path: Path, write: Callable[[Path], None], keep: Path | None = None) -> None:
    """Write a file next to `path`, flush it to the disk, and rename it.

    Args:
        path: File to create or replace. It holds the old content or the new, never a part.
        write: Function that writes a file to the path that it is given.
        keep: New name of the old content. At every instant the old content has one of the two names.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        mask = os.umask(0)  # some writers make files that only their owner may read
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _flush(temporary)
        if keep is not None and path.exists():
            link = path.with_name(f".{keep.name}.tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, keep)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str, printed: bool = True) -> None:
    """Write a text. A plain file is replaced whole. A link stays one, and its file is replaced.

    What is no plain file, such as a pipe, is written to. Standard output is not, if the text was printed: it has it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if printed and path.exists() and os.path.samestat(os.stat(path), os.fstat(1)):
            return
        # /dev/stderr may be a file, of which the text is a part.
        of_the_system = os.path.abspath(path).startswith(("/dev/", "/proc/"))
        if of_the_system or (path.exists() and not path.is_file()):
            with open(path, "a") as file:
                file.write(text)
        else:
            replace_file(Path(os.path.realpath(path)), lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Save a state of tensors, numbers, strings, lists and dicts, see `replace_file`.

    Raises:
        OSError, RuntimeError: the disk is full, read-only or gone; the files are as they were.
    """
    replace_file(path, partial(torch.save, state), keep)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a full checkpoint of a run, after checking its checksums.

    Raises:
        InputError: a file that is missing, truncated, changed, holds code, or is not such a checkpoint.
    """
    state = read_checkpoint(path, partial(torch.load, map_location="cpu", weights_only=True))
    if not isinstance(state, dict) or "optimizer" not in state:
        raise InputError(f"{path} is not a full checkpoint of a run: weights alone go to --initial-checkpoint")
    return state


def save_weights(path: Path, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Save weights as .safetensors, with what is needed to rebuild the model in the file's header.

    Args:
        path: File to write.
        weights: State dict.
        description: Description of the model for `read_description`, of what JSON can hold.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    header = {"format": "pt", "litvit": json.dumps(description)}
    replace_file(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=header))


def read_description(path: str | Path | None) -> dict[str, Any]:
    """Read what a run wrote about the model of its weights: model, num_classes, classes, img_size, mean, ...

    Args:
        path: Checkpoint of any kind, a file or a link. None for none.

    Returns:
        The description. It is empty for other files, and for files that cannot be read: loading them will say why.

    Raises:
        InputError: an entry that is not what its name says, or a link that cannot be fetched.
    """
    if path is None:
        return {}
    path = fetch(path)
    if not str(path).endswith(".safetensors"):
        try:
            verify_archive(path, checksums=False)
            description = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["description"]
        except Exception:  # not a checkpoint of a run
            return {}
    else:
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                description = json.loads((file.metadata() or {}).get("litvit", "{}"))
        except (OSError, safetensors.SafetensorError, json.JSONDecodeError, RecursionError):
            return {}
    if not isinstance(description, dict):
        return {}
    for names, fits, kind in DESCRIPTION:
        for name in names:
            if name in description and not fits(description[name]):
                shown = printable(textwrap.shorten(repr(description[name]), 60, placeholder=" ..."))
                raise InputError(f"{path}: its description is damaged: {name} is {shown}, not {kind}; save it again")
    return description


def weights_file(source: str) -> str:
    """Return the file of weights that a source names: in a run's folder the best ones, or else the last checkpoint.

    Args:
        source: Folder of a run, else a file or a link, which is returned as it is.

    Raises:
        InputError: a folder that holds no weights of a run.
    """
    folder = Path(source).expanduser()
    if is_link(source) or not folder.is_dir():
        return source
    for name in (BEST_WEIGHTS, CHECKPOINT):
        if (folder / name).is_file():
            return str(folder / name)
    raise InputError(f"{source} is a folder without the weights of a run ({BEST_WEIGHTS} or {CHECKPOINT})")


def resumed_folder(resume: str, output: str = "output") -> Path:
    """Return the folder of the run that `--resume` names by its folder or its checkpoint.

    Args:
        resume: A run's folder, or its checkpoint.
        output: Folder of all runs, where a run of this name may be.

    Raises:
        InputError: it names no run. The message says what does.
    """
    path = Path(resume)
    if holds_run(path):
        return path
    if path.name == CHECKPOINT and holds_run(path.parent):
        return path.parent
    if path.is_file() and holds_run(path.parent):
        advice = f"--resume {path.parent} continues this file's run; --initial-checkpoint starts a run from its weights"
    elif path.is_file() or "://" in resume:
        advice = "name the folder of a run; --initial-checkpoint starts a run from weights"
    elif not path.exists() and holds_run(Path(output) / resume):
        advice = f"did you mean {Path(output) / resume}?"
    elif not path.exists():
        advice = f"there is no such folder; runs are in {output}, and --resume auto starts or continues --experiment's"
    else:
        advice = f"name a run's folder, which holds {SETTINGS} and {CHECKPOINT}"
    raise InputError(f"--resume {resume}: no run there; {advice}")


class _WithoutAliases(yaml.SafeDumper):
    """A dumper that writes a list again where two settings have the same one: recipes have no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: its settings or a checkpoint."""
    return any((folder / name).is_file() for name in (SETTINGS, CHECKPOINT, PREVIOUS))


class RunFolder:
    """The folder of a run: the resumed one, or `output`/`experiment`, which must not hold a run yet.

    Nothing is written before `open`.

    Args:
        config: Folder to find or choose.
        model: Name of the model, which names a folder that has no other name.
        primary: Whether this process writes.

    Raises:
        InputError: the folder holds a run, or there is no run to resume.
    """

    def __init__(self, config: RunConfig, model: str, primary: bool):
        self.config, self.primary = config, primary
        self._may_rename = primary and not config.dry_run
        self._lock: IO | None = None
        self._settings: dict[str, Any] = {}
        self.path = self._choose_path(model)
        for name in (SETTINGS, STARTS, CHECKPOINT, PREVIOUS, DIVERGED, BEST_WEIGHTS, LOG, SUMMARY):
            if (self.path / name).is_dir():
                raise InputError(f"{self.path / name} is a folder, and the run writes a file there: move it away")

    def _choose_path(self, model: str) -> Path:
        config = self.config
        if config.resume and config.resume != "auto":
            return resumed_folder(config.resume, config.output)
        experiment = config.experiment
        if experiment is None:
            experiment = model if config.resume else f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
        path = Path(config.output) / experiment
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: choose another --output or --experiment")
        if self.primary and not config.resume and holds_run(path):
            raise InputError(f"{path} holds a run: continue it with --resume {path}, or choose another --experiment")
        return path

    def __str__(self) -> str:
        return str(self.path)

    def load_last(self) -> dict[str, Any] | None:
        """Load the run's last good checkpoint. A damaged one is renamed, so that it is not tried again.

        Returns:
            The state, None if the folder holds no checkpoint.

        Raises:
            InputError: there are checkpoints, and none is good.
        """
        damaged, reasons = [], []
        for path in (self.path / CHECKPOINT, self.path / PREVIOUS):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
            except InputError as error:
                damaged.append(path)
                reasons.append(str(error))
                continue
            for path, reason in zip(damaged, reasons, strict=True):
                logger.warning("%s; trying the checkpoint before it", reason)
                if self._may_rename:
                    with contextlib.suppress(OSError):
                        path.rename(path.with_name(f"{path.name}.damaged"))
            return state
        if reasons:
            raise InputError(f"{self} holds no good checkpoint: {'; '.join(reasons)}")
        return None

    def open(self, settings: dict[str, Any]) -> None:
        """Create the folder, keep other processes from training in it, and save the settings as a recipe.

        Raises:
            InputError: the folder cannot be written to, or another process trains there.
        """
        if not self.primary:
            return
        self._settings = settings
        try:
            self._make()
        except OSError as error:
            raise InputError(f"cannot write to the run's folder {self}: {error.strerror}") from error

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        text = yaml.dump(self._settings, Dumper=_WithoutAliases, sort_keys=False, default_flow_style=None)
        replace_file(self.path / SETTINGS, lambda temporary: temporary.write_text(text))

    def record_start(self, start: dict[str, Any]) -> bool:
        """Add a record to the list of the run's starts. Returns as `save_checkpoint` does."""
        path = self.path / STARTS

        def add(temporary: Path) -> None:
            before = path.read_bytes() if path.exists() else b""
            record = yaml.dump([start], Dumper=_WithoutAliases, sort_keys=False)
            temporary.write_bytes(before + record.encode())

        return self._write(replace_file, path, add)

    def close(self) -> None:
        """Let other processes train in the folder."""
        if self._lock is not None:
            self._lock.close()

    def save_checkpoint(self, state: dict[str, Any]) -> bool:
        """Save the full state of the run, and keep the checkpoint before it. One of the two is whole at every instant.

        Returns:
            Whether it is saved. A disk that does not take it is reported, and the run goes on.
        """
        return self._write(save_checkpoint, self.path / CHECKPOINT, state, self.path / PREVIOUS)

    def save_diverged(self, state: dict[str, Any]) -> bool:
        """Save the state of a run that has diverged, apart from its checkpoints. Returns as `save_checkpoint` does."""
        return self._write(save_checkpoint, self.path / DIVERGED, state)

    def save_best(self, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> bool:
        """Save the best weights and the model's description. Returns as `save_checkpoint` does."""
        return self._write(save_weights, self.path / BEST_WEIGHTS, weights, description)

    def has_best(self) -> bool:
        """Whether there are best weights, as far as the disk answers."""
        try:
            os.stat(self.path / BEST_WEIGHTS)
        except FileNotFoundError:
            return False
        except OSError:  # a mount that is away for a while
            pass
        return True

    def _write(self, write: Callable[..., None], *args: Any) -> bool:
        if not self.primary:
            return False
        try:
            # the folder may be there: TensorBoard makes it
            if self._lock is not None and not (self.path / SETTINGS).exists():
                self.close()
                self._make()
                logger.warning("%s was deleted: it is made again, without its old files", self)
            write(*args)
            return True
        except (OSError, RuntimeError, safetensors.SafetensorError, InputError) as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("cannot save in %s (%s): the run goes on, the next save tries again", self, reason)
            return False


def check_same_run(folder: RunFolder, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise InputError for settings under which the rest of a run would not be the rest of that run.

    Args:
        folder: Folder of the run.
        theirs: Settings of its checkpoint, by name.
        ours: Settings to continue with.
    """
    changed = [
        f"{name} was {theirs[name]}, is {ours[name]}"
        for name in sorted((theirs.keys() & ours.keys()) - set(RESUMABLE_CHANGES))
        if theirs[name] != ours[name]
    ]
    if changed:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): continue it with its own, or choose "
            "another --experiment"
        )


def lock_folder(folder: Path) -> IO:
    """Lock a folder until the file that is returned is closed or this process ends.

    Raises:
        InputError: another process has locked it.
    """
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - it has to stay open
    try:
        # lockf, not flock: loader processes, which outlive a killed trainer by seconds, do not inherit it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise InputError(f"another process trains in {folder}: wait for it, or choose another folder") from error
    except OSError:  # a file system without locks
        pass
    return lock
