"""Logs that mmengine leaves in a work dir, read without mmengine: scalars.json, config.py and pictures of every start.

A line of scalars.json is a training log if it has an iteration, else a validation. A start that was resumed counts on,
so that its lines replace older ones of the same and of later iterations.
"""

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litvit.errors import printable

SCALARS, CONFIG, PICTURES = "vis_data/scalars.json", "vis_data/config.py", "vis_data/vis_image"
MAX_COUNT = 2**53  # of iterations; what is above is damage


@dataclass
class Validation:
    """Metrics of a validation.

    Attributes:
        iteration: Iteration of the training log before it.
        place: Epoch or iteration of the validation.
        by_epoch: Whether `place` is an epoch.
        metrics: Numbers by name.
    """

    iteration: int
    place: int
    by_epoch: bool
    metrics: dict[str, float]


@dataclass
class Logs:
    """What the logs of all starts come to.

    Attributes:
        training: Numbers of the training by name, `iter` among them, in the order of the iterations.
        validations: Validations in their order.
        starts: Names of the folders of the starts, which are times.
        settings: Settings of the last start by their dotted names, as texts.
        notes: Sentences on what cannot be read.
    """

    training: list[dict[str, float]] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, line: bytes) -> None:
        """Add a line of scalars.json.

        Raises:
            ValueError, TypeError, ArithmeticError, RecursionError: The line is damaged.
        """
        content = json.loads(line)
        if not isinstance(content, dict):
            raise TypeError("not an object")
        numbers = {
            name.removeprefix("train/").removeprefix("val/"): float(value)
            for name, value in content.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if "iter" in content:
            iteration, _ = _count(content["iter"]), _count(content.get("epoch", 0))
            self.training = _before(self.training, lambda row: row["iter"] < iteration)
            self.validations = _before(self.validations, lambda validation: validation.iteration < iteration)
            self.training.append(numbers | {"iter": iteration})
            return
        step = _count(content.get("step"))
        last = self.training[-1] if self.training else {}
        trained = int(last.get("iter", 0))
        by_epoch = 0 < step <= last.get("epoch", 0) + 1
        place = step if by_epoch or step > trained else trained
        iteration = trained if by_epoch else place
        self.validations = _before(self.validations, lambda old: old.by_epoch != by_epoch or old.place < place)
        metrics = {name: value for name, value in numbers.items() if name not in ("step", "time", "data_time")}
        self.validations.append(Validation(iteration, place, by_epoch, metrics))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_COUNT:
        raise ValueError("no count of steps")
    return value


def _before(items: list, is_before: Any) -> list:
    """Return the items up to the last that is before, in little time if all are."""
    end = len(items)
    while end and not is_before(items[end - 1]):
        end -= 1
    return items if end == len(items) else items[:end]


def holds_logs(folder: Path) -> bool:
    """Whether a folder is a work dir of mmengine."""
    return bool(_starts(folder))


def _starts(folder: Path) -> list[Path]:
    found = {file.parent.parent for name in (SCALARS, CONFIG) for file in folder.glob(f"*/{name}") if file.is_file()}
    return sorted(found)


def read_logs(folder: Path) -> Logs:
    """Read the logs of all starts in a work dir. What is damaged is left out and noted."""
    logs = Logs()
    for start in _starts(folder):
        name = printable(start.name)
        logs.starts.append(name)
        damaged = 0
        try:
            with (start / SCALARS).open("rb") as file:
                for line in file:
                    try:
                        if line.strip():
                            logs.add(line)
                    except (ValueError, TypeError, ArithmeticError, RecursionError):
                        damaged += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            logs.notes.append(f"{name}/{SCALARS} cannot be read, and is left out ({error.strerror}).")
        if damaged:
            lines = "1 line" if damaged == 1 else f"{damaged} lines"
            logs.notes.append(f"{lines} of {name}/{SCALARS} cannot be read, and {_is(damaged)} left out.")
    configs = [start / CONFIG for start in _starts(folder) if (start / CONFIG).is_file()]
    if configs:
        try:
            logs.settings = read_config(configs[-1])
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            name = printable(configs[-1].parent.parent.name)
            logs.notes.append(f"{name}/{CONFIG} cannot be read, and is left out ({type(error).__name__}).")
    return logs


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def read_config(path: Path) -> dict[str, str]:
    """Return the settings of a config that mmengine has dumped, by dotted names. None of its code is run.

    Raises:
        OSError, ValueError, SyntaxError, RecursionError, MemoryError: It cannot be read.
    """
    settings: dict[str, str] = {}

    def add(name: str, node: ast.expr) -> None:
        parts = {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            parts = {keyword.arg or "**": keyword.value for keyword in node.keywords}
        elif isinstance(node, ast.Dict):
            parts = {_key(key): value for key, value in zip(node.keys, node.values, strict=True)}
        elif isinstance(node, ast.List) and any(isinstance(each, ast.Call | ast.Dict) for each in node.elts):
            parts = {str(place): value for place, value in enumerate(node.elts)}
        for part, value in parts.items():
            add(f"{name}.{part}", value)
        if not parts:
            settings[name] = node.value if _is_text(node) else ast.unparse(node)

    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            add(statement.targets[0].id, statement.value)
    return settings


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _key(node: ast.expr | None) -> str:
    return "**" if node is None else node.value if _is_text(node) else ast.unparse(node)


def pictures(folder: Path, most: int) -> list[Path]:
    """Return the newest pictures of the last start that drew some, at most so many."""
    for start in reversed(_starts(folder)):
        files = [(file.stat().st_mtime, file) for file in (start / PICTURES).glob("*.png") if file.is_file()]
        if files:
            return [file for _, file in sorted(files)[-most:]]
    return []
