"""A recipe is a YAML file of flag values: the flags of train.py, their defaults, and how the two meet.

Order of precedence: flag on the command line, then recipe, then the flag's default. A recipe's keys are the flags'
names with underscores (`weight_decay: 0.05` is `--weight-decay 0.05`).
"""

import argparse
import ast
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from litvit.cli import ArgumentParser, model_name
from litvit.errors import InputError
from litvit.training.state import SETTINGS, resumed_folder

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE_OF = {"lvt_cls": "lvt"}  # models of old commands
ONLY_ON_THE_COMMAND_LINE = ("data_dir", "config", "cfg", "resume", "dry_run", "help")


class HelpFormatter(argparse.HelpFormatter):
    """Wide help in which a default of interest is part of a flag's one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return ", ".join(name for name in action.option_strings if not name.startswith("--no-"))
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return ", ".join(action.option_strings) + " " + self._format_args(action, action.dest.upper())


def key_value(text: str) -> tuple[str, Any]:
    """Parse `key=value`; the value is a Python literal (numbers, lists, True) or else a string. Tuples become lists."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    try:
        literal = ast.literal_eval(value)
        return key, list(literal) if isinstance(literal, tuple) else literal  # as a YAML file would give it back
    except (ValueError, SyntaxError):
        return key, value


