"""Train an image classifier: litvit train DATA_DIR --model lit_ti (--help lists the flags)."""

from collections.abc import Sequence

from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status, see docs/reliability.md."""
    return build_trainer(parse_config(argv)).run()
