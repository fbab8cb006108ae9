"""What a study trains: a YAML file with one recipe, models, seeds, and the pairs of models to compare."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from litvit.errors import InputError
from litvit.runs.folder import SUMMARY, replace_file
from litvit.training.config import Config
from litvit.training.recipe import parse_config, read_yaml

STUDIES = Path(__file__).parent
RECIPE = "recipe.yaml"
KEYS = ("recipe", "models", "seeds", "pairs")


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        model: Name of the model in the study.
        seed: Seed of the run.
        folder: Folder of the model's runs.
    """

    model: str
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.folder / self.name

    @property
    def name(self) -> str:
        """Name of the run's folder in that of its model."""
        return f"seed-{self.seed}"

    @property
    def summary(self) -> Path:
        """File with one row per epoch."""
        return self.path / SUMMARY


@dataclass(frozen=True)
class Study:
    """Models that are trained alike.

    Attributes:
        name: Name of the study.
        models: Settings of each model by its name in the study: the recipe, and over it the model's own.
        seeds: Seeds of the runs of each model.
        pairs: Pairs of names, of a model and of what it is compared with.
    """

    name: str
    models: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...] = field(default=())

    def runs(self, output: Path) -> Iterator[Run]:
        """Yield the runs, the first seed of all models first, so that a part of a study compares them all."""
        for seed in self.seeds:
            for model in self.models:
                yield Run(model, seed, output / model)

    def flags(self, run: Run, data_dir: str) -> list[str]:
        """Return the arguments of `litvit train` that start or continue a run."""
        place = ["--output", str(run.folder), "--experiment", run.name]
        return [data_dir, "--config", str(run.folder / RECIPE), "--seed", str(run.seed), *place, "--resume", "auto"]

    def write_recipes(self, output: Path, data_dir: str) -> dict[str, Config]:
        """Write the recipe of each model into the folder of its runs, and check it.

        Returns:
            Settings of the first run of each model.

        Raises:
            InputError: A setting is wrong, or the folder cannot be written to.
        """
        configs = {}
        for model, settings in self.models.items():
            run = Run(model, self.seeds[0], output / model)
            text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                replace_file(run.folder / RECIPE, lambda temporary, text=text: temporary.write_text(text))
            except OSError as error:
                raise InputError(f"cannot write to {run.folder}: {error.strerror}") from error
            configs[model] = parse_config(self.flags(run, data_dir))
        return configs


def study_names() -> list[str]:
    """Return the names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read_study(name: str) -> Study:
    """Read a study.

    Args:
        name: YAML file, or the name of one of the package's studies.

    Raises:
        InputError: There is no such study, or it is none.
    """
    path = Path(name)
    if not path.is_file():
        path = STUDIES / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(Path(name).stem, study_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"--study {name}: no such study{hint} (a .yaml file, or {', '.join(study_names())})")
    content = read_yaml(path)
    for key in content.keys() ^ set(KEYS):
        if key not in KEYS:
            raise InputError(f"{path}: unknown key '{key}'; a study has {', '.join(KEYS)}")
        if key != "pairs":
            raise InputError(f"{path} has no {key}; a study has {', '.join(KEYS)}")
    recipe, models, seeds, pairs = (content.get(key, []) for key in KEYS)
    named = isinstance(models, dict) and models and all(isinstance(settings, dict) for settings in models.values())
    if not isinstance(recipe, dict) or not named:
        raise InputError(f"{path}: recipe has `flag: value` lines, and models has names with such lines under each")
    for model in models:
        if not isinstance(model, str) or not re.fullmatch(r"[\w+-][\w.+-]*", model):
            raise InputError(f"{path}: '{model}' is no name of a model's folder: use letters, digits, '+', '-' and '.'")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: seeds is a list of whole numbers, such as [1, 2, 3]")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{path}: pairs is a list of pairs of models, such as [[LIT, PVT]]")
    for pair in pairs:
        for model in pair:
            if model not in models:
                raise InputError(f"{path}: pairs names '{model}', which is not among the models")
    for key in {"seed"} & {key for settings in (recipe, *models.values()) for key in settings}:
        raise InputError(f"{path}: {key} is none of a recipe's lines here: the study's seeds has them")
    settings = {model: recipe | own for model, own in models.items()}
    return Study(path.stem, settings, tuple(dict.fromkeys(seeds)), tuple(map(tuple, pairs)))
