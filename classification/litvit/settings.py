"""Settings as dataclasses: each field knows its flag, so that a setting is named, typed and explained once."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import Any, get_args, get_origin


def setting(default: Any, metavar: str | None, help: str, *flags: str, training: bool = False, **options) -> Any:
    """Make a field of a dataclass that is a flag on the command line.

    Args:
        default: Default value. A help text that does not end in brackets shows it.
        metavar: Placeholder of the value in the help, None for a switch or a choice.
        help: Help text.
        *flags: Names of the flag; none for the field's own name.
        training: Whether train.py alone has the flag.
        **options: Further arguments of argparse's `add_argument`.
    """
    if metavar is not None:
        options["metavar"] = metavar
    metadata = {"flags": flags, "training": training, "options": {"help": help, **options}}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def add_flags(
    parser: argparse._ActionsContainer,
    group: type,
    *,
    training: bool = True,
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> None:
    """Add the flags of a dataclass of settings to a parser.

    Args:
        parser: Parser, or a group of its arguments.
        group: Dataclass with fields made by `setting`.
        training: Whether flags that only train.py has are added.
        only: Names of the fields to add, all if empty.
        leave_out: Names of the fields not to add.
    """
    for part in fields(group):
        if not part.metadata or (part.metadata["training"] and not training):
            continue
        if (only and part.name not in only) or part.name in leave_out:
            continue
        flags = part.metadata["flags"] or (f"--{part.name.replace('_', '-')}",)
        default = part.default if part.default is not MISSING else part.default_factory()
        options = dict(part.metadata["options"])
        kind = _value_type(part.type)
        if kind is bool:
            options.setdefault("action", argparse.BooleanOptionalAction)
        elif kind is not str and "type" not in options:
            options["type"] = kind
        if isinstance(default, tuple | dict):
            default = list(default)
        text = options["help"]
        if default not in (None, []) and kind is not bool and text != argparse.SUPPRESS and not text.endswith(")"):
            shown = " ".join(f"{item:.3g}" for item in default) if isinstance(default, list) else default
            options["help"] = f"{text} ({shown})"
        parser.add_argument(*flags, dest=part.name, default=default, **options)


def _value_type(annotation: Any) -> type:
    """Return the type of one value: int for `int | None`, float for `Sequence[float]`."""
    choices = [choice for choice in get_args(annotation) if choice is not NoneType]
    if choices and get_origin(annotation) is not dict:
        return _value_type(choices[0])
    return annotation


def take(group: type, settings: dict[str, Any]) -> Any:
    """Make a dataclass of settings of those among the given ones that it has."""
    return group(**{part.name: settings[part.name] for part in fields(group) if part.name in settings})
