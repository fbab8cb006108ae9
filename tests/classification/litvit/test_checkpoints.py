"""Checkpoints read safely, and loaded by load_weights."""

import argparse
import datetime
import logging
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv

import litvit  # noqa: F401 (registers the models)
from litvit.checkpoints import load_weights, read_state_dict
from litvit.errors import InputError
from litvit.models import LIT, LVT
from litvit.runs.folder import load_checkpoint, read_description


def tiny(**kwargs):
    config = {"img_size": 64, "num_classes": 5, "dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    return LIT(**{**config, "num_heads": (0, 0, 2, 2), **kwargs})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Code:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_read_state_dict_prefers_averaged_weights_and_strips_prefixes(tmp_path):
    file = tmp_path / "last.pth.tar"
    plain, averaged = {"module._orig_mod.w": torch.zeros(2)}, {"_orig_mod.module.w": torch.ones(2)}
    torch.save({"state_dict": plain, "state_dict_ema": averaged, "epoch": 1}, file)
    assert same(read_state_dict(file), {"w": torch.ones(2)})
    torch.save({"state_dict": plain}, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})
    torch.save(plain, file)
    assert same(read_state_dict(file), {"w": torch.zeros(2)})


def prefixed(prefix, entries):
    return {prefix + name: value for name, value in entries.items()}


@pytest.mark.parametrize(
    "layout",
    [
        lambda own, other: {"state_dict": prefixed("model.", own), "pytorch-lightning_version": "2.6"},
        lambda own, other: {"state_dict": prefixed("model._orig_mod.", own) | {"criterion.weight": torch.ones(5)}},
        lambda own, other: prefixed("module.", own) | {"n_averaged": torch.tensor(3)},
        lambda own, other: prefixed("backbone.body.", own),
        lambda own, other: {"net": own, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda own, other: {"model_state_dict": prefixed("module.", own), "model": "lit_ti"},
        lambda own, other: {"generator": own, "critic": {"weight": torch.ones(5)}},
        lambda own, other: {"trainer": {"ema": own}},
        lambda own, other: {"model": other, "model_ema": {"module": own, "decay": 0.99}},
        lambda own, other: {"state_dict": prefixed("net.", own), "state_dict_ema": None, "model": other},
    ],
)
def test_names_of_others_become_the_models(layout, tmp_path):
    file, source, other = tmp_path / "others.ckpt", tiny(), tiny()
    torch.save(layout(source.state_dict(), other.state_dict()), file)
    model = tiny()
    load_weights(model, file)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["lit_ti", "lvt_cls"])
def test_published_names_load_with_a_prefix(name, tmp_path, published):
    file, model, expected = tmp_path / "wrapped.safetensors", timm.create_model(name), timm.create_model(name)
    save_file(prefixed("net.", published(name)), file)
    expected.load_state_dict(published(name))
    load_weights(model, file)
    assert same(model.state_dict(), expected.state_dict())


def test_what_is_left_out_is_named(tmp_path, caplog):
    file, model = tmp_path / "others.ckpt", tiny()
    torch.save(prefixed("model.", model.state_dict()) | {"criterion.weight": torch.ones(5)}, file)
    with caplog.at_level(logging.WARNING):
        load_weights(model, file)
    assert "follow 'model.'" in caplog.text
    assert "criterion.weight" in caplog.text


