"""The recipes reproduce the published runs; flags override recipes."""

import pytest
import torch
import yaml
from timm.layers import to_2tuple
from timm.models import list_models, model_entrypoint

from litvit.data.augment import AugmentConfig
from litvit.data.readers import DataConfig
from litvit.errors import InputError
from litvit.runs.folder import RunConfig, save_weights
from litvit.training.config import Config
from litvit.training.model import ModelConfig
from litvit.training.optimizer import OptimConfig
from litvit.training.recipe import RECIPES, build_parser, load_recipe, parse_config

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
        ("litv2_s", SWIN | {"drop_path": 0.2}),
        ("litv2_m", SWIN | {"drop_path": 0.3}),
        ("litv2_b", SWIN | {"drop_path": 0.5}),
        *((name, TI) for name in ("lit_ti_plain", "pvt_tiny", "pvt_small", "pvt_small_dtm", "pvt_small_msa_no1")),
        *((name, SWIN | {"drop_path": 0.2}) for name in ("lit_s_plain", "swin_tiny_dtm", "litv2_s_alpha02")),
    ],
)
def test_recipe_is_the_published_run(model, own):
    settings = parse_config(["data", "--model", model]).flat()
    expected = {"model": model, **SHARED, **own}
    assert {name: settings[name] for name in expected} == expected


def test_fine_tuning_of_litv2_at_384(tmp_path):
    settings = parse_config(["data", "--config", "litv2_b_384"]).flat()
    expected = {"model": "litv2_b", "pretrained": True, "img_size": 384, "crop_pct": 1.0, "weight_decay": 1e-8}
    expected |= {"epochs": 30, "warmup_epochs": 5, "cooldown_epochs": 0, "lr_base": 2e-5, "lr_base_size": 512}
    expected |= {"min_lr_base": 2e-7, "warmup_lr_base": 2e-8, "sched_on_updates": True}
    assert {name: settings[name] for name in expected} == expected
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, {"w": torch.ones(1)}, {"model": "litv2_b", "img_size": 224, "crop_pct": 0.875})
    own = parse_config(
        ["data", "--config", "litv2_b_384", "--no-pretrained", "--initial-checkpoint", str(weights)]
    ).flat()
    assert {name: own[name] for name in expected} == expected | {"pretrained": False}


def test_every_model_of_the_package_has_a_recipe():
    names = [name for name in list_models() if model_entrypoint(name).__module__.startswith("litvit.models.")]
    assert len(names) > 15
    for name in names:
        config = parse_config(["data", "--model", name, "--no-token-label"])
        assert config.run.config
        assert config.model.model == name


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: lit_s\nweight_decay: 1e-2\nmodel_ema: true\nmodel_kwargs: {depths: [1, 1]}\n"
    )
    config = parse_config(["data", "--config", str(tmp_path / "mine.yaml"), "--no-model-ema", "--amp"])
    assert (config.model.model, config.optim.weight_decay, config.optim.epochs) == ("lit_s", 0.01, 300)
    assert (config.precision.model_ema, config.precision.amp) == (False, True)
    assert config.model.model_kwargs == {"depths": [1, 1]}
    assert config.run.config == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("flag", ["--amp", "--apex-amp", "--native-amp"])
def test_old_names_of_mixed_precision(flag):
    assert parse_config(["data", "--model", "resnet18", flag]).precision.amp is True


def test_a_model_without_recipe_gets_the_defaults_of_the_flags():
    config = parse_config(["data", "--model", "resnet18"])
    assert config.flat() == Config(DataConfig("data"), ModelConfig("resnet18")).flat() | {"changed": ["model"]}
    assert (config.run.config, config.optim.epochs, config.augment.mixup) == (None, 300, 0.0)


