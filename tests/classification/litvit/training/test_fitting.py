"""Settings that fit the number of images."""

import pytest
import torch

from litvit.training.fitting import choose_settings, describe_choices
from litvit.training.recipe import parse_config


def chosen(*args, **kwargs):
    return {name: value for choice in choose_settings(*args, **kwargs) for name, value in choice.settings.items()}


@pytest.mark.parametrize(
    ("num_images", "batch_size", "epochs", "from_scratch"),
    [
        (60, 8, 100, 150),
        (100, 8, 100, 150),
        (200, 16, 71, 106),
        (1000, 64, 32, 100),
        (10_000, 128, 10, 100),
        (1_000_000, 128, 10, 100),
    ],
)
def test_batch_and_epochs_follow_the_number_of_images(num_images, batch_size, epochs, from_scratch):
    settings = chosen(num_images, True)
    assert (settings["batch_size"], settings["epochs"]) == (batch_size, epochs)
    assert settings["warmup_epochs"] < epochs
    assert settings["batch_size"] <= num_images
    assert chosen(num_images, False)["epochs"] == from_scratch


def test_learning_rates_and_batches_fit_what_is_given():
    """Learning rates follow the one that is given, and no choice is refused for another one."""
    assert chosen(1000, True, {"lr_base": 0.1})["lr"] == pytest.approx(0.1 * 64 / 512)
    assert chosen(1000, True, {"lr": 1e-6})["warmup_lr"] < 1e-6
    assert chosen(1000, True, {"lr": 1e-6})["min_lr"] < 1e-6
    assert chosen(7, True)["batch_size"] <= 7
    assert chosen(20_000, True, world_size=5)["batch_size"] % 2 == 0
    assert chosen(20_000, True, {"token_label": True})["mixup"] == 0


def test_trained_weights_have_layer_decay():
    assert chosen(200, True)["layer_decay"] == 0.75
    assert chosen(200, False)["layer_decay"] is None


def test_few_images_are_not_mixed_and_less_augmented():
    few, many = chosen(100, True), chosen(50_000, True)
    assert few["mixup"] == few["cutmix"] == 0 < many["mixup"]
    assert few["scale"][0] > many["scale"][0]


def test_the_total_batch_is_the_same_for_all_numbers_of_processes():
    one, four = chosen(1000, True, world_size=1), chosen(1000, True, world_size=4)
    assert one["batch_size"] == 4 * four["batch_size"]
    assert one["lr"] == four["lr"] == chosen(1000, True, {"grad_accum_steps": 2}, 2)["lr"]


def test_choices_fit_what_is_given():
    settings = chosen(200, True, {"epochs": 3, "batch_size": 128})
    assert settings["warmup_epochs"] == 0
    assert settings["lr"] == pytest.approx(2 * chosen(200, True, {"batch_size": 32})["lr"])


def test_what_is_given_is_not_described():
    given = {"batch_size": 8, "epochs": 9}
    lines = describe_choices(choose_settings(200, True, given), given, 200, True)
    assert not any("batch_size" in line or " epochs 9" in line for line in lines)
    assert all(line.startswith("chosen for 200 images and trained weights: ") for line in lines)


def test_flags_and_recipe_have_precedence(digits, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: lit_ti\nfit_to_data: true\nval_fraction: 0.25\nreprob: 0.7\nmixup: 0.3\n")
    config = parse_config([str(digits / "train"), "--config", str(recipe), "--lr", "0.01", "--mixup", "0.2"])
    assert config.data.batch_size == 8
    assert (config.optim.epochs, config.optim.lr) == (150, 0.01)
    assert (config.augment.reprob, config.augment.mixup) == (0.7, 0.2)
    assert config.run.chosen[0].startswith("chosen for 60 images and random weights: batch_size 8")
    assert not any("reprob" in line or "lr 0.01," in line for line in config.run.chosen)
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "lit_ti.pth")
    flags = ["--config", str(recipe), "--initial-checkpoint", str(tmp_path / "lit_ti.pth")]
    weights = parse_config([str(digits), *flags])
    assert (weights.optim.layer_decay, weights.optim.epochs) == (0.75, 100)


def test_the_recipe_is_for_any_model(digits):
    config = parse_config([str(digits), "--config", "finetune", "--model", "resnet18"])
    assert config.run.fit_to_data
    assert (config.model.model, config.data.batch_size, config.model.exif_transpose) == ("resnet18", 8, True)
