"""mmengine's Runner for train.py: it leaves out steps that are not finite, saves in time, and resumes exactly."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import BaseLoop, ValLoop
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.data import DataLoader

from litvit.downloads import is_link
from litvit.errors import InputError, is_from_user_code, one_line
from litvit.models.backbone import published_weights
from litvit.openmmlab.checkpoint_hook import NotSaved, save_before_deleting
from litvit.openmmlab.checkpoints import (
    latest_checkpoint,
    local_rank,
    read_meta,
)
from litvit.openmmlab.loops import ExactEpochs, ExactIterations, ExactValidation, make_exact
from litvit.openmmlab.page_hook import PageHook, write_page
from litvit.openmmlab.runner import CheckedRunner, complete_own_data
from litvit.openmmlab.saver import Stopped
from litvit.openmmlab.step_guard import GuardedSteps, guard_steps
from litvit.processes import LAUNCHER, is_primary
from litvit.runs.folder import CHECKPOINT, DIVERGED, PREVIOUS, interval, replace_file
from litvit.training.step_guard import Diverged

CHECKPOINT_EVERY = "10m"


class ResumableRunner(CheckedRunner):
    """Runner whose checkpoints are whole, and hold what the rest of the run depends on.

    Attributes:
        validated_at: Iteration after which the last validation was done.
        resumes_named: Whether the command or the config names the checkpoint to resume.
    """

    validated_at: int | None = None
    resumes_named = False
    _guarded: Sequence[GuardedSteps] = ()
    _resumed: dict | None = None  # what the checkpoint says of the run
    _latest: tuple[Path, dict, Callable[[], None]] | None = None  # path, state, and a function that saves it again
    _failed: tuple[int, Callable[[], None]] | None = None  # iteration, and the same

    def load_or_resume(self) -> None:
        chosen = [self._load_from, self._resume]
        broadcast_object_list(chosen)  # another process may see another file as the latest
        self._load_from, self._resume = chosen
        super().load_or_resume()

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        self._resumed = checkpoint.get("meta", {}).get("litvit")
        return checkpoint

    def resume(self, filename: str, *args, **kwargs) -> None:
        super().resume(filename, *args, **kwargs)
        loop, state = self._train_loop, self._resumed or {"validated": True}
        self.validated_at = self.iter if state["validated"] else None
        if isinstance(loop, ExactEpochs | ExactIterations):
            loop.stop_training = state.get("stopped", False)
            loop.place(state.get("position"))
        for wrapper, counts in zip(self._guarded, state.get("bad_steps", ()), strict=False):
            wrapper.bad_in_a_row, wrapper.bad_steps = counts
        for hook, kept in zip(self._stopping_hooks(), state.get("early_stopping", ()), strict=False):
            hook.wait_count, hook.best_score = kept
        path = Path(filename)
        if path.absolute().parent == Path(self.work_dir).absolute():
            again = partial(self.save_checkpoint, self.work_dir, path.name, meta=self._meta(), by_epoch=False)
            self._latest = path, self._state(self._meta()), again

    def _stopping_hooks(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self._hooks if isinstance(hook, EarlyStoppingHook)]

    def _meta(self) -> dict[str, int]:
        return {"epoch": self.epoch, "iter": self.iter}

    def _state(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return what the rest of the run depends on besides what mmengine saves."""
        loop = self._train_loop
        state = {
            "iter": meta["iter"],
            "validated": self.validated_at == meta["iter"],
            "bad_steps": [(wrapper.bad_in_a_row, wrapper.bad_steps) for wrapper in self._guarded],
            "early_stopping": [(hook.wait_count, float(hook.best_score)) for hook in self._stopping_hooks()],
        }
        if isinstance(loop, ExactEpochs | ExactIterations):
            state |= {"stopped": loop.stop_training, "position": loop.position(meta["epoch"], meta["iter"])}
        return state

    def save_checkpoint(
        self, out_dir: str, filename: str, *args, meta: dict | None = None, by_epoch: bool = True, **kwargs
    ) -> None:
        """Save a checkpoint as mmengine does, whole or not at all, with what the rest of the run depends on.

        Raises:
            NotSaved: The disk does not take it.
        """
        if not is_main_process():
            return
        meta = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)} | (meta or {})
        again = partial(self.save_checkpoint, out_dir, filename, *args, meta=dict(meta), by_epoch=by_epoch, **kwargs)
        state = meta["litvit"] = self._state(meta)
        super_save, path = super().save_checkpoint, Path(out_dir, filename)

        def save(folder: str, name: str) -> None:
            super_save(folder, name, *args, meta=meta, by_epoch=by_epoch, **kwargs)

        resumable = kwargs.get("save_optimizer", True) and filename != DIVERGED
        try:
            if "://" in out_dir:
                save(out_dir, filename)
                path = f"{out_dir}/{filename}"
            else:
                keep = path.with_name(PREVIOUS) if filename == CHECKPOINT else None
                replace_file(path, lambda file: save(str(file.parent), file.name), keep)
            if resumable:
                self._point_to(path)
        except (OSError, RuntimeError) as error:
            if is_from_user_code(error):
                raise
            if resumable and filename != CHECKPOINT:
                self._failed = meta["iter"], again
            raise NotSaved(f"cannot save {path} ({one_line(error)})") from error
        if resumable:
            self._latest = path, state, again
        self.call_hook("after_save_checkpoint", path=str(path))

    def point_to_latest(self) -> None:
        """Name the latest checkpoint that can be resumed in `last_checkpoint`, where mmengine names others too."""
        if self._latest is not None and is_main_process():
            with suppress(OSError):
                self._point_to(self._latest[0])

    def _point_to(self, path: str | Path) -> None:
        replace_file(Path(self.work_dir, "last_checkpoint"), lambda file: file.write_text(str(path)))

    def is_saved(self) -> bool:
        """Return whether the latest checkpoint in the run's folder holds the run as it is."""
        return self._latest is not None and self._latest[1] == self._state(self._meta())

    def save_end(self) -> bool:
        """Have the end of the training saved in the first process.

        The last checkpoint of the config's is saved again if it does not know of the last validation.

        Returns:
            Whether the end is saved.
        """
        try:
            if self._failed is not None and self._failed[0] == self.iter:
                self._failed[1]()
            elif self._latest is None or self._latest[1]["iter"] != self.iter:
                self.save_checkpoint(self.work_dir, CHECKPOINT, by_epoch=False, meta=self._meta())
            elif not self.is_saved():
                self._latest[2]()
        except NotSaved as error:
            self.logger.warning(str(error))
            return False
        return True

    def delete_checkpoints_in_time(self) -> None:
        """Delete the checkpoints that were saved in time, unless one of them is the only one of the end."""
        if is_main_process() and self._latest is not None and Path(self._latest[0]).name != CHECKPOINT:
            for name in (CHECKPOINT, PREVIOUS):
                with suppress(OSError):
                    os.remove(os.path.join(self.work_dir, name))


