"""Files and commands of docs/extending.md and of the README run, and links in the pages lead to files."""

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import train
from server import serve

from litvit.__main__ import COMMANDS as LITVIT
from litvit.demo_data import Settings, build
from litvit.runs.folder import save_weights

ROOT = Path(__file__).parents[1]
CLASSIFICATION = ROOT / "classification"
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("*/README.md")]
FILES = {name: text for text, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", EXTENDING, re.DOTALL)}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", EXTENDING, re.DOTALL) for line in block.splitlines()]
# Seconds in place of minutes: the last of two equal flags counts.
QUICK = ["--output", "output", "--img-size", "32", "-b", "20", "-j", "0", "--epochs", "1", "--warmup-epochs", "0"]


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    """The current folder: like classification/, with the page's files in it, and the demo's digits in ../data/demo."""
    shutil.copytree(digits, tmp_path / "data" / "demo")
    folder = tmp_path / "classification"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for entry in ("train.py", "validate.py"):
        (folder / entry).symlink_to(CLASSIFICATION / entry)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def commands(word):
    """Return the arguments of the page's commands that name `word`, without "python"."""
    found = [shlex.split(line) for line in COMMANDS if word in line]
    assert found
    assert all(words[0] == "python" for words in found)
    return [words[1:] for words in found]


def run_python(*arguments):
    """Run Python in a process of its own and return what it prints."""
    path = f"{CLASSIFICATION}{os.pathsep}{os.getcwd()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_backbone(folder):
    training, validation = commands("tiny_backbone")
    run_python(*training, *QUICK)
    assert '"images": 40' in run_python(*validation)
    runpy.run_path("tiny_backbone.py")
    maps = timm.create_model("tiny_backbone", features_only=True)(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]


def test_backbone_in_mmdet(folder):
    pytest.importorskip("mmengine")
    build = """
import torch
import tiny_mm
from mmengine.registry import MODELS
backbone = MODELS.build({"type": "Tiny", "arch": "tiny_backbone", "out_indices": (1, 3)})
print([tuple(x.shape) for x in backbone(torch.randn(1, 3, 64, 96))])
"""
    assert run_python("-c", build).splitlines()[-1] == "[(1, 32, 8, 12), (1, 128, 2, 3)]"


def test_augmentation(folder, run_main):
    (command,) = commands("soft_focus")
    outcome = run_main(train, *command[1:], *QUICK)
    assert outcome.status == 0, outcome.err
    (settings,) = folder.glob("output/*/settings.yaml")
    assert "aa: soft_focus" in settings.read_text()


def test_reader(folder, run_main, monkeypatch):
    (tables,), (training,) = commands("make_tables"), commands("csv_table")
    monkeypatch.setattr(sys, "argv", tables)
    runpy.run_path(tables[0])
    table = Path("../data/demo/val.csv")
    table.write_text("".join(line for line in table.open() if not line.startswith("val/7/")))
    outcome = run_main(train, *training[1:], *QUICK)
    assert outcome.status == 0, outcome.err
    (log,) = folder.glob("output/*/train.log")
    assert "80 + 36 images" in log.read_text()


def test_head_of_a_segmentor(folder):
    pytest.importorskip("mmseg")
    file = folder / "two_level_demo.py"
    file.write_text(file.read_text().replace('"configs/', f'"{ROOT}/segmentation/configs/'))
    build = """
import torch
import litvit.openmmlab
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
config = Config.fromfile("two_level_demo.py")  # imports what custom_imports names
config.model.backbone.init_cfg = None
with DefaultScope.overwrite_default_scope("mmseg"):
    model = MODELS.build(config.model).eval()
print(type(model.decode_head).__name__, tuple(model(torch.randn(1, 3, 128, 128)).shape))
"""
    assert run_python("-c", build).splitlines()[-1] == "TwoLevelHead (1, 14, 32, 32)"


