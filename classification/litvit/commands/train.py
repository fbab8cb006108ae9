"""Train an image classifier: litvit train DATA_DIR --model lit_ti (--help lists the flags)."""

import logging
import os
from collections.abc import Sequence

from litvit.processes import is_primary
from litvit.runs.report import set_up_logging
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config

logger = logging.getLogger("litvit")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status, see docs/reliability.md."""
    config = parse_config(argv)
    set_up_logging(None, is_primary())
    if os.path.exists(config.data.data_dir):  # else there is nothing that may take minutes
        logger.info("reading %s", config.data.data_dir)
    return build_trainer(config).run()