class TrainingRunner(ResumableRunner):
    """Runner of train.py: a checkpoint to start from may have other heads, and steps that are not finite are left out.

    From the second such step in a row on, nothing is validated or saved until a step is finite again: the weights may
    be spoilt. One alone is a bad batch.

    A training loop of mmengine becomes one of `litvit.openmmlab.loops`, which saves in time and resumes exactly.

    Attributes:
        resume_latest: Whether to resume from the run's latest checkpoint if there is one, else start from `load_from`.
    """

    dataloaders = ("train_dataloader", "val_dataloader")
    required_prefix = "backbone."
    resume_latest = False
    _folder_seen = False

    @classmethod
    def from_cfg(cls, cfg: Config) -> "CheckedRunner":
        complete_own_data(cfg)
        try:
            interval(str(cfg.get("checkpoint_every", CHECKPOINT_EVERY)))
        except ValueError as error:
            raise InputError(f"checkpoint_every: {error}") from error
        start = cfg.get("load_from")
        cfg.resume = bool(cfg.get("resume") or cls.resume_latest)
        if cfg.resume and (cls.resume_latest or not start):
            latest = latest_checkpoint(Path(cfg.work_dir))
            cfg.load_from, cfg.resume = latest or start, latest is not None
        else:
            cls.resumes_named = cfg.resume
        if cfg.resume:
            _take_seed(cfg)
        init_cfg = cfg.model.get("backbone", {}).get("init_cfg")
        weights = init_cfg.get("checkpoint", "") if isinstance(init_cfg, dict) else ""
        if weights and cfg.get("load_from"):
            cfg.model.backbone.init_cfg = None  # the weights of a whole detector are loaded instead
        elif weights and not is_link(weights) and not Path(weights).expanduser().is_file():
            cfg.model.backbone.init_cfg.checkpoint = _published(weights)
        return super().from_cfg(cfg)

    @property
    def base_seed(self) -> int:
        """Seed that all processes have in common."""
        return self.seed - self.rank if self._randomness_cfg.get("diff_rank_seed") else self.seed

    def build_dataloader(self, dataloader: Any, *args, **kwargs) -> DataLoader:
        # With a seed per process, mmengine would draw the seed of the order, anew when a run is resumed.
        return super().build_dataloader(dataloader, seed=self.base_seed, diff_rank_seed=False)

    def build_train_loop(self, loop: Any) -> BaseLoop:
        built = super().build_train_loop(loop)
        if make_exact(built):
            built.set_up(str(self.cfg.get("checkpoint_every", CHECKPOINT_EVERY)))
        elif not isinstance(built, ExactEpochs | ExactIterations):
            self.logger.warning(
                f"train_cfg.type is {type(built).__name__}: signals are not answered, nothing is saved in time, and a "
                "resumed run is as exact as that loop makes it"
            )
            if LAUNCHER in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launch script has it ignored
        return built

    def build_val_loop(self, loop: Any) -> BaseLoop:
        built = super().build_val_loop(loop)
        saver = getattr(self._train_loop, "saver", None)
        if type(built) is ValLoop and saver is not None:
            built.__class__ = ExactValidation
            built.set_up(saver)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        built = super().build_optim_wrapper(optim_wrapper)
        self._guarded = guard_steps(built)
        return built

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        self.register_hook(PageHook(), "LOWEST")  # after the logs that it reads

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        super().register_hook(hook, priority)
        for registered in self._hooks:
            save_before_deleting(registered)
        # What they save is to hold what all other hooks have done.
        self._hooks.sort(key=lambda hook: isinstance(hook, CheckpointHook))

    @property
    def bad_in_a_row(self) -> int:
        """Number of the last steps that were left out."""
        return max((wrapper.bad_in_a_row for wrapper in self._guarded), default=0)

    @property
    def may_be_spoilt(self) -> bool:
        """Whether several of the last steps were left out. A single one is that of a bad batch, and changes nothing."""
        return self.bad_in_a_row > 1

    @property
    def iterations_to_step(self) -> int:
        """Number of iterations up to the end of the next optimizer step, over which gradients are accumulated."""
        return max((w._accumulative_counts - w.inner_count % w._accumulative_counts for w in self._guarded), default=1)

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradients are accumulated, which a checkpoint would not hold."""
        return all(w.should_update() for w in self._guarded)

    @property
    def has_val_loop(self) -> bool:
        """Whether the config asks for validation."""
        return self._val_loop is not None

    @property
    def val_loop(self) -> BaseLoop | None:
        """The loop that validates, None while the weights may be spoilt."""
        return None if self.may_be_spoilt else super().val_loop

    def call_hook(self, fn_name: str, **kwargs) -> None:
        hooks = self._hooks
        if fn_name in ("after_train_iter", "after_val_iter") and is_main_process():
            self._make_folders_again()
        if self.may_be_spoilt and fn_name in ("after_train_iter", "after_train_epoch"):
            # The hook would count a checkpoint that is not to be saved.
            self._hooks = [hook for hook in hooks if not isinstance(hook, CheckpointHook)]
        try:
            super().call_hook(fn_name, **kwargs)
        finally:
            self._hooks = hooks
        if fn_name == "after_val_epoch" and not any(isinstance(hook, CheckpointHook) for hook in hooks):
            self.validated_at = self.iter

    def _make_folders_again(self) -> None:
        """Make the folders of logs again if the run's folder was deleted: mmengine's loggers would end the run."""
        folder = Path(self.log_dir, "vis_data")
        if self._folder_seen and not folder.is_dir():
            self.logger.warning(f"{self.work_dir} was deleted: it is made again, without its old files")
            with suppress(OSError):
                folder.mkdir(parents=True)
        self._folder_seen = folder.is_dir()

    def train(self) -> nn.Module:
        """Train the model.

        Raises:
            Diverged: The last steps were left out: many, or two or more at the end.
            Stopped: The run was interrupted and is saved, or its end could not be saved.
        """
        try:
            model = super().train()
            if self.may_be_spoilt:
                raise Diverged
        except Stopped:
            write_page(self)  # mmengine calls no hook
            raise
        except Diverged as error:
            write_page(self)
            where = os.path.join(self.work_dir, DIVERGED)
            try:
                self.save_checkpoint(self.work_dir, DIVERGED, by_epoch=False)
            except NotSaved as failure:
                where = f"not saved ({failure})"
            raise Diverged(
                f"the loss or a gradient was not finite in the last {self.bad_in_a_row} steps, up to iteration "
                f"{self._guarded[0].inner_count}: start again from the last good checkpoint or anew, in another "
                "--work-dir, with a lower optim_wrapper.optimizer.lr or optim_wrapper.clip_grad.max_norm; "
                f"the state is in {where}"
            ) from error
        return model


def _published(file: str) -> str:
    """Return the link of the published weights in the place of a config's file that is not there.

    Raises:
        InputError: The file is not one of a config of ours, or no link to its weights is known.
    """
    reason, architecture = "", Path(file).stem
    cfg = get_pretrained_cfg(architecture)
    if Path(file) == Path("pretrained", f"{architecture}.pth") and cfg is not None:
        try:
            link = published_weights(cfg)
            if is_primary():
                print(f"{file} is not there: the published weights are used, {link}", file=sys.stderr)
            return link
        except InputError as error:
            reason = f"{error}. Or "
    raise InputError(
        f"no ImageNet weights at {file}: {reason}put them there, name others, a file or a link, by --cfg-options "
        "model.backbone.init_cfg.checkpoint=FILE, or start from scratch by --cfg-options model.backbone.init_cfg=None"
    )


def _take_seed(cfg: Config) -> None:
    """Take the seed of the checkpoint to resume from. mmengine does so after it has made the order of the samples."""
    seed, randomness = read_meta(cfg.load_from).get("seed"), dict(cfg.get("randomness") or {})
    if seed is None:
        return
    if randomness.get("seed") not in (None, seed) and local_rank() == 0:
        print(f"the run keeps its seed {seed}, that of the config is {randomness['seed']}", file=sys.stderr)
    cfg.randomness = {**randomness, "seed": seed}
