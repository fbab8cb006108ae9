"""What `python -m build` makes: a source distribution with all files, and a wheel that needs no repository."""

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

from litvit.training.recipe import parse_config

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"


def tracked():
    """Names of the files of the checkout, or of the source distribution that this is."""
    if not (ROOT / ".git").exists():
        return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    return set(filter(lambda name: (ROOT / name).is_file(), subprocess.check_output(command, text=True).split("\0")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built of a copy of the checkout, and unpacked."""
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        copy = folder / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder / "checkout", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / done.stdout.splitlines()[-1]) as tar:
        tar.extractall(folder, filter="data")
        return folder / tar.getnames()[0]


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel, built of the source distribution, as `python -m build` builds it."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", sdist.parent, sdist]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    (wheel,) = sdist.parent.glob("*.whl")
    return wheel


def environment(folder, wheel, leave_out=()):
    """Make an environment with the wheel and the packages of this one. Returns a function that runs a command in it."""
    venv.create(folder / "env", symlinks=True)
    links = folder / "packages"
    links.mkdir()
    for entry in (entry for path in sys.path if path.endswith("site-packages") for entry in Path(path).iterdir()):
        if "litvit" not in entry.name and entry.name not in leave_out and not (links / entry.name).exists():
            (links / entry.name).symlink_to(entry)
    (packages,) = folder.glob("env/lib/*/site-packages")
    (packages / "others.pth").write_text(f"{links}\n")
    command = [sys.executable, "-m", "pip", "--python", folder / "env/bin/python", "install", "--no-deps", wheel]
    subprocess.run(command, check=True, capture_output=True)

    def run(name, *arguments):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LIT"))}
        command = [folder / "env/bin" / name, *map(str, arguments)]
        variables["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)

    return run


def test_the_source_distribution_has_everything(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in tracked() - held if not name.startswith(".")} == set()


SETTINGS = """
import json, sys
from litvit.training.recipe import parse_config
print(json.dumps([parse_config(["data", *flags]).flat() for flags in json.loads(sys.argv[1])]))
"""


def test_the_wheel_trains_with_the_recipes(wheel, tmp_path):
    run = environment(tmp_path, wheel)
    flags = [["--model", name] for name in ("lit_ti", "lit_s", "lit_m", "lit_b", "lit_s.in1k", "resnet18")]
    flags += [["--model", name, "--token-label-data", "labels"] for name in ("lvt", "lvt_cls")]
    settings = json.loads(run("python", "-c", SETTINGS, json.dumps(flags)).stdout)
    for each, found in zip(flags, settings, strict=True):
        expected = json.loads(json.dumps(parse_config(["data", *each]).flat()))
        assert (found.pop("config") is None) == (expected.pop("config") is None)
        assert found == expected

    done = run("litvit", "demo-data", "digits", "--train-per-class", 100, "--val-per-class", 20)
    assert done.returncode == 0, done.stderr
    begun = ["digits", "--config", "demo", "--epochs", "2", "--warmup-epochs", "0", "--experiment", "demo"]
    done = run("litvit", "train", *begun)
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load((tmp_path / "output/demo/settings.yaml").read_text())
    expected = parse_config(begun).flat()
    assert {name: expected[name] for name in settings} == settings
    assert "2 of 2 epochs" in (tmp_path / "output/demo/report.html").read_text()
    done = run("litvit", "validate", "digits", "--checkpoint", "output/demo/model_best.safetensors")
    assert json.loads(done.stdout)["top1"] > 15, done.stderr
    done = run("litvit", "explore", "digits/val/3/00000.png", "--checkpoint", "output/demo")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "explorer.html").read_text().startswith("<!doctype html>")

    (recipe,) = tmp_path.glob("env/lib/*/site-packages/litvit/recipes/lit_s.yaml")
    recipe.unlink()
    for name in ("lit_s", "lit_s.in1k"):
        done = run("litvit", "train", "digits", "--model", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: the recipe of lit_s is missing, {recipe}: install litvit again")
        assert done.stderr.count("\n") == 1


def test_the_models_need_no_extra_and_what_does_names_it(wheel, tmp_path):
    run = environment(tmp_path, wheel, leave_out=("tensorboard", "sklearn", "mmengine"))
    maps = (
        "import litvit, timm, torch; print(len(timm.create_model('lvt', features_only=True)(torch.rand(1, 3, 64, 64))))"
    )
    assert run("python", "-c", maps).stdout == "4\n"
    for command, package, extra in (
        (("litvit", "train", "digits", "--model", "lit_s"), "tensorboard", "train"),
        (("python", ROOT / "classification/train.py", "digits", "--model", "lit_s"), "tensorboard", "train"),
        (("litvit", "demo-data", "digits"), "sklearn", "demo"),
    ):
        done = run(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f'error: {package} is not installed: pip install "litvit[{extra}]"\n'
    done = run("python", "-c", "import litvit.openmmlab")
    assert done.stderr.endswith('mmengine is not installed: pip install "litvit[detection,segmentation]"\n')
