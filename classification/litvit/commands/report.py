"""Make the page of a run, or compare runs: litvit report RUN [RUN ...] (--help lists the flags)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from litvit.cli import ArgumentParser
from litvit.errors import InputError
from litvit.runs.folder import PAGE, SETTINGS, holds_run, save_text
from litvit.runs.mmengine_logs import SCALARS, holds_logs
from litvit.runs.mmengine_page import mmengine_page, read_mmengine_run
from litvit.runs.page import Run, comparison_page, differences, labels, read_run, results_table, run_page
from litvit.training.flags import TRACEBACK_HELP, HelpFormatter
from litvit.training.report import format_table

COMPARISON = "comparison.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Make a page as the command line says. Returns 0."""
    parser = ArgumentParser(
        description="Make the page of a training run again, which the run itself renews after every epoch: curves, "
        "where the time goes, the first batch, what the best weights get wrong, settings. A detection or segmentation "
        "run renews it after every validation: losses, metrics, the classes if the metrics tell of them, settings. Of "
        "several runs, make one page that compares them: what differs in their settings, what came out, their curves.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="folder of a run of litvit train, or work dir of a detection or segmentation run",
    )
    default = f"{PAGE} in the run's folder, {COMPARISON} here for several runs"
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"page to write ({default})")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    runs = [_read(folder) for folder in args.runs]
    twice = [folder for place, folder in enumerate(args.runs) if any(map(folder.samefile, args.runs[:place]))]
    if twice:
        raise InputError(f"{twice[0]} is named twice: name every run once")
    for run in runs:
        for note in run.notes:
            print(f"{run.path}: {note}", file=sys.stderr)
    output = args.output or (runs[0].path / PAGE if len(runs) == 1 else Path(COMPARISON))
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file")
    if len(runs) == 1:
        page = mmengine_page(args.runs[0]) if holds_logs(args.runs[0]) else run_page(args.runs[0])
    else:
        page = comparison_page(runs)
        for title, rows in (("what came out", results_table(runs)), ("what differs", differences(runs))):
            names = [name or "-" for name in labels(runs)]
            columns = ("", *names)
            table = [dict(zip(columns, (name, *values), strict=True)) for name, values in rows]
            print(f"{title}:\n{format_table(table, columns) if table else 'nothing'}\n")
    save_text(output, page, printed=False)
    print(f"report: {output}")
    return 0


def _read(folder: Path) -> Run:
    """Read a run of classification, or of mmengine.

    Raises:
        InputError: The folder holds neither.
    """
    if holds_logs(folder):  # first: such a run may have a last.pth too
        return read_mmengine_run(folder)
    if holds_run(folder):
        return read_run(folder)
    raise InputError(
        f"{folder} holds no run of litvit train ({SETTINGS}), detection or segmentation (TIME/{SCALARS}): name the "
        "folder of one"
    )
