"""mmengine's CheckpointHook, so that a checkpoint is deleted only after the one that takes its place is saved."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

# What a CheckpointHook knows of the checkpoints that it has saved.
_ATTRIBUTES = ("keep_ckpt_ids", "last_ckpt", "best_ckpt_path", "best_ckpt_path_dict")


class NotSaved(RuntimeError):  # noqa: N818 - what has happened, as Interrupted
    """The disk has not taken a checkpoint. The files are as they were."""


def save_before_deleting(hook: Any) -> None:
    """Let a hook that is a CheckpointHook, of any class, delete checkpoints after saving, and survive a full disk."""
    kind = type(hook)
    if issubclass(kind, CheckpointHook) and not issubclass(kind, SavesFirst):
        hook.__class__ = type(kind.__name__, (SavesFirst, kind), {})


class SavesFirst(CheckpointHook):
    """First base of a CheckpointHook that deletes a checkpoint after the one that takes its place is saved.

    If that one cannot be saved, a warning says so, nothing is deleted, and the hook is as it was. So a best checkpoint
    is saved at the next validation that is better than the best on the disk.
    """

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        with self._saving(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_train_epoch(self, runner: Runner) -> None:
        with self._saving(runner):
            super().after_train_epoch(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        runner.validated_at = runner.iter  # all other hooks have had the metrics
        with self._saving(runner):
            super().after_val_epoch(runner, metrics)

    def after_save_checkpoint(self, runner: Runner, path: str) -> None:
        """Delete what has been replaced. `TrainingRunner.save_checkpoint` calls it when a checkpoint is saved."""
        if isinstance(getattr(self, "file_backend", None), _Removals):
            self.file_backend.carry_out(but=path)
            self._remember(runner)
            self._has_saved = True

    @contextmanager
    def _saving(self, runner: Runner) -> Iterator[None]:
        backend = self.file_backend
        self.file_backend = _Removals(backend)
        self._has_saved = False
        self._remember(runner)
        try:
            yield
            if self._has_saved:
                runner.point_to_latest()
        except (NotSaved, OSError) as error:
            vars(self).update(self._attributes)
            runner.message_hub.runtime_info.clear()
            runner.message_hub.runtime_info.update(self._runtime_info)
            runner.validated_at = None  # a validation whose best checkpoint is lost is done again by a resumed run
            runner.logger.warning(f"{error}: the run goes on, the next save tries again")
        finally:
            self.file_backend = backend

    def _remember(self, runner: Runner) -> None:
        self._attributes = {name: copy.copy(getattr(self, name)) for name in _ATTRIBUTES if hasattr(self, name)}
        self._runtime_info = dict(runner.message_hub.runtime_info)


class _Removals:
    """File backend of mmengine that only notes what it is to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.noted = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.noted.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.noted.append((self.backend.rmtree, path))

    def carry_out(self, but: str) -> None:
        """Remove what is noted. A checkpoint that has just been saved again under its name stays."""
        for remove, path in self.noted:
            if path != but:
                with suppress(OSError):
                    remove(path)
        self.noted.clear()
