"""The four recipes reproduce the published runs; flags override recipes."""

import pytest

from litvit.errors import InputError
from litvit.training.recipe import RECIPES, build_parser, load_recipe, parse_settings

# The published runs, by the names of our flags (LIT-Ti trains as DeiT and PVT, the others as Swin).
SHARED = {
    "opt": "adamw",
    "opt_betas": [0.9, 0.999],
    "opt_eps": 1e-8,
    "weight_decay": 0.05,
    "offset_lr_scale": 0.01,
    "epochs": 300,
    "sched": "cosine",
    "img_size": 224,
    "batch_size": 128,
    "aa": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "interpolation": "bicubic",
    "crop_pct": 224 / 256,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "amp": True,
    "amp_dtype": "float16",
    "model_ema": False,
}
TI = {"drop_path": 0.1, "aug_repeats": 3, "clip_grad": None, "sched_on_updates": False}
TI |= {"warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "cooldown_epochs": 10}
SWIN = {"aug_repeats": 0, "clip_grad": 5.0, "sched_on_updates": True, "warmup_epochs": 20, "cooldown_epochs": 0}
SWIN |= {"warmup_lr_base": 5e-7, "min_lr_base": 5e-6}


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("lit_ti", TI),
        ("lit_s", SWIN | {"drop_path": 0.2}),
        ("lit_m", SWIN | {"drop_path": 0.3}),
        ("lit_b", SWIN | {"drop_path": 0.5}),
    ],
)
def test_recipe_is_the_published_run(model, own):
    settings = vars(parse_settings(["data", "--model", model]))
    expected = {"model": model, **SHARED, **own}
    assert {name: settings[name] for name in expected} == expected


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: lit_s\nweight_decay: 1e-2\nmodel_ema: true\nmodel_kwargs: {depths: [1, 1]}\n"
    )
    settings = parse_settings(["data", "--config", str(tmp_path / "mine.yaml"), "--no-model-ema", "--amp"])
    assert (settings.model, settings.weight_decay, settings.model_ema, settings.epochs) == ("lit_s", 0.01, False, 300)
    assert settings.amp is True
    assert settings.model_kwargs == {"depths": [1, 1]}
    assert settings.config == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("flag", ["--amp", "--apex-amp", "--native-amp"])
def test_old_names_of_mixed_precision(flag):
    assert parse_settings(["data", "--model", "resnet18", flag]).amp is True


def test_a_model_without_recipe_gets_the_defaults_of_the_flags():
    settings = parse_settings(["data", "--model", "resnet18"])
    assert settings.config is None
    assert (settings.epochs, settings.mixup) == (300, 0.0)


def test_no_amp_overrides_a_recipe():
    assert parse_settings(["data", "--model", "lit_ti", "--no-amp"]).amp is False


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    assert load_recipe(path, build_parser())["model"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("amp: 1", "amp is true or false, not '1'"),
        ("scale: 0.5", "scale takes a list of values"),
        ("scale: [0.5]", "scale takes a list of values"),
        ("lr: [1, 2]", "lr takes one value"),
        ("epochs: 1.5", "epochs: '1.5' is not int"),
        ("remode: noise", "remode is one of const, rand, pixel"),
        ("model_kwargs: 3", "model_kwargs is a mapping"),
        ("resume: x", "unknown key 'resume'"),
        ("- a", "holds no `flag: value` lines"),
        ("", "holds no `flag: value` lines"),
    ],
)
def test_wrong_values_name_their_key(tmp_path, text, says):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(tmp_path / "wrong.yaml", build_parser())
    assert says in str(error.value)
