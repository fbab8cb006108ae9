"""A recipe is a YAML file of flag values: how it is read, and how it and the command line become a `Config`.

A flag on the command line has precedence over the recipe, and the recipe over the flag's default. A recipe's keys are
the flags' names with underscores (`weight_decay: 0.05` is `--weight-decay 0.05`); that of `--import` is `imports`.
"""

import argparse
import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from timm.models import is_model, model_entrypoint

from litvit.cli import import_modules, model_name
from litvit.data.readers import DataConfig, open_train_and_val
from litvit.errors import InputError
from litvit.runs.folder import SETTINGS, holds_run, resumed_folder
from litvit.settings import take
from litvit.training.config import Config
from litvit.training.fitting import choose_settings, describe_choices
from litvit.training.flags import build_parser
from litvit.training.model import initial_weights

WEIGHTS_KNOW = ("model", "img_size", "in_chans", "exif_transpose", "crop_pct", "interpolation", "mean", "std")
RECIPES = Path(__file__).parents[1] / "recipes"
# Models that train as another one does: one under a second name, and the models of the paper's tables.
RECIPE_OF = {
    "lvt_cls": "lvt",
    "lit_ti_plain": "lit_ti",
    **dict.fromkeys(("lit_s_plain", "swin_tiny_dtm"), "lit_s"),
    **dict.fromkeys((f"litv2_s_alpha{tenths}" for tenths in ("00", "02", "04", "05", "07", "10")), "litv2_s"),
    **dict.fromkeys(("pvt_tiny", "pvt_medium", "pvt_large", "pvt_small_dtm", "pvt_small_msa"), "pvt_small"),
    **dict.fromkeys((f"pvt_small_msa_no{stages}" for stages in ("1", "12", "123", "1234")), "pvt_small"),
}
ONLY_ON_THE_COMMAND_LINE = ("data_dir", "config", "cfg", "resume", "dry_run", "help", "traceback")


