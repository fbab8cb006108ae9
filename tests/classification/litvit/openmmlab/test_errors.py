"""Which exceptions come from the user's own code, and which are wrong input."""

import pytest
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS

from litvit.errors import is_from_user_code

MODULE = """
import torch
from mmengine.registry import MODELS, TRANSFORMS

@MODELS.register_module(force=True)
class UsersModel(torch.nn.Module):
    def __init__(self, channels=8, part=None):
        super().__init__()
        self.layer = torch.nn.Linear(channels, channels)
        self.part = part and MODELS.build(part)

@TRANSFORMS.register_module(force=True)
class UsersTransform:
    def __call__(self, results):
        return {"img": results["img"] + 1}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function of a module's and a config's text: the config that imports the module."""
    monkeypatch.syspath_prepend(tmp_path)

    def read(module, text="", name="users_module"):
        (tmp_path / f"{name}.py").write_text(module)
        file = tmp_path / "config.py"
        file.write_text(f"custom_imports = dict(imports=['{name}'])\n{text}")
        return Config.fromfile(file)

    return read


def caught(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any)
        function(*arguments)
    return caught.value


def test_a_constructor_and_a_transform(config):
    config(MODULE)
    assert is_from_user_code(caught(MODELS.build, {"type": "UsersModel", "channels": "8"}))  # raised by torch
    assert is_from_user_code(caught(Compose([{"type": "UsersTransform"}]), {}))


def test_what_a_config_asks_for_in_vain(config):
    config(MODULE)
    for model in (
        {"type": "UsrsModel"},
        {"type": "UsersModel", "chanels": 8},
        {"type": "UsersModel", "part": {"type": "UsrsModel"}},  # built by the user's constructor
        {"type": "LIT", "arch": "lit_x"},
        {"type": "mmengine.ToyModel", "x": 1},
    ):
        assert not is_from_user_code(caught(MODELS.build, model)), model


def test_a_module_that_cannot_be_imported(config):
    assert is_from_user_code(caught(config, "import no_such_package", "", "users_import"))
    assert is_from_user_code(caught(config, "def f(:\n", "", "users_syntax"))
    assert not is_from_user_code(caught(config, "", "custom_imports = dict(imports=['no_such_module'])"))


def test_a_config(config):
    assert is_from_user_code(caught(config, MODULE, "model = dict(type='UsersModel')['typ']"))
    assert not is_from_user_code(caught(config, MODULE, "model = dict(type=)"))
    assert not is_from_user_code(caught(lambda: config(MODULE).model))
