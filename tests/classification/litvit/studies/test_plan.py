"""Studies: what they train, at which cost, and what is wrong in others."""

import pytest
import torch

from litvit.benchmarks.macs import count_macs
from litvit.commands import study as command
from litvit.errors import InputError
from litvit.studies.plan import read_study, study_names
from litvit.training.model import build_model


def macs(name, folder, data):
    configs = read_study(name).write_recipes(folder, str(data))
    with torch.device("meta"):
        models = {model: build_model(config.model, 10) for model, config in configs.items()}
    return {model: count_macs(each, configs[model].model.img_size) for model, each in models.items()}


def test_models_of_the_study_for_cpus_cost_the_same(tmp_path, digits):
    costs = macs("cifar10_cpu", tmp_path, digits).values()
    assert len(costs) >= 7
    assert max(costs) < 1.05 * min(costs)


@pytest.mark.parametrize("name", study_names())
def test_a_model_with_merging_costs_what_its_counterpart_does(name, tmp_path, digits):
    study, costs = read_study(name), macs(name, tmp_path, digits)
    assert len(study.seeds) >= 3
    merging = [pair for pair in study.pairs if pair[0].endswith("+DTM") or pair[1] == f"{pair[0]}-plain"]
    assert len(merging) >= 3
    for first, second in merging:
        assert 1 < costs[first] / costs[second] < 1.01  # the offsets alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": None}, "has no models; a study has recipe, models, seeds, pairs"),
        ({"seed": 3}, "unknown key 'seed'; a study has recipe, models, seeds, pairs"),
        ({"recipe": {"seed": 3}}, "seed is none of a recipe's lines here: the study's seeds has them"),
        ({"recipe": {"epoch": 3}}, "A/recipe.yaml: unknown key 'epoch'; did you mean epochs?"),
        ({"recipe": 3}, "recipe has `flag: value` lines, and models has names with such lines under each"),
        ({"models": {"A": {}}, "pairs": []}, "which model?"),
        ({"models": {"A": {"model": "lit_tii"}}, "pairs": []}, "'lit_tii'.* did you mean lit_ti"),
        ({"models": {"../A": {"model": "lit_ti"}}}, "'../A' is no name of a model's folder"),
        ({"models": {"..": {"model": "lit_ti"}}}, "'..' is no name of a model's folder"),
        ({"seeds": 3}, r"seeds is a list of whole numbers, such as \[1, 2, 3\]"),
        ({"seeds": [1.5]}, r"seeds is a list of whole numbers, such as \[1, 2, 3\]"),
        ({"pairs": ["A"]}, "pairs is a list of pairs of models"),
        ({"pairs": [["A", "C"]]}, "pairs names 'C', which is not among the models"),
    ],
)
def test_wrong_studies_are_one_line(tmp_path, digits, small_study, changes, message):
    with pytest.raises(InputError, match=message):
        command.main([str(digits), "--study", str(small_study(**changes)), "--output", str(tmp_path)])
    assert not list(tmp_path.glob("*/seed-*"))


def test_wrong_command_lines_are_one_line(tmp_path, digits, small_study):
    with pytest.raises(InputError, match="--study cifar10_cpus: no such study; did you mean cifar10_cpu?"):
        command.main([str(digits), "--study", "cifar10_cpus"])
    nowhere = str(tmp_path / "cifar10")
    with pytest.raises(InputError, match="there is no .*cifar10; --download makes it the folder of CIFAR-10"):
        command.main([nowhere, "--study", str(small_study()), "--output", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        command.main([str(digits), "--study", str(small_study()), "--output", str(tmp_path / "file")])