class Calls:
    """Something that a pickle builds by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_file_cannot_have_addresses_read(tmp_path):
    """An array of objects made of bytes: its elements would be addresses, which a set asks for their hash."""
    array = Calls(np.ndarray, (1,), "O", b"\x41" * 8)
    torch.save({"state_dict": {"w": torch.ones(2)}, "beside": Calls(frozenset, (array,))}, tmp_path / "evil.pth")
    program = f"from litvit.checkpoints import read_state_dict; print(*read_state_dict({str(tmp_path / 'evil.pth')!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "w\n"), done.stderr


def test_two_copies_are_one_line(tmp_path):
    file, model = tmp_path / "distilled.ckpt", tiny()
    torch.save({"student": model.state_dict(), "teacher": tiny().state_dict()}, file)
    with pytest.raises(InputError, match="the model's weights under 'student.' and 'teacher.'") as caught:
        load_weights(model, file)
    assert "\n" not in str(caught.value)


def test_data_beside_the_weights_does_no_harm(tmp_path):
    file, weights = tmp_path / "others.pth", {"w": torch.ones(2)}
    for value in (
        np.float64(81.5),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.str_("lit"),
        np.arange(3),
        np.random.get_state(),
        np.array(["cat", "dog"]),
        argparse.Namespace(lr=1e-3, output=Path("runs")),
        datetime.datetime.now(datetime.timezone.utc),
        torch.__version__,
        frozenset((1, 2)),
    ):
        torch.save({"state_dict": weights, "beside": value}, file)
        assert same(read_state_dict(file), weights)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read_state_dict(file)
        assert set(torch.serialization.get_safe_globals()) == before  # the program's own list is as it was
    # NumPy 1 had another name for the function that makes numbers, and torch.save writes names as text.
    content = b"cnumpy._core.multiarray\nscalar\n"
    torch.save({"state_dict": weights, "beside": np.float64(0.5)}, file, _use_new_zipfile_serialization=False)
    saved = file.read_bytes()
    assert content in saved
    file.write_bytes(saved.replace(content, content.replace(b"_core", b"core")))
    assert same(read_state_dict(file), weights)


@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: argparse.Namespace(code=code)])
def test_code_beside_the_weights_is_named_and_not_run(wrap, tmp_path):
    file = tmp_path / "code.pth"
    torch.save({"model": {"w": torch.ones(2)}, "beside": wrap(Code(tmp_path / "made"))}, file)
    with pytest.raises(InputError, match=r"holds code \(posix.mkdir\), which was not run"):
        read_state_dict(file)
    torch.save({"model": {"w": torch.ones(2)}, "beside": np.array([Code(tmp_path / "made")])}, file)
    with pytest.raises(InputError, match="which was not run"):
        read_state_dict(file)
    assert not (tmp_path / "made").exists()


def test_unreadable_checkpoints_are_one_line(tmp_path):
    good = tmp_path / "good.pth"
    torch.save({"w": torch.zeros(10_000)}, good)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "truncated.pth").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("<html>not found</html>" * 9)
    (tmp_path / "text.safetensors").write_text("<html>not found</html>" * 9)
    torch.save({"model": {"w": torch.zeros(2)}, "x": Code(tmp_path / "made")}, tmp_path / "code.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Code(tmp_path / "made")))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    expected = {
        "missing.pth": "no checkpoint at",
        "": "is a folder",
        "empty.pth": "is empty",
        "truncated.pth": "truncated",
        "text.pth": "is no checkpoint",
        "text.safetensors": "is no checkpoint",
        "code.pth": "was not run",
        "code.pkl": "was not run",
        "none.pth": "holds no weights",
        "list.pth": "is no checkpoint",
    }
    for name, message in expected.items():
        with pytest.raises(InputError) as caught:
            read_state_dict(tmp_path / name)
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_load_weights_is_all_or_nothing(tmp_path, published):
    file, narrow = tmp_path / "lit_ti.safetensors", tmp_path / "tiny.pth"
    save_file(published("lit_ti"), file)
    torch.save(tiny(dims=(8, 16, 32, 48)).state_dict(), narrow)
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="these are the weights of lit_ti") as caught:
        load_weights(model, file)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="size mismatch") as caught:
        load_weights(model, narrow)
    assert "\n" not in str(caught.value)
    assert same(model.state_dict(), before)
    with pytest.raises(InputError, match="these are the weights of lit_ti"):
        load_weights(timm.create_model("resnet10t", num_classes=10), file, new_classifier=True)


def test_load_weights_asks_before_it_changes_the_classifier(tmp_path):
    source, model, file = tiny(num_classes=7), tiny(), tmp_path / "tiny.pth"
    torch.save({"state_dict": source.state_dict()}, file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="holds 7 classes, the model has 5"):
        load_weights(model, file)
    assert same(model.state_dict(), before)
    load_weights(model, file, new_classifier=True)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    model = tiny(num_classes=7)
    load_weights(model, file)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda **kwargs: tiny(**kwargs), "patch_embed.proj.weight"),
        (lambda **kwargs: LVT(**kwargs), "stages.0.patch_embed.proj.weight"),
        (lambda **kwargs: timm.create_model("lvt", **kwargs), "stages.0.patch_embed.proj.weight"),
        (lambda **kwargs: timm.create_model("resnet10t", **kwargs), "conv1.0.weight"),
    ],
)
def test_first_convolution_is_adapted_to_other_image_channels(make, first, channels, tmp_path):
    file, source, model = tmp_path / "rgb.ckpt", make(num_classes=7), make(num_classes=5, in_chans=channels)
    torch.save({"state_dict": prefixed("model.", source.state_dict())}, file)
    with pytest.raises(InputError, match=f"holds 3 image channels, the model has {channels}"):
        load_weights(make(num_classes=7, in_chans=channels), file)
    load_weights(model, file, new_classifier=True)
    assert torch.equal(model.state_dict()[first], adapt_input_conv(channels, source.state_dict()[first]))
    rest = (
        set(source.state_dict()) - {first} - {name for name in source.state_dict() if "head" in name or "fc." in name}
    )
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in rest)


def test_published_weights_are_adapted_to_grey_images(tmp_path, published):
    file, model = tmp_path / "lit_ti.safetensors", timm.create_model("lit_ti", in_chans=1)
    save_file(published("lit_ti"), file)
    load_weights(model, file, new_classifier=True)
    expected = published("lit_ti")["patch_embed1.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, expected)


def test_weights_that_no_rule_adapts_are_one_line(tmp_path):
    file, model = (
        tmp_path / "rgb.pth",
        timm.create_model("tresnet_m", in_chans=2),
    )  # whose convolution reads 4 x 4 pixels
    torch.save(timm.create_model("tresnet_m").state_dict(), file)
    with pytest.raises(InputError, match="size mismatch for body.conv1.conv.weight"):
        load_weights(model, file, new_classifier=True)


def test_tables_of_another_model_that_are_no_square_are_one_line(tmp_path):
    file = tmp_path / "pvt.pth"
    torch.save({"patch_embed1.proj.weight": torch.ones(64, 3, 4, 4), "pos_embed1": torch.ones(1, 50 * 40, 64)}, file)
    with pytest.raises(InputError, match="does not fit LIT"):
        load_weights(tiny(), file)


@pytest.mark.parametrize("lie", [False, True])
def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, lie):
    """Four megabytes that unpack to four gigabytes, even where the archive says that they are few."""
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(4)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in plain.namelist():
            with packed.open(record, "w", force_zip64=True) as file:
                file.write(plain.read(record))
                for _ in range(64 if record.endswith("data/0") else 0):
                    file.write(bytes(2**20))
        if lie:
            packed.infolist()[0].file_size = 16
    tracemalloc.start()
    for read in (read_state_dict, load_checkpoint):
        with pytest.raises(InputError, match="is a compressed archive of .* MiB, and torch.save compresses nothing"):
            read(path)
    assert read_description(path) == {}
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_dicts_that_hold_one_another_many_times(tmp_path):
    entries = {"w": torch.zeros(1)}
    for _ in range(20):
        entries = {str(number): entries for number in range(10)}
    torch.save(entries, tmp_path / "weights.pth")
    assert len(read_state_dict(tmp_path / "weights.pth")) == 1
    entries = {"w": torch.zeros(1)}
    entries["itself"] = entries
    torch.save(entries, tmp_path / "weights.pth")
    assert read_state_dict(tmp_path / "weights.pth").keys() == {"w"}