@pytest.mark.parametrize(
    ("line", "flags", "size"),
    [
        ("img_size: 64", "", 64),
        ("img_size: [64, 96]", "", (64, 96)),
        ("img_size: [64, 64]", "", 64),
        ("img_size: [64, 96]", "--img-size 32", 32),
        ("img_size: 64", "--img-size 96 64", (96, 64)),
    ],
)
def test_image_sizes_of_one_number_or_two(tmp_path, line, flags, size):
    (tmp_path / "sized.yaml").write_text(f"model: lit_s\n{line}\n")
    config = parse_config(["data", "--config", str(tmp_path / "sized.yaml"), *flags.split()])
    assert config.model.img_size == size
    saved = yaml.safe_load(yaml.safe_dump(config.flat()))["img_size"]
    assert saved == (list(size) if isinstance(size, tuple) else size)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("img_size: [64, 96, 3]", "--img-size takes one number or two, height and width, not 3"),
        ("img_size: []", "--img-size takes one number or two, height and width, not 0"),
        ("img_size: [64, 0]", "--img-size must be at least 1, not 0"),
        ("model_kwargs: {img_size: [64, 96]}", "--img-size N, or --img-size HEIGHT WIDTH, is both"),
        ("in_chans: 2", "--in-chans 2: images are read with 1 (grey), 3 (RGB) or 4 (RGBA) channels"),
        ("smoothing: 1.0", "--smoothing must be below 1"),
        ("torchcompile: nosuch", "--torchcompile nosuch: torch's backends are"),
    ],
)
def test_settings_that_no_run_can_have(tmp_path, line, says):
    (tmp_path / "wrong.yaml").write_text(f"model: lit_s\n{line}\n")
    with pytest.raises(InputError) as error:
        parse_config(["data", "--config", str(tmp_path / "wrong.yaml")])
    assert says in str(error.value)


def test_no_amp_overrides_a_recipe():
    assert parse_config(["data", "--model", "lit_ti", "--no-amp"]).precision.amp is False


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    """That of one's own data is for any model, or for the one that the weights to start from have."""
    assert ("model" in load_recipe(path, build_parser())) == (path.stem != "finetune")


def test_weights_know_their_model(digits, tmp_path):
    """A recipe's settings and the command line have precedence, and weights of another model say nothing."""
    known = {"model": "lit_s", "img_size": 96, "crop_pct": 1.0, "model_kwargs": {"depths": [1, 1, 1, 1]}}
    save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(1)}, known)
    start = [str(digits), "--initial-checkpoint", str(tmp_path / "w.safetensors")]
    model = parse_config(start).model
    assert (model.model, to_2tuple(model.img_size), model.crop_pct) == ("lit_s", (96, 96), 1.0)
    assert model.model_kwargs == {"depths": [1, 1, 1, 1]}
    assert parse_config(start).run.config == str(RECIPES / "lit_s.yaml")
    assert to_2tuple(parse_config([*start, "--img-size", "64"]).model.img_size) == (64, 64)
    (tmp_path / "own.yaml").write_text("img_size: 128\n")
    model = parse_config([*start, "--config", str(tmp_path / "own.yaml")]).model
    assert (model.model, to_2tuple(model.img_size), model.crop_pct) == ("lit_s", (128, 128), 1.0)
    model = parse_config([*start, "--model", "resnet18"]).model
    assert (model.model, model.img_size, model.crop_pct) == ("resnet18", None, None)
    with pytest.raises(InputError, match="published weights are --model lit_s.in1k --pretrained"):
        parse_config([str(digits), "--initial-checkpoint", "lit_s.in1k"])
    with pytest.raises(InputError, match="no checkpoint at lit_s.pth"):
        parse_config([str(digits), "--initial-checkpoint", "lit_s.pth"])


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
        ("img_size: large", "img_size: 'large' is not int"),
        ("resume: x", "unknown key 'resume'"),
        ("lr: 1\nepochs: 2\nlr: 3", "lr has two values, in lines 1 and 3: leave one of them"),
        ("{lr: 1, lr: 1}", "lr has two values, in lines 1 and 1"),
        ("model_kwargs:\n  dims: [1]\n  dims: [2]", "dims has two values, in lines 2 and 3"),
        ("- a", "holds no `flag: value` lines"),
        ("", "holds no `flag: value` lines"),
    ],
)
def test_wrong_values_name_their_key(tmp_path, text, says):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(tmp_path / "wrong.yaml", build_parser())
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "{tmp}/mine.yaml", "{tmp}/run", "{tmp}/run/settings.yaml"])
def test_a_recipe_is_a_file_or_a_run_or_a_name(tmp_path, name):
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "mine.yaml", tmp_path / "run" / "settings.yaml"):
        path.write_text((RECIPES / "demo.yaml").read_text())
    recipe = parse_config(["data", "--config", "demo"])
    config = parse_config(["data", "--config", name.format(tmp=tmp_path)])
    assert {**config.flat(), "config": None} == {**recipe.flat(), "config": None}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("demmo", "no such recipe; did you mean demo?"),
        ("https://host/lit_s.yaml", "no such recipe; did you mean lit_s?"),
        ("{tmp}", "no such recipe (a .yaml file on this machine, a run's folder, or one of the package's: demo"),
        ("{tmp}/weights.pth", "weights.pth is no recipe: it holds no text"),
    ],
)
def test_what_is_no_recipe_gets_advice(tmp_path, name, says):
    (tmp_path / "weights.pth").write_bytes(b"PK\x80\xff")
    with pytest.raises(InputError) as error:
        parse_config(["data", "--config", name.format(tmp=tmp_path)])
    assert says in str(error.value)