def interval(text: str) -> tuple[str, float]:
    """Parse how often: `10m`, `90s`, `2h` to ("seconds", 600.0); `500` to ("updates", 500).

    Raises:
        ValueError: neither.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "")
    try:
        value = float(number) if unit else int(number)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"'{text}' is neither a time (10m, 90s, 2h) nor a number of updates (500)")
    return ("seconds", value * {"s": 1, "m": 60, "h": 3600}[unit]) if unit else ("updates", value)


def build_parser() -> argparse.ArgumentParser:
    """The flags of train.py, named as timm names them."""
    parser = ArgumentParser(
        prog="train.py",
        usage="%(prog)s DATA_DIR --model NAME [flags]     (several processes: distributed_train.sh NUM DATA_DIR ...)",
        description="Train an image classifier. recipes/<model>.yaml sets the flags, the command line overrides it; "
        "--no-FLAG: off.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("recipe and run").add_argument
    add(
        "data_dir",
        metavar="DATA_DIR",
        help="folder with train/ and val/: a folder a class each, or train.tar and val.tar",
    )
    add("-h", "--help", action="help", help="show this and stop")
    add("--config", metavar="FILE", help="another recipe than recipes/<model>.yaml")
    add("--cfg", help=argparse.SUPPRESS)  # of old commands, not read
    add("--output", default="output", metavar="DIR", help="runs are kept here (output)")
    add("--experiment", metavar="NAME", help="the run's folder in --output (date, time and model)")
    add("--resume", metavar="RUN", help="continue a run, with its settings: its folder; auto: --experiment's, if begun")
    add("--checkpoint-every", default="10m", metavar="T", help="beside every epoch: 10m, 90s, or 500 updates (10m)")
    add(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="X",
        help="images of an epoch that may fail to decode (0.01)",
    )
    add("--seed", type=int, default=42, metavar="N", help="of weights, sample order, augmentation (42)")
    add("--device", metavar="NAME", help="cuda, cuda:1, cpu, mps ... (cuda where there is one)")
    add(
        "--dry-run",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="find wrong input of N processes, show the run, stop",
    )
    add("--log-interval", type=int, default=50, metavar="N", help="updates between log lines (50)")

    add = add_data_flags(parser)
    add("--train-split", default="train", metavar="NAME", help="subfolder, .tar or split to train on (train)")
    add("--train-num-samples", type=int, metavar="N", help="length of a streamed training set")
    add("--val-batch-size", type=int, metavar="N", help="--batch-size of validation")

    add = add_model_flags(parser)
    add("--drop", type=float, default=0.0, metavar="P", help="dropout before the classifier (0)")
    add("--drop-path", type=float, default=0.0, metavar="P", help="stochastic depth of the last block (0)")
    add(
        "--initial-checkpoint", metavar="FILE", help="weights to start from; a classifier of other classes is made anew"
    )
    add("--grad-checkpointing", action=on_off, default=False, help="recompute blocks in the backward pass: less memory")
    add("--sync-bn", action=on_off, default=False, help="BatchNorm statistics over all GPUs")

    add = parser.add_argument_group("optimizer and schedule").add_argument
    add("--epochs", type=int, default=300, metavar="N", help="of the schedule, warm-up included (300)")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="linear warm-up from --warmup-lr (5)")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="further epochs at --min-lr (0)")
    add("--opt", default="adamw", metavar="NAME", help="timm optimizer (adamw)")
    add("--opt-eps", type=float, metavar="X", help="its epsilon")
    add("--opt-betas", type=float, nargs="+", metavar="X", help="its betas")
    add("--momentum", type=float, default=0.9, metavar="X", help="its momentum, if it has one (0.9)")
    add(
        "--weight-decay",
        type=float,
        default=0.05,
        metavar="X",
        help="none on 1-D parameters and what the model exempts (0.05)",
    )
    add("--layer-decay", type=float, metavar="X", help="learning rate factor a layer, from the last (fine-tuning)")
    add(
        "--offset-lr-scale",
        type=float,
        default=0.01,
        metavar="X",
        help="learning rate factor of merging offsets (0.01)",
    )
    add("--clip-grad", type=float, metavar="NORM", help="clip gradients to this norm")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="forward passes an update (1)")
    add(
        "--lr",
        type=float,
        metavar="X",
        help="learning rate outright; default: --lr-base x total batch / --lr-base-size",
    )
    add("--lr-base", type=float, default=5e-4, metavar="X", help="learning rate at --lr-base-size (5e-4)")
    add(
        "--lr-base-size",
        type=int,
        default=512,
        metavar="N",
        help="total batch that --lr-base, --*-lr-base belong to (512)",
    )
    add("--min-lr", type=float, default=1e-5, metavar="X", help="final learning rate (1e-5)")
    add("--min-lr-base", type=float, metavar="X", help="or scaled with the total batch")
    add("--warmup-lr", type=float, default=1e-6, metavar="X", help="first learning rate (1e-6)")
    add("--warmup-lr-base", type=float, metavar="X", help="or scaled with the total batch")
    add("--sched", default="cosine", metavar="NAME", help="timm scheduler (cosine)")
    add("--sched-on-updates", action=on_off, default=False, help="step it every update, not every epoch")

    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--aug-repeats",
        type=int,
        default=0,
        metavar="N",
        help="repeated augmentation: an image N times in a row of batches (0)",
    )
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], metavar="X", help="random crop area (0.08 1)")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="random crop aspect (0.75 1.33)")
    add("--hflip", type=float, default=0.5, metavar="P", help="horizontal flip (0.5)")
    add("--aa", metavar="POLICY", help="RandAugment, e.g. rand-m9-mstd0.5-inc1")
    add("--color-jitter", type=float, default=0.4, metavar="X", help="where there is no --aa (0.4)")
    add("--train-interpolation", default="bicubic", metavar="NAME", help="bilinear, bicubic, random (bicubic)")
    add("--reprob", type=float, default=0.0, metavar="P", help="random erasing (0)")
    add(
        "--remode",
        default="pixel",
        choices=["const", "rand", "pixel"],
        help="filled by const, rand, pixel noise (pixel)",
    )
    add("--recount", type=int, default=1, metavar="N", help="erased boxes (1)")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup (0)")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="cutmix (0)")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="of either (1)")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="of cutmix where both are on (0.5)")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixing from this epoch on (0: never off)")
    add("--smoothing", type=float, default=0.1, metavar="X", help="label smoothing, not of token labels (0.1)")

    add = parser.add_argument_group("token labels").add_argument
    add("--token-label", action=on_off, default=False, help="train with soft labels of tokens (lvt)")
    add("--token-label-data", metavar="DIR", help="label files, <class>/<image name>.pt (make_token_labels.py)")
    add("--token-label-size", type=int, metavar="N", help="tokens a side: --img-size / 32, and nothing else")
    add("--mix-token", action=on_off, default=True, help="paste a box of tokens from another image of the batch (on)")
    add("--dense-weight", type=float, default=0.5, metavar="X", help="of the tokens' loss (0.5)")
    add("--cls-weight", type=float, default=1.0, metavar="X", help="of the class loss (1)")

    add = add_precision_flags(parser)
    add("--model-ema", action=on_off, default=False, help="average the weights; validation uses the average")
    add("--model-ema-decay", type=float, default=0.9998, metavar="X", help="its decay (0.9998)")
    add("--model-ema-warmup", action=on_off, default=False, help="its decay rises at the start")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable:
    """Flags of any command that reads images; returns the group's `add_argument`."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="",
        metavar="READER",
        help="timm reader, hfds/NAME, hfids/NAME, wds/ ... (folder or .tar)",
    )
    add("--val-split", "--split", default="val", metavar="NAME", help="what to validate on (val, validation or test)")
    add("--val-num-samples", type=int, metavar="N", help="length of a streamed validation set")
    add("--class-map", metavar="FILE", help="class names in the order of their numbers, a line each")
    add("--num-classes", type=int, metavar="N", help="counted from the data where it can be")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images a process and forward pass (128)")
    add("-j", "--workers", type=int, metavar="N", help="loader processes a process (8, or the cores it has if fewer)")
    return add