class _Loader(yaml.SafeLoader):
    """YAML without aliases and with one value per key.

    A few lines of aliases to lists of aliases are gigabytes when a message shows them. Of two values of a key YAML
    would take the last one.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in lines:
                problem = f"{key} has two values, in lines {lines[key]} and {line}: leave one of them"
                raise yaml.constructor.ConstructorError(problem=problem)
            if isinstance(key, Hashable):
                lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """Read a YAML file with a mapping.

    Args:
        path: YAML file.
        kind: What it is, for messages.

    Raises:
        InputError: a missing file, no YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        if path.parent == RECIPES:
            advice = "install litvit again, or name a recipe with --config"
            raise InputError(f"the recipe of {path.stem} is missing, {path}: {advice}") from None
        raise InputError(f"no {kind} at {path}") from error
    except OSError as error:
        raise InputError(f"cannot read the {kind} {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no {kind}: it holds no text, and a {kind} is a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        lines = "`flag: value`" if kind == "recipe" else "`name: value`"
        raise InputError(f"{path} holds no {lines} lines")
    return content


def load_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a recipe and check every key and value against the flags.

    Args:
        path: YAML file.
        parser: Parser of the flags, from `build_parser`.

    Returns:
        Values by flag name (`dest`), converted to the flags' types.

    Raises:
        InputError: a missing file, no YAML, an unknown key, or a value that the flag would not take.
    """
    recipe = read_yaml(path)
    actions = {action.dest: action for action in parser._actions if action.dest not in ONLY_ON_THE_COMMAND_LINE}
    settings = {}
    for key, value in recipe.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "; its keys are train.py's flags with underscores"
            raise InputError(f"{path}: unknown key '{key}'{hint}")
        settings[key] = _recipe_value(path, actions[key], value)
    return settings


def _recipe_value(path: Path, action: argparse.Action, value: Any) -> Any:
    """Check and convert one value of a recipe as argparse would have done for its flag."""
    if value is None:
        if action.default is not None:
            raise InputError(f"{path}: {action.dest} needs a value")
        return None
    if isinstance(action.default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{path}: {action.dest} is true or false, not '{value}'")
        return value
    if action.dest == "model_kwargs":
        if not isinstance(value, dict):
            raise InputError(f"{path}: model_kwargs is a mapping, not '{value}'")
        return list(value.items())
    if isinstance(value, bool):
        raise InputError(f"{path}: {action.dest} is no on/off setting, not '{value}'")
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    given = value if isinstance(value, list) else [value]
    if (isinstance(value, list) and not many) or (isinstance(action.nargs, int) and len(given) != action.nargs):
        raise InputError(f"{path}: {action.dest} takes {'a list of values' if many else 'one value'}, not '{value}'")
    convert = action.type or str
    try:
        # through str, since YAML 1.1 reads 1e-3 as a string and 0.5e1 as a float
        values = [convert(str(item)) for item in given]
    except ValueError as error:
        raise InputError(f"{path}: {action.dest}: '{value}' is not {convert.__name__}") from error
    if action.choices and not set(values) <= set(action.choices):
        raise InputError(f"{path}: {action.dest} is one of {', '.join(action.choices)}, not '{value}'")
    return values if many else values[0]


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the settings that the command line names itself."""
    unset = object()
    names = argparse.Namespace(**dict.fromkeys((action.dest for action in parser._actions), unset))
    return {name: value for name, value in vars(parser.parse_args(argv, names)).items() if value is not unset}


def _known_of_weights(flags: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """Return the settings that the weights to start from know of their model and its images.

    Empty without such weights, for another model than theirs, and for a run that is continued from its own.
    """
    if not flags.initial_checkpoint or flags.pretrained or flags.resume not in (None, "auto"):
        return {}
    try:
        description = initial_weights(flags.initial_checkpoint)[1]
    except InputError:
        if flags.resume is None:
            raise
        return {}  # a run that has begun needs them no more
    if "model" not in description or model not in (None, description["model"]):
        return {}
    known = {name: description[name] for name in WEIGHTS_KNOW if name in description}
    kwargs = {name: value for name, value in description.get("model_kwargs", {}).items() if name != "img_size"}
    return known | {"model_kwargs": list(kwargs.items())}


def _fit(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, settings: argparse.Namespace, given: dict[str, Any]
) -> argparse.Namespace:
    """Return the settings with those that neither recipe nor command line give chosen by the number of images."""
    train, _, _ = open_train_and_val(take(DataConfig, vars(settings)))
    if not len(train):
        raise InputError("--fit-to-data needs the number of training images: --train-num-samples N")
    has_weights = bool(settings.pretrained or settings.initial_checkpoint)
    choices = choose_settings(len(train), has_weights, given, settings.dry_run)
    parser.set_defaults(**{name: value for choice in choices for name, value in choice.settings.items()} | given)
    settings = parser.parse_args(argv)
    settings.chosen = describe_choices(choices, given, len(train), has_weights)
    return settings


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_of(model: str) -> Path | None:
    """Return the path of a model's own recipe. Every model of this package has one; most of others have none."""
    name, _, _ = model.partition(".")  # from a tag of weights
    name = RECIPE_OF.get(name, name)
    is_ours = is_model(name) and model_entrypoint(name).__module__.startswith("litvit.models.")
    return RECIPES / f"{name}.yaml" if is_ours or name in recipe_names() else None


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: A file, a run's folder, or the name of one of the package's recipes, such as demo.

    Raises:
        InputError: there is no such recipe.
    """
    path, own = Path(name), name.removesuffix(".yaml")
    if path.is_file():
        return path
    if holds_run(path):
        return path / SETTINGS
    if own in recipe_names():
        return RECIPES / f"{own}.yaml"
    near = difflib.get_close_matches(path.stem, recipe_names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"--config {name}: no such recipe{hint} (a .yaml file on this machine, a run's folder, or one of the "
        f"package's: {', '.join(recipe_names())})"
    )


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read the command line and the recipe: the one that it names, the resumed run's settings, or the model's own.

    Args:
        argv: Arguments, None for sys.argv's.

    Returns:
        All settings. `run.config` is the path of the recipe, None if the model has none.

    Raises:
        InputError: any flag, key or value that is wrong, or a model of this package without its recipe.
    """
    parser = build_parser()
    flags = parser.parse_args(argv)
    path = find_recipe(flags.config) if flags.config is not None else None
    if path is None and flags.resume and flags.resume != "auto":
        path = resumed_folder(flags.resume, flags.output) / SETTINGS
    recipe = load_recipe(path, parser) if path is not None else {}
    known = _known_of_weights(flags, flags.model or recipe.get("model"))
    recipe = known | recipe
    model = flags.model or known.get("model")
    if path is None and model and (path := _recipe_of(model)):
        recipe = load_recipe(path, parser) | known  # for the published images, and not those of the weights
    parser.set_defaults(**recipe)
    of_recipe = {action.dest: action.default for action in reversed(parser._actions)}
    given = _given(parser, argv)
    if "epochs" in given and "cooldown_epochs" not in given:
        parser.set_defaults(cooldown_epochs=0)  # the recipe's comes after the recipe's own epochs
    settings = parser.parse_args(argv)
    settings.config = str(path) if path else None
    if settings.model is None:
        raise InputError("which model? --model NAME, or a recipe with a line `model: NAME`")
    import_modules(settings.imports)
    model_name(settings.model)
    if settings.fit_to_data and settings.resume in (None, "auto"):
        settings = _fit(parser, argv, settings, recipe | given)
    changed = (name for name, value in of_recipe.items() if getattr(settings, name, value) != value)
    settings.changed = sorted(set(changed) - set(ONLY_ON_THE_COMMAND_LINE))
    settings.model_kwargs = dict(settings.model_kwargs)
    return Config.from_flat(vars(settings))