@pytest.mark.parametrize(("file", "output"), [("plain_torch.py", "[0.01, 1.0]"), ("own_groups.py", "6 2")])
def test_learning_rates_of_offsets(folder, file, output, capsys):
    runpy.run_path(file)
    assert capsys.readouterr().out.splitlines()[-1] == output


def test_from_a_picture_to_an_answer(digits, tmp_path, monkeypatch, run_main):
    """The README's commands, on weights that a server has and 100 pictures of three classes, with small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({"model": timm.create_model("lit_s").state_dict()}, tmp_path / "lit_s.pth")
    kwargs = {"dims": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]}
    small = timm.create_model("lit_ti", num_classes=10, img_size=32, **kwargs)
    description = {"model": "lit_ti", "model_kwargs": kwargs, "img_size": 32, "num_classes": 10}
    save_weights(tmp_path / "lit_ti.safetensors", small.state_dict(), description)
    build(tmp_path / "all", Settings(train_per_class=34, val_per_class=1, image_size=32))
    for label, number in (("3", 34), ("4", 33), ("7", 33)):
        (tmp_path / "PICTURES" / label).mkdir(parents=True)
        for file in sorted((tmp_path / "all" / "train" / label).iterdir())[:number]:
            shutil.copy(file, tmp_path / "PICTURES" / label)
    shutil.copy(next((digits / "val" / "3").iterdir()), "image.png")
    shutil.copytree(digits / "val" / "7", "folder")
    with serve(tmp_path) as server:
        places = {
            "image.jpg": ["image.png"],
            "lit_s.in1k": [f"{server.address}/lit_s.pth"],
            "--pretrained": ["--initial-checkpoint", f"{server.address}/lit_ti.safetensors", "-j", "0"],
        }
        (block,) = re.findall(r"```bash\n([^`]*litvit predict[^`]*litvit compare.*?)```", README, re.DOTALL)
        predicting, training, validation, comparison = (
            [part for word in shlex.split(line, comments=True)[1:] for part in places.get(word, [word])]
            for line in block.splitlines()
            if line.startswith("litvit")
        )
        training += ["--epochs", "1"]
        second = [word.replace("first", "second") for word in training]
        outputs = []
        for name, *arguments in (
            predicting,
            training,
            [*second, "--class-weights", "balanced"],
            validation,
            [word.replace("first", "second") for word in validation],
            comparison,
        ):
            outcome = run_main(importlib.import_module(LITVIT[name][0]), *arguments)
            assert outcome.status == 0, outcome.err
            outputs.append(outcome.out)
    assert len(re.findall(r"^\S+\.png .*%", outputs[0], re.MULTILINE)) == 5
    assert "chosen for 79 images and trained weights" in outputs[1]
    assert '"images": 21' in outputs[3]
    assert (tmp_path / "output/first/report/confusion.png").is_file()
    assert "top1" in outputs[5]


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset|href)="(?!https?://)([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_speed_table_is_that_of_the_report():
    """The README's ratios, images/s of the LITs and published ratios are those measured on the H100."""
    report = (ROOT / "docs/benchmarks/2026-11-26-h100.md").read_text()
    rows = re.findall(r"^\| (LIT-\w+) / (\S+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for model, peer, cells in rows:
        inference, training, memory = (cell.replace(" x", "") for cell in cells.split(" | "))
        (row,) = re.findall(rf"^\| {model} / {peer} \| (.*) \|$", report, re.MULTILINE)
        speeds, *measured = row.split(" | ")
        assert [inference, training, memory] == [measured[0], measured[2], measured[4]]
        (images,) = re.findall(rf"^\| {model} \|(?:[^|]*\|){{3}} (\d+) \|", README, re.MULTILINE)
        assert images == speeds.split(" / ")[0]


def test_the_description_of_the_wheel_has_no_relative_links_and_no_html():
    """They are dead on a package index."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs/package.md").read_text(), flags=re.DOTALL)
    assert re.findall(r"\]\((?!https://)|<[a-z]", text) == []