def add_model_flags(parser: argparse.ArgumentParser) -> Callable:
    """Flags that say how a model is built and what its images look like; returns the group's `add_argument`."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="lit_ti, lit_s, lit_m, lit_b, lvt, or any of timm's")
    add("--img-size", type=int, metavar="N", help="pixels a side (the model's own; ours: 224)")
    add("--in-chans", type=int, default=3, metavar="N", help="image channels (3)")
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="further arguments of the model")
    add("--crop-pct", type=float, metavar="X", help="validation: crop / resize (the model's own)")
    add("--interpolation", metavar="NAME", help="validation (the model's own)")
    add("--mean", type=float, nargs="+", metavar="X", help="normalisation (the model's own)")
    add("--std", type=float, nargs="+", metavar="X", help="normalisation (the model's own)")
    return add


def add_precision_flags(parser: argparse.ArgumentParser) -> Callable:
    """Flags of mixed precision and compilation; returns the group's `add_argument`."""
    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--amp",
        "--apex-amp",
        "--native-amp",
        action="store_true",
        default=False,
        help="mixed precision (old names work)",
    )
    add("--no-amp", dest="amp", action="store_false", help="none, whatever the recipe says")
    add("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="float16 (GPU only), bfloat16")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model (inductor)")
    return add


def load_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a recipe and check every key and value against the flags.

    Args:
        path: the YAML file.
        parser: the flags (`build_parser`).

    Returns:
        Values by flag name (`dest`), converted to the flags' types.

    Raises:
        InputError: not there, not YAML, an unknown key, or a value that the flag would not take.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no recipe at {path}; the project's own: {', '.join(recipe_names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} holds no `flag: value` lines")
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
    if isinstance(value, list) != many or (isinstance(action.nargs, int) and len(value) != action.nargs):
        raise InputError(f"{path}: {action.dest} takes {'a list of values' if many else 'one value'}, not '{value}'")
    convert = action.type or str
    try:
        # through str, since YAML 1.1 reads 1e-3 as a string and 0.5e1 as a float
        values = [convert(str(item)) for item in (value if many else [value])]
    except ValueError:
        raise InputError(f"{path}: {action.dest}: '{value}' is not {convert.__name__}") from None
    if action.choices and values[0] not in action.choices:
        raise InputError(f"{path}: {action.dest} is one of {', '.join(action.choices)}, not '{value}'")
    return values if many else values[0]


