"""The flags of training, and those that other commands share. Their defaults are those of the config's classes."""

import argparse
from collections.abc import Sequence

from litvit.checkpoints import identify_file
from litvit.cli import ArgumentParser, import_modules, model_name
from litvit.data.augment import AugmentConfig
from litvit.data.readers import DataConfig
from litvit.errors import InputError
from litvit.runs.folder import RunConfig
from litvit.settings import add_flags
from litvit.training.model import HUB_SOURCES, ModelConfig, PrecisionConfig, find_weights
from litvit.training.optimizer import OptimConfig
from litvit.training.tasks import TokenLabelConfig

CHECKPOINT_HELP = "weights: a run's folder, a file, a link, or a name such as lit_s.in1k"
TRACEBACK_HELP = "show where in the code wrong input was found"


class HelpFormatter(argparse.HelpFormatter):
    """Wide help with one line per flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return ", ".join(name for name in action.option_strings if not name.startswith("--no-"))
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return ", ".join(action.option_strings) + " " + self._format_args(action, action.dest.upper())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of training, whose flags have timm's names."""
    parser = ArgumentParser(
        usage="%(prog)s DATA_DIR --model NAME [flags]    (several processes: distributed_train.sh or torchrun)",
        description="Train an image classifier. The model's recipe sets the flags, the command line overrides it; "
        "--no-FLAG: off.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("recipe and run")
    add = group.add_argument
    add(
        "data_dir",
        metavar="DATA_DIR",
        help="folder with train/ and val/, one folder per class, or their .tar files",
    )
    add("-h", "--help", action="help", help="show this and stop")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    add_flags(group, RunConfig)
    add_data_flags(parser)
    add_model_flags(parser)
    add_flags(parser.add_argument_group("optimizer and schedule"), OptimConfig)
    add_flags(parser.add_argument_group("augmentation"), AugmentConfig)
    add_flags(parser.add_argument_group("token labels"), TokenLabelConfig)
    add_precision_flags(parser)
    return parser


def add_data_flags(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Add the flags of a command that reads images."""
    add_flags(parser.add_argument_group("data"), DataConfig, training=training)


def add_model_flags(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Add the flags that say how a model is built and what its images are."""
    add_flags(parser.add_argument_group("model"), ModelConfig, training=training)


def add_precision_flags(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Add the flags of mixed precision and compilation."""
    group = parser.add_argument_group("precision and speed")
    add_flags(group, PrecisionConfig, training=training)
    group.add_argument("--no-amp", dest="amp", action="store_false", help="none, whatever the recipe says")


POSITIVE = (
    *("batch_size", "val_batch_size", "grad_accum_steps", "epochs", "num_classes", "img_size", "in_chans"),
    *("train_num_samples", "val_num_samples", "log_interval", "lr_base_size", "recount", "token_label_size", "dry_run"),
    "patience",
)
NOT_NEGATIVE = (
    *("seed", "workers", "warmup_epochs", "cooldown_epochs", "aug_repeats", "weight_decay", "mixup", "cutmix"),
    *("clip_grad", "offset_lr_scale", "lr", "lr_base", "min_lr", "min_lr_base", "warmup_lr", "warmup_lr_base"),
    *("dense_weight", "cls_weight", "color_jitter", "opt_eps", "mixup_off_epoch", "split_seed", "freeze"),
)
FRACTIONS = (
    *("drop", "drop_path", "hflip", "reprob", "mixup_prob", "mixup_switch_prob", "smoothing"),
    *("max_unreadable", "model_ema_decay", "layer_decay", "momentum", "val_fraction"),
)


def check_range(settings: argparse.Namespace, names: Sequence[str], low: float, high: float | None) -> None:
    """Raise InputError for settings outside of [low, high]. Those that are missing or None are not checked."""
    for name in names:
        setting = getattr(settings, name, None)
        for value in setting if isinstance(setting, list | tuple) else (setting,):
            if value is not None and not (low <= value <= (high if high is not None else value) < float("inf")):
                limits = f"between {low} and {high}" if high is not None else f"at least {low}"
                limits += ", and finite" if value == float("inf") else ""
                raise InputError(f"--{name.replace('_', '-')} must be {limits}, not {value}")


def parse_with_checkpoint(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, question: str = "which model?", ignored: str = ""
) -> argparse.Namespace:
    """Parse a command line. What it leaves open comes from the weights that its `--checkpoint` names.

    These are what `find_weights` takes. Without a description, those of the models of this package are recognised.

    Args:
        parser: Parser with the flags of the model and a flag whose destination is `checkpoint`.
        argv: Arguments, None for sys.argv's.
        question: Question to ask if neither names the model.
        ignored: Setting that is not taken from the checkpoint.

    Returns:
        Settings by flag name. `checkpoint` is a file or a link, or None where `pretrained` is True. `description` is
        the checkpoint's, empty if it has none.

    Raises:
        InputError: wrong flags, an unknown model, or not exactly one of `--checkpoint` and `--pretrained`.
    """
    flags = {action.dest: action.option_strings[-1:] for action in parser._actions}
    weights = parser.parse_args(argv)
    if weights.checkpoint and weights.pretrained:
        raise InputError(f"{flags['checkpoint'][0]} and --pretrained are both weights: give one of them")
    if not weights.checkpoint and not weights.pretrained:
        raise InputError(f"which weights? {flags['checkpoint'][0]} RUN, a file, a link or a name such as lit_s.in1k")
    file, description = find_weights(weights.checkpoint) if weights.checkpoint else (None, {})
    known = {name: value for name, value in description.items() if name in flags and name != ignored}
    kwargs = {name: value for name, value in description.get("model_kwargs", {}).items() if name != "img_size"}
    parser.set_defaults(**known | {"model_kwargs": list(kwargs.items())})
    settings = parser.parse_args(argv)
    if weights.checkpoint and file is None and settings.model != description["model"]:
        raise InputError(f"--model {settings.model} and the weights of {description['model']}: leave out --model")
    settings.checkpoint, settings.pretrained = file, file is None
    import_modules(settings.imports)
    settings.model = settings.model or (identify_file(file) if file else None)
    if settings.model is None:
        raise InputError(f"{question} --model NAME")
    if not settings.model.startswith(HUB_SOURCES):
        model_name(settings.model)
    settings.model_kwargs, settings.description = dict(settings.model_kwargs), description
    check_range(settings, POSITIVE, 1, None)
    check_range(settings, NOT_NEGATIVE, 0, None)
    return settings
