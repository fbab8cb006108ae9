"""Files of a run: replaced whole or not at all, read back without running code."""

import pytest
import torch
import yaml

from litvit.errors import InputError
from litvit.runs.folder import (
    RunConfig,
    RunFolder,
    load_checkpoint,
    read_description,
    replace_file,
    resumed_folder,
    save_checkpoint,
    save_weights,
)


def test_checkpoint_round_trip(tmp_path):
    state = {"optimizer": {"step": 3}, "state_dict": {"w": torch.arange(3.0)}, "description": {"mean": (0.5, 0.5)}}
    save_checkpoint(tmp_path / "last.pth", state)
    loaded = load_checkpoint(tmp_path / "last.pth")
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
    assert loaded["description"]["mean"] == (0.5, 0.5)


def test_the_checkpoint_before_is_kept(tmp_path):
    folder = RunFolder(RunConfig(output=str(tmp_path.parent), experiment=tmp_path.name), "lit_ti", primary=True)
    for step in (1, 2, 3):
        assert folder.save_checkpoint({"optimizer": {}, "update": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "previous.pth"]
    assert load_checkpoint(tmp_path / "previous.pth")["update"] == 2
    assert folder.load_last()["update"] == 3
    for name in ("last.pth", "previous.pth"):
        (tmp_path / name).write_bytes(b"damaged")
    for _ in range(2):  # it stays so: no run starts over them
        with pytest.raises(InputError, match="holds no good checkpoint") as error:
            folder.load_last()
        assert "\n" not in str(error.value)


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "last.pth", {"optimizer": {}, "state_dict": {"w": torch.randn(64)}})
    path = tmp_path / "last.pth"
    content = path.read_bytes()
    weights = torch.load(path, weights_only=True)["state_dict"]["w"].numpy().tobytes()
    start = content.index(weights)
    for offset in range(0, len(weights), 16):
        flipped = bytearray(content)
        flipped[start + offset] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pth")
    (tmp_path / "text.pth").write_text("text")
    for name, says in (("weights.pth", "not a full checkpoint"), ("text.pth", "no checkpoint, or"), ("none.pth", "at")):
        with pytest.raises(InputError, match=says) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


def test_weights_carry_their_description(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"w": torch.ones(2, 3).t()}, {"model": "lit_ti", "img_size": 64})
    assert read_description(tmp_path / "w.safetensors") == {"model": "lit_ti", "img_size": 64}
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    assert read_description(tmp_path / "broken.safetensors") == read_description(None) == {}


def test_settings_are_a_recipe(tmp_path):
    folder = RunFolder(RunConfig(output=str(tmp_path.parent), experiment=tmp_path.name), "lit_ti", primary=True)
    folder.open({"model": "lit_ti", "lr": 1e-3, "scale": [0.1, 1.0], "model_kwargs": {}})
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text())["scale"] == [0.1, 1.0]


def test_a_run_is_named_by_folder_or_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no run there"):
        resumed_folder(str(tmp_path))
    (tmp_path / "last.pth").touch()
    assert resumed_folder(str(tmp_path)) == resumed_folder(str(tmp_path / "last.pth")) == tmp_path
    with pytest.raises(InputError, match="no run there"):
        resumed_folder(str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("resume", "says"),
    [
        ("{tmp}/run/model_best.safetensors", "--resume {tmp}/run continues this file's run"),
        ("{tmp}/run/previous.pth", "--resume {tmp}/run continues this file's run"),
        ("{tmp}/weights.safetensors", "--initial-checkpoint starts a run from weights"),
        ("https://host/lit_s.pth", "--initial-checkpoint starts a run from weights"),
        ("run", "did you mean {tmp}/run?"),
        ("nosuch", "there is no such folder; runs are in {tmp}"),
        ("{tmp}", "name a run's folder, which holds settings.yaml and last.pth"),
    ],
)
def test_what_is_no_run_gets_advice(tmp_path, resume, says):
    (tmp_path / "run").mkdir()
    for name in ("run/last.pth", "run/previous.pth", "run/model_best.safetensors", "weights.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        resumed_folder(resume.format(tmp=tmp_path), str(tmp_path))
    assert says.format(tmp=tmp_path) in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("model", 5, "a name"),
        ("model_kwargs", [1], "a mapping"),
        ("num_classes", "ten", "a number from 1"),
        ("num_classes", True, "a number from 1"),
        ("classes", {"ant": 0}, "a list of names"),
        ("in_chans", 0, "a number from 1"),
        ("img_size", ["224"], "a size in pixels"),
        ("mean", "grey", "a list of numbers"),
        ("crop_pct", float("nan"), "a number"),
    ],
)
def test_a_description_with_wrong_types_is_one_line(tmp_path, suffix, name, value, kind):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        save_checkpoint(path, {"optimizer": {}, "description": {name: value}})
    else:
        save_weights(path, {"w": torch.zeros(1)}, {name: value})
    with pytest.raises(InputError, match=f"its description is damaged: {name} is .*, not {kind}; save it again"):
        read_description(path)


@pytest.mark.parametrize("name", ["train.log", "summary.csv", "last.pth", "model_best.safetensors", "settings.yaml"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is a folder, and the run writes a file there"):
        RunFolder(RunConfig(output=str(tmp_path.parent), experiment=tmp_path.name), "lit_ti", primary=True)
