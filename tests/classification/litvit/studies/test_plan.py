"""Studies: what they train, at which cost, and what is wrong in others."""

import pytest
import torch

from litvit.benchmarks.macs import count_macs
from litvit.commands import study as command
from litvit.errors import InputError
from litvit.studies.plan import read_study, study_names
from litvit.training.model import build_model

SMALL = {"recipe": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0, "img_size": 32}}


def macs(name, data):
    configs = read_study(name).configs(str(data))
    with torch.device("meta"):
        models = {model: build_model(config.model, 10) for model, config in configs.items()}
    return {model: count_macs(each, configs[model].model.img_size) for model, each in models.items()}


def test_models_of_the_study_for_cpus_cost_the_same(digits):
    costs = macs("cifar10_cpu", digits).values()
    assert len(costs) >= 7
    assert max(costs) < 1.05 * min(costs)


@pytest.mark.parametrize("name", study_names())
def test_a_model_with_merging_costs_what_its_counterpart_does(name, digits):
    study, costs = read_study(name), macs(name, digits)
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
        ({"recipe": {"epoch": 3}}, "^A: unknown key 'epoch'; did you mean epochs"),
        ({"recipe": 3}, "recipe is a mapping of `flag: value` lines"),
        ({"recipe": {"patience": 3}}, "^A: patience ends runs at different epochs; leave it out"),
        ({"models": {"A": None}}, "the model A has no `flag: value` lines, such as `model: lit_ti`"),
        ({"models": {}}, "models is a mapping of names, each with `flag: value` lines"),
        ({"models": {"A": {}}, "pairs": []}, "^A: which model"),
        ({"models": {"A": {"model": "lit_tii"}}, "pairs": []}, "'lit_tii'.* did you mean lit_ti"),
        ({"models": {"../A": {"model": "lit_ti"}}}, "'../A' names a folder: use letters"),
        ({"models": {"report.md": {"model": "lit_ti"}}}, "'report.md' names a folder: use letters"),
        ({"seeds": 3}, r"seeds is a list of whole numbers, such as \[1, 2, 3\]"),
        ({"seeds": [1.5]}, r"seeds is a list of whole numbers, such as \[1, 2, 3\]"),
        ({"pairs": "A"}, "pairs is a list of pairs of models"),
        ({"pairs": ["A"]}, "pairs has A, which are not two models"),
        ({"pairs": [["A", "A"]]}, r"pairs has \['A', 'A'\], which are not two models"),
        ({"pairs": [[["A"], "B+"]]}, r"pairs names '\['A'\]', which is not among the models"),
        ({"pairs": [["A", "C"]]}, "pairs names 'C', which is not among the models"),
    ],
)
def test_wrong_studies_are_one_line(tmp_path, digits, small_study, changes, message):
    with pytest.raises(InputError, match=message):
        command.main([str(digits), "--study", str(small_study(**changes)), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_wrong_command_lines_are_one_line(tmp_path, digits, small_study):
    with pytest.raises(InputError, match="--study cifar10_cpus: no such study; did you mean cifar10_cpu?"):
        command.main([str(digits), "--study", "cifar10_cpus"])
    nowhere = str(tmp_path / "cifar10")
    with pytest.raises(InputError, match="there is no .*cifar10; --download makes it the folder of CIFAR-10"):
        command.main([nowhere, "--study", str(small_study()), "--output", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write to '{tmp_path}/file'"):
        command.main([str(digits), "--study", str(small_study()), "--output", str(tmp_path / "file")])


def test_trained_runs_keep_a_study_to_its_settings(tmp_path, digits, small_study):
    arguments = [str(digits), "--output", str(tmp_path / "out"), "--report", "--study"]
    study = read_study(str(small_study()))
    study.write_recipes(tmp_path / "out")
    (tmp_path / "out/A/seed-1").mkdir()
    assert command.main([*arguments, str(small_study(recipe={"epochs": 9}))]) == 0  # nothing is trained yet
    (tmp_path / "out/A/seed-1/settings.yaml").touch()
    assert command.main([*arguments, str(small_study(seeds=[1, 2, 3], pairs=[]))]) == 0
    for recipe, words in (({"epochs": 9}, "epochs: it was 2, is 9"), ({"lr": 0.1}, "lr: it was the default, is 0.1")):
        with pytest.raises(InputError, match=f"out/A were trained with another {words}; choose another --output"):
            command.main([*arguments, str(small_study(recipe=SMALL["recipe"] | recipe))])
