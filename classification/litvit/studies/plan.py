"""What a study trains: a YAML file with one recipe, models, seeds, and the pairs of models to compare."""

import difflib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litvit.errors import InputError
from litvit.runs.folder import DIVERGED, LOG, RESUMABLE_CHANGES, SUMMARY, holds_run, replace_file
from litvit.training.config import Config
from litvit.training.recipe import parse_config, read_yaml

STUDIES = Path(__file__).parent
RECIPE = "recipe.yaml"
KEYS = ("recipe", "models", "seeds", "pairs")
FIXED = ("epochs", "cooldown_epochs", "imports")  # of the settings that a single run may change when it is continued


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

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Name of the run's folder in that of its model."""
        return f"seed-{self.seed}"

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.folder / self.name

    @property
    def summary(self) -> Path:
        """File with one row per epoch."""
        return self.path / SUMMARY

    @property
    def log(self) -> Path:
        """File of the run's log lines."""
        return self.path / LOG

    @property
    def diverged(self) -> bool:
        """Whether the run has diverged. It would diverge again."""
        return (self.path / DIVERGED).exists()


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
    pairs: tuple[tuple[str, str], ...]

    def runs(self, output: Path) -> Iterator[Run]:
        """Yield the runs, the first seed of all models first, so that a part of a study compares them all."""
        for seed in self.seeds:
            for model in self.models:
                yield Run(model, seed, output / model)

    def flags(self, run: Run, data_dir: str) -> list[str]:
        """Return the arguments of `litvit train` that start or continue a run."""
        place = ["--output", str(run.folder), "--experiment", run.name]
        return [data_dir, "--config", str(run.folder / RECIPE), "--seed", str(run.seed), *place, "--resume", "auto"]

    def configs(self, data_dir: str) -> dict[str, Config]:
        """Return the settings of the first run of each model.

        Raises:
            InputError: A setting is wrong.
        """
        configs = {}
        with tempfile.TemporaryDirectory() as folder:
            for model in self.models:
                run = Run(model, self.seeds[0], Path(folder) / model)
                run.folder.mkdir()
                (run.folder / RECIPE).write_text(self._recipe(model))
                try:
                    configs[model] = parse_config(self.flags(run, data_dir))
                except InputError as error:
                    raise InputError(f"{model}: {str(error).removeprefix(f'{run.folder / RECIPE}: ')}") from error
        for model, config in configs.items():
            if config.run.patience is not None:
                raise InputError(f"{model}: patience ends runs at different epochs; leave it out, and fit_to_data too")
        return configs

    def check_runs(self, output: Path) -> None:
        """Check that the runs in a folder were trained as this study says.

        Raises:
            InputError: A run has other settings, or the recipe beside it cannot be read.
        """
        for model, settings in self.models.items():
            folder = output / model
            if not any(holds_run(path) for path in folder.glob("seed-*")):
                continue
            theirs = read_yaml(folder / RECIPE)
            for name in sorted((theirs.keys() | settings.keys()) - (set(RESUMABLE_CHANGES) - set(FIXED))):
                before, now = theirs.get(name, "the default"), settings.get(name, "the default")
                if before != now:
                    raise InputError(
                        f"the runs in {folder} were trained with another {name}: it was {before}, is {now}; choose "
                        "another --output, or delete them"
                    )

    def write_recipes(self, output: Path) -> None:
        """Write the recipe of each model into the folder of its runs.

        Raises:
            OSError: The folder cannot be written to.
        """
        for model in self.models:
            folder, text = output / model, self._recipe(model)
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / RECIPE, lambda temporary, text=text: temporary.write_text(text))

    def _recipe(self, model: str) -> str:
        return yaml.safe_dump(self.models[model], sort_keys=False, default_flow_style=None)


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
    content = read_yaml(path, "study")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key '{key}'; a study has {', '.join(KEYS)}")
    for key in KEYS:
        if key not in content and key != "pairs":
            raise InputError(f"{path} has no {key}; a study has {', '.join(KEYS)}")
    recipe, models, seeds = content["recipe"], content["models"], content["seeds"]
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: recipe is a mapping of `flag: value` lines")
    if not isinstance(models, dict) or not models:
        raise InputError(f"{path}: models is a mapping of names, each with `flag: value` lines")
    for model, settings in models.items():
        if not isinstance(settings, dict):
            raise InputError(f"{path}: the model {model} has no `flag: value` lines, such as `model: lit_ti`")
        if not isinstance(model, str):
            raise InputError(f'{path}: put quotes around the name of a model that YAML takes for a value: "{model}"')
        if not re.fullmatch(r"[A-Za-z0-9][\w+-]*", model):
            raise InputError(f"{path}: '{model}' names a folder: use letters, digits, '+', '-' and '_'")
    if any("seed" in settings for settings in (recipe, *models.values())):
        raise InputError(f"{path}: seed is none of a recipe's lines here: the study's seeds has them")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: seeds is a list of whole numbers, such as [1, 2, 3]")
    settings = {model: recipe | own for model, own in models.items()}
    return Study(
        path.stem, settings, tuple(dict.fromkeys(seeds)), _read_pairs(path, content.get("pairs") or [], models)
    )


def _read_pairs(path: Path, pairs: Any, models: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    if not isinstance(pairs, list):
        raise InputError(f"{path}: pairs is a list of pairs of models, such as [[LIT, PVT]]")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise InputError(f"{path}: pairs has {pair}, which are not two models, such as [LIT, PVT]")
        for model in pair:
            if not isinstance(model, str) or model not in models:
                raise InputError(f"{path}: pairs names '{model}', which is not among the models")
    return tuple(dict.fromkeys(map(tuple, pairs)))
