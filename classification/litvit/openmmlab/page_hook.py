"""A hook of mmengine that renews the page of a run."""

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from litvit.errors import one_line
from litvit.runs.folder import PAGE, replace_file
from litvit.runs.mmengine_page import mmengine_page


class PageHook(Hook):
    """Writes report.html into the work dir after every validation and at the end. A failure is a warning."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner)

    def after_run(self, runner: Runner) -> None:
        self._write(runner)

    @master_only
    def _write(self, runner: Runner) -> None:
        try:
            page = mmengine_page(Path(runner.work_dir))
            replace_file(Path(runner.work_dir, PAGE), lambda temporary: temporary.write_text(page, encoding="utf-8"))
        except Exception as error:  # of a full disk, a file that something else has changed
            runner.logger.warning(f"cannot write {PAGE}: {one_line(error)}; the run goes on")
