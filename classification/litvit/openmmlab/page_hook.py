"""A hook of mmengine that renews the page of a run."""

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from litvit.errors import one_line
from litvit.runs.folder import PAGE, replace_file
from litvit.runs.mmengine_page import mmengine_page


class PageHook(Hook):
    """Renews the page of a run after every validation and at the end."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        write_page(runner)

    def after_run(self, runner: Runner) -> None:
        write_page(runner)


@master_only
def write_page(runner: Runner) -> None:
    """Write report.html into the work dir, in the first process. A failure is a warning."""
    try:
        page = mmengine_page(Path(runner.work_dir))
        replace_file(Path(runner.work_dir, PAGE), lambda temporary: temporary.write_text(page, encoding="utf-8"))
    except Exception as error:  # of a full disk, a file that something else has changed
        runner.logger.warning(f"cannot write {PAGE}: {one_line(error)}; the run goes on")