def test_a_recipe_imports_the_module_of_its_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe_model.py").write_text(
        "import timm\n@timm.models.register_model\n"
        "def recipe_net(**kwargs): return timm.create_model('resnet10t', **kwargs)"
    )
    (tmp_path / "own.yaml").write_text("model: recipe_net\nimports: [recipe_model]\n")
    config = parse_config(["data", "--config", str(tmp_path / "own.yaml"), "--model", "recipe_net"])
    assert (config.model.model, config.model.imports) == ("recipe_net", ["recipe_model"])


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"run": RunConfig(checkpoint_every="soon")}, "--checkpoint-every 'soon' is neither"),
        ({"augment": AugmentConfig(mixup=0.8), "data": DataConfig("data", batch_size=3)}, "--batch-size must be even"),
        ({"optim": OptimConfig(epochs=0)}, "--epochs must be at least 1"),
        ({"run": RunConfig(dry_run=0)}, "--dry-run must be at least 1"),
    ],
)
def test_a_config_made_in_python_is_checked_too(groups, says):
    with pytest.raises(InputError, match=says):
        Config(**{"data": DataConfig("data"), "model": ModelConfig("lit_ti"), **groups})


def test_a_config_made_in_python_is_the_recipe_that_it_is_saved_as():
    config = Config(DataConfig("data"), ModelConfig("lit_ti", model_kwargs={"depths": (1, 1, 1, 1)}))
    assert config.flat() == yaml.safe_load(yaml.safe_dump(config.flat()))


@pytest.mark.parametrize("key", ["lr", "model_kwargs", "opt_betas", "nothing"])
def test_aliases_of_a_recipe_are_one_short_line(key, tmp_path):
    """A few lines of aliases would be gigabytes when a message shows the value."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, f"{key}: *a11"]))
    with pytest.raises(InputError, match=r"bomb.yaml is not YAML: aliases \(\*name\) are not read") as error:
        load_recipe(tmp_path / "bomb.yaml", build_parser())
    assert len(str(error.value)) < 300


def test_a_recipe_that_is_nested_too_deeply_is_one_line(tmp_path):
    (tmp_path / "deep.yaml").write_text("lr: " + 10000 * "[" + 10000 * "]")
    with pytest.raises(InputError, match="deep.yaml is not YAML: "):
        load_recipe(tmp_path / "deep.yaml", build_parser())


def test_epochs_on_the_command_line_leave_out_the_recipes_cool_down():
    flags = ["data", "--model", "lit_ti", "--warmup-epochs", "0"]
    assert parse_config([*flags, "--epochs", "1"]).optim.cooldown_epochs == 0
    assert parse_config([*flags, "--epochs", "1", "--cooldown-epochs", "2"]).optim.cooldown_epochs == 2
    assert parse_config(flags).optim.cooldown_epochs == 10


@pytest.mark.parametrize(
    "line",
    [
        "lr: .inf",
        "lr: .nan",
        "weight_decay: .inf",
        "layer_decay: 7",
        "momentum: 3",
        "clip_grad: .inf",
        "val_fraction: 2",
        "min_lr_base: -1",
        "scale: [0.5, .inf]",
        "patience: 0",
        "freeze: -1",
        "color_jitter: -1",
    ],
)
def test_numbers_that_no_run_can_have(tmp_path, line):
    (tmp_path / "own.yaml").write_text(f"model: lit_ti\n{line}\n")
    with pytest.raises(InputError, match=f"--{line.split(':')[0].replace('_', '-')} "):
        parse_config(["data", "--config", str(tmp_path / "own.yaml")])


def test_settings_that_differ_from_the_recipe_are_known():
    assert parse_config(["data", "--config", "demo"]).run.changed == []
    config = parse_config(["data", "--config", "demo", "--lr", "2e-3", "--epochs", "4", "--img-size", "32", "-j", "0"])
    assert config.run.changed == ["img_size", "lr", "workers"]