def recipe_names() -> list[str]:
    """The recipes that come with the project, by name."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and the recipe: the one it names, the resumed run's settings, or the model's own.

    Args:
        argv: arguments, None for sys.argv's.

    Returns:
        All settings by flag name; `config` is the recipe's path, or None where the model has no recipe.

    Raises:
        InputError: any flag, key or value that is wrong.
    """
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.model is not None:
        model_name(flags.model)
    path = Path(flags.config) if flags.config else None
    if path is None and flags.resume and flags.resume != "auto":
        path = resumed_folder(flags.resume) / SETTINGS
    recipe = RECIPE_OF.get(flags.model, flags.model)
    if path is None and recipe in recipe_names():
        path = RECIPES / f"{recipe}.yaml"
    if path is not None:
        parser.set_defaults(**load_recipe(path, parser))
    settings = parser.parse_args(argv)
    settings.config = str(path) if path else None
    if settings.model is None:
        raise InputError("which model? --model NAME, or a recipe with a line `model: NAME`")
    model_name(settings.model)
    settings.model_kwargs = dict(settings.model_kwargs)
    check_settings(settings)
    return settings


POSITIVE = (
    *("batch_size", "val_batch_size", "grad_accum_steps", "epochs", "num_classes", "img_size", "in_chans"),
    *("log_interval", "lr_base_size", "recount", "token_label_size"),
)
NOT_NEGATIVE = (
    *("seed", "workers", "warmup_epochs", "cooldown_epochs", "aug_repeats", "weight_decay", "mixup", "cutmix"),
    *("clip_grad", "layer_decay", "offset_lr_scale", "lr", "lr_base", "min_lr", "warmup_lr"),
    *("dense_weight", "cls_weight"),
)
FRACTIONS = (
    *("drop", "drop_path", "hflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing"),
    *("max_unreadable", "model_ema_decay"),
)


def check_range(settings: argparse.Namespace, names: Sequence[str], low: float, high: float | None) -> None:
    """Refuse settings (those that there are, and are not None) outside of [low, high].

    Raises:
        InputError: names the flag.
    """
    for name in names:
        value = getattr(settings, name, None)
        if value is not None and not low <= value <= (high if high is not None else float("inf")):
            limits = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise InputError(f"--{name.replace('_', '-')} must be {limits}, not {value}")


def check_settings(settings: argparse.Namespace) -> None:
    """Refuse values that no run can have, before anything is made.

    Raises:
        InputError: names the flag.
    """
    check_range(settings, POSITIVE, 1, None)
    check_range(settings, NOT_NEGATIVE, 0, None)
    check_range(settings, FRACTIONS, 0, 1)
    for name in ("scale", "ratio"):
        low, high = getattr(settings, name)
        if not 0 < low <= high:
            raise InputError(f"--{name} is a low and a high value above 0, not {low} {high}")
    try:
        interval(settings.checkpoint_every)
    except ValueError as error:
        raise InputError(f"--checkpoint-every {error}") from None
    mixing = settings.mixup > 0 or settings.cutmix > 0
    if mixing and settings.batch_size % 2:
        raise InputError(
            f"mixup and cutmix pair the images of a batch: --batch-size must be even, not {settings.batch_size}"
        )
    if settings.token_label_data and not settings.token_label:
        raise InputError("--token-label-data is of no use without --token-label: leave it out, or add that")
    if settings.token_label:
        if settings.token_label_data is None:
            raise InputError(
                "--token-label needs --token-label-data DIR (make_token_labels.py makes it), or --no-token-label"
            )
        if settings.dataset:
            raise InputError(f"token labels are files beside a folder or .tar: not with --dataset {settings.dataset}")
