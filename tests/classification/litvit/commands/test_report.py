"""litvit report: the page of a run, made by the run itself and again, and the page that compares runs."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from litvit.commands import report, train
from litvit.errors import InputError

PANELS = (
    *("Loss", "Accuracy", "Learning rate", "Gradient norm", "Speed", "Peak memory"),
    *("How far token merging looks", "Where the time goes"),
)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's headings, texts and tables; every element must be closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.tags, self.sources = [], [], [], []
        self.html = path.read_text(encoding="ascii")
        self.feed(self.html)
        assert self.open == []
        for svg in re.findall("<svg.*?</svg>", self.html, re.DOTALL):
            ElementTree.fromstring(svg)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [text.strip() for name, text in self.texts if name == tag]


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A function that makes a copy of what a run's page is made of, under another name."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in undisturbed.iterdir():
            if file.suffix in (".csv", ".yaml", ".json", ".html"):
                shutil.copy(file, folder)
        return folder

    return make


def test_a_run_leaves_a_page_of_its_own(undisturbed):
    page = Page(undisturbed / "report.html")
    headings = page.all("h3")
    assert [name for name in PANELS if name in headings] == list(PANELS)
    assert {"Confusion matrix", "Classes", "Most confident mistakes"} <= set(headings)
    assert {"What the model gets", "Settings", "Starts", "All numbers"} <= set(page.all("h2"))
    assert "2 of 2 epochs" in page.html
    assert all(source.startswith("data:") for source in page.sources)
    assert "script" not in page.tags
    with open(undisturbed / "summary.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert any(f"top-1: {float(row['eval_top1']):.4g} %" in text for text in page.all("title"))
    seconds = [float(value) for name, value in row.items() if name.startswith("train_seconds_")]
    assert 0 < sum(seconds) <= 80 / float(row["train_images_per_second"]) * 1.001
    assert float(row["train_grad_norm"]) > 0
    assert float(row["eval_offset_px_1"]) > 0


def test_the_first_batch_and_the_best_validation(undisturbed):
    batch = json.loads((undisturbed / "first_batch.json").read_text())
    assert batch["size"] == [32, 32]
    assert len(batch["images"]) == 20
    labels = [image["labels"] for image in batch["images"]]
    assert all(name in "0123456789" for image in labels for name, _ in image)
    assert any(len(image) == 2 for image in labels)  # mixup
    best = json.loads((undisturbed / "best_validation.json").read_text())
    assert sum(map(sum, best["confusion"])) == best["images"] == 40
    assert sum(line[number] for number, line in enumerate(best["confusion"])) == round(best["top1"] * 0.4)
    assert len(best["mistakes"]) == min(24, 40 - round(best["top1"] * 0.4))
    assert all(mistake["class"] != mistake["predicted"] for mistake in best["mistakes"])


def test_of_two_processes(undisturbed_pair):
    best = json.loads((undisturbed_pair / "best_validation.json").read_text())
    assert [sum(line) for line in best["confusion"]] == [4] * 10
    assert "Most confident mistakes" in Page(undisturbed_pair / "report.html").all("h3")


def test_the_page_of_a_run_is_made_again(undisturbed, copy, capsys):
    run = copy(undisturbed.name)
    old = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert report.main([str(run)]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    new = (run / "report.html").read_text()
    assert new.partition("Written on")[0] == old.partition("Written on")[0]


def test_a_run_of_an_older_version(copy):
    run = copy("old")
    for name in ("first_batch.json", "best_validation.json", "starts.yaml", "report.html"):
        (run / name).unlink()
    (run / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\r\n0,2,2,10,50,1\r\n1,1,2,20,60,nan\r\n"
    )
    assert report.main([str(run), "--output", str(run / "page.html")]) == 0
    page = Page(run / "page.html")
    assert set(page.all("h3")) & set(PANELS) == {"Loss", "Accuracy", "Learning rate"}
    assert "20.00 (epoch 2)" in page.html
    assert "What the model gets" not in page.html


def test_a_run_without_an_epoch(copy):
    run = copy("new")
    (run / "summary.csv").unlink()
    assert report.main([str(run)]) == 0
    assert "No epoch is trained yet." in (run / "report.html").read_text()


def test_runs_are_compared(copy, tmp_path, monkeypatch, capsys):
    first, second = copy("first"), copy("second")
    settings = yaml.safe_load((second / "settings.yaml").read_text())
    (second / "settings.yaml").write_text(yaml.safe_dump(settings | {"lr": 0.5, "imports": ["a<b"]}))
    (second / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n1,2,2,99,100,1\n")
    monkeypatch.chdir(tmp_path)
    assert report.main([str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^best top-1 % .* 99.00 \(epoch 1\)$", out, re.MULTILINE)
    assert re.search(r"^lr +0.002 +0.5$", out, re.MULTILINE)
    assert "report: comparison.html" in out
    differing = out.partition("what differs:\n")[2]
    assert "\nseed" not in differing
    page = Page(tmp_path / "comparison.html")
    assert {"lr", "imports", "trained", "best top-1 %"} <= set(page.all("th"))
    assert "a&lt;b" in page.html
    assert {"Accuracy: top-1", "Loss: validation", "Gradient norm", "Learning rate"} <= set(page.all("h3"))


def test_runs_of_one_name_are_told_apart(copy, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    one, two = copy("run"), copy("a/run")
    assert report.main([str(one), str(two), "--output", str(tmp_path / "page.html")]) == 0
    assert str(two) in Page(tmp_path / "page.html").all("th")


def test_all_text_stays_text(copy):
    evil = "<script>alert(1)</script>\udcff&"
    run = copy("text")
    best = json.loads((run / "best_validation.json").read_text())
    best["classes"][0] = best["per_class"][0]["class"] = best["mistakes"][0]["name"] = evil
    (run / "best_validation.json").write_text(json.dumps(best))
    batch = json.loads((run / "first_batch.json").read_text())
    batch["images"][0]["labels"] = [[evil, 1.0]]
    (run / "first_batch.json").write_text(json.dumps(batch))
    (run / "settings.yaml").write_text(yaml.safe_dump({"model": "<b>$body", "<i>": {"<u>": ["<s>"]}}))
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert {"script", "b", "i", "u", "s"} & set(page.tags) == {"b"}  # the figures' own
    assert page.html.count("&lt;script&gt;") >= 4
    assert "&lt;b&gt;$body" in page.html


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.csv", b"\xff\xfe"),
        ("settings.yaml", b"- 1"),
        ("settings.yaml", b"a: ["),
        ("starts.yaml", b"\xff"),
        ("starts.yaml", b"- text"),
        ("first_batch.json", b"{"),
        ("first_batch.json", b'{"images": [{"picture": "http://x", "labels": [["a", 1]]}]}'),
        ("best_validation.json", b'{"confusion": 3}'),
        (
            "best_validation.json",
            b'{"epoch": 1, "top1": 1, "images": 1, "classes": ["a"], "confusion": [[1, 2], [3, 4]]}',
        ),
    ],
)
def test_a_damaged_file_is_left_out(copy, name, content):
    run = copy("damaged")
    (run / name).write_bytes(content)
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert f"{name} cannot be read, and its part is left out" in page.html
    assert "http:" not in page.html
    assert "Settings" in page.html or name == "settings.yaml"


def test_wrong_input_is_one_line(copy, tmp_path):
    run = copy("run")
    with pytest.raises(InputError, match="none holds no run of litvit train .*, detection or segmentation"):
        report.main([str(run), str(tmp_path / "none")])
    with pytest.raises(InputError, match=r"run/\.\./run is named twice"):
        report.main([str(run), str(run / "../run")])
    with pytest.raises(InputError, match=r"--output .* is a folder: name a file"):
        report.main([str(run), "--output", str(tmp_path)])
    with pytest.raises(InputError, match="cannot write .*page.html: No such file"):
        report.main([str(run), "--output", str(tmp_path / "none/page.html")])


def test_more_classes_than_folders_and_a_run_with_more_epochs(tmp_path, digits, tiny_flags):
    run = tmp_path / "runs/run"
    more = ["--num-classes", "12", "--output", str(run.parent), "--experiment", run.name, "--epochs", "1"]
    assert train.main([str(digits), *tiny_flags, *more]) == 0
    assert "All as in the recipe" not in (run / "report.html").read_text()  # the flags of the test are others
    best = json.loads((run / "best_validation.json").read_text())
    assert best["classes"] == [*map(str, range(12))]
    assert [sum(line) for line in best["confusion"]] == [4] * 10 + [0] * 2
    for mistake in best["mistakes"]:
        assert mistake["name"].partition("/")[0] == mistake["class"]
    assert train.main([str(digits), "--resume", str(run), "--epochs", "2"]) == 0
    changed = (run / "report.html").read_text().partition("<h2>Settings")[2].partition("<details")[0]
    assert "epochs" in changed


def test_a_page_goes_to_standard_output(undisturbed, tmp_path):
    command = [sys.executable, "-m", "litvit", "report", str(undisturbed), "--output", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "<!doctype html>" in done.stdout.lower()


EVIL = "<script>alert(1)</script>"


@pytest.fixture
def work_dir(tmp_path):
    """A function that writes the logs of a start of mmengine into a work dir, and returns that."""

    def write(name, start, *lines, config="train_cfg = dict(max_epochs=3)\n"):
        data = tmp_path / name / start / "vis_data"
        data.mkdir(parents=True)
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (data / "scalars.json").write_text("".join(f"{text}\n" for text in texts))
        (data / "config.py").write_text(config)
        return tmp_path / name

    return write


def step(iteration, epoch=None, **values):
    loss = {
        "lr": 0.1,
        "data_time": 0.2,
        "grad_norm": 3.0,
        "loss": 2.0,
        "loss_cls": 1.5,
        "loss_bbox": 0.5,
        "time": 0.5,
        "memory": 900,
    }
    place = {"iter": iteration, "step": iteration} | ({} if epoch is None else {"epoch": epoch})
    return loss | values | place


def points(page, title):
    """Return the texts of a panel's points."""
    panel = page.html.partition(f"<h3>{title}")[2].partition("</section>")[0]
    return re.findall("<title>(.*?)</title>", panel, re.DOTALL)


def test_a_detection_run(work_dir):
    metrics = {"coco/bbox_mAP": 0.25, "coco/bbox_mAP_s": -1.0, "coco/segm_mAP": 0.2, "data_time": 0.1, "time": 0.2}
    classes = {"coco/cat_precision": 0.4, "coco/a/b_precision": 0.1, f"coco/{EVIL}_precision": float("nan")}
    better = metrics | {"coco/bbox_mAP": 0.5}
    run = work_dir(
        *("detection", "20260101_000000", step(50, 1), metrics | {"step": 1}, step(100, 2, loss=1.0)),
        better | classes | {"step": 2},
    )
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    titles = {"Loss", "Parts of the loss", "Learning rate", "Gradient norm", "Time per iteration", "Peak memory"}
    assert titles | {"coco bbox", "coco segm", "Classes"} <= set(page.all("h3"))
    assert "iteration 100, epoch 2 of 3" in page.html
    assert points(page, "Loss") == ["iteration 50\nloss: 2", "iteration 100\nloss: 1"]
    assert points(page, "coco bbox") == ["epoch 1\nmAP: 0.25", "epoch 2\nmAP: 0.5"]
    assert "0.5 (epoch 2)" in page.html
    assert [cell for cell in page.all("td") if cell in ("a/b", "cat", EVIL)] == ["a/b", "cat", EVIL]
    assert "script" not in page.tags
    assert all(source.startswith("data:") for source in page.sources)


def test_a_segmentation_run(work_dir):
    config = "model = {'type': '<b>', 'heads': [dict(a=1), dict(a=print('no'))]}\ntrain_cfg = dict(max_iters=80)\n"
    last = {"aAcc": 70.0, "mIoU": 35.0, "IoU.sky": 55.0, "Acc.sky": 60.0, "IoU.sea": 15.0, "Acc.sea": 20.0, "step": 80}
    logs = [step(40), {"aAcc": 60.0, "mIoU": 30.0, "step": 40}, step(80, **{"decode.acc_seg": 50.0}), last]
    run = work_dir("segmentation", "20260101_000000", *logs, config=config)
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert "iteration 80 of 80" in page.html
    assert points(page, "Metrics")[-1] == "iteration 80\naAcc: 70\nmIoU: 35"
    assert {"decode.acc_seg", "Classes"} <= set(page.all("h3"))
    cells = page.all("td")
    assert cells.index("sea") < cells.index("sky")
    assert {"IoU", "Acc", "model.heads.1.a"} <= set(page.all("th"))
    assert "print('no')" in cells
    assert "&lt;b&gt;, iteration 80" in page.html


def test_a_resumed_run_shows_each_step_once(work_dir):
    metric = {"coco/bbox_mAP": 0.1}
    first = [step(50, 1), metric | {"step": 1}, step(100, 2), step(150, 2), metric | {"step": 2}, step(200, 3)]
    work_dir("run", "20260101_000000", *first)
    again = [step(150, 2, loss=7.0), {"coco/bbox_mAP": 0.3, "step": 2}]
    run = work_dir("run", "20260102_000000", *again)
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert points(page, "Loss") == [f"iteration {place}\nloss: {loss}" for place, loss in ((50, 2), (100, 2), (150, 7))]
    assert points(page, "coco bbox") == ["epoch 1\nmAP: 0.1", "epoch 2\nmAP: 0.3"]
    assert "20260101_000000" in page.html
    validations = page.html.partition("<summary>Validations")[2].partition("</table>")[0]
    assert validations.count("<tr>") == 1 + 2


def test_a_validation_that_was_done_again_is_shown_once(work_dir):
    work_dir("run", "20260101_000000", step(50), {"mIoU": 10.0, "step": 60})
    run = work_dir("run", "20260102_000000", {"mIoU": 11.0, "step": 60})
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert points(page, "Metrics") == ["iteration 60\nmIoU: 11"]
    validations = page.html.partition("<summary>Validations")[2].partition("</table>")[0]
    assert validations.count("<tr>") == 1 + 1


def test_validations_of_iterations_that_are_logged_as_epoch_0(work_dir):
    metric = {"coco/bbox_mAP": 0.1, "step": 0}
    run = work_dir("run", "20260101_000000", step(50), metric, step(100), metric)
    assert report.main([str(run)]) == 0
    assert points(Page(run / "report.html"), "coco bbox") == ["iteration 50\nmAP: 0.1", "iteration 100\nmAP: 0.1"]


@pytest.mark.parametrize(
    "line",
    [
        *("{", "3", "[" * 100_000, "\x00", '{"iter": "a", "step": 1}', '{"mIoU": 3}', '{"iter": true}'),
        *(
            '{"iter": -1}',
            '{"iter": 1e400}',
            '{"iter": 60, "epoch": NaN}',
            '{"iter": 1000000000000000000000, "loss": 1}',
            '{"iter": 3, "loss": 1' + 400 * "0" + "}",
        ),
    ],
)
def test_a_damaged_line_is_left_out(work_dir, line, capsys):
    run = work_dir("run", "20260101_000000", step(50, 1), line, step(100, 1))
    assert report.main([str(run)]) == 0
    assert "1 line of 20260101_000000/vis_data/scalars.json cannot be read" in capsys.readouterr().err
    page = Page(run / "report.html")
    assert len(points(page, "Loss")) == 2
    assert "1 line of" in page.html


@pytest.mark.parametrize("config", ["a = (", "\x00"])
def test_a_damaged_config_is_left_out(work_dir, config):
    run = work_dir("run", "20260101_000000", step(50, 1), config=config)
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert "config.py cannot be read" in page.html
    assert "Settings" not in page.all("h2")


def test_the_pictures_that_mmengine_has_drawn(work_dir):
    run = work_dir("run", "20260101_000000", step(50, 1))
    folder = run / "20260101_000000/vis_data/vis_image"
    folder.mkdir()
    Image.new("RGB", (8, 4)).save(folder / "val <i>_1.png")
    (folder / "val_2.png").write_bytes(b"cut off")
    assert report.main([str(run)]) == 0
    page = Page(run / "report.html")
    assert page.all("figcaption") == ["val <i>_1"]
    assert len(page.sources) == 2


def test_a_run_of_mmengine_without_logs(work_dir):
    run = work_dir("run", "20260101_000000")
    (run / "last.pth").touch()
    assert report.main([str(run)]) == 0
    assert "Nothing is logged yet." in (run / "report.html").read_text()


def test_runs_of_mmengine_are_compared(work_dir, copy, tmp_path, capsys):
    metric = {"coco/bbox_mAP": 0.1, "step": 1}
    one = work_dir("one", "20260101_000000", step(50, 1), metric)
    two = work_dir("two", "20260101_000000", step(50, 1), metric, config="train_cfg = dict(max_epochs=9)\n")
    assert report.main([str(one), str(two), str(copy("three")), "--output", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^best coco/bbox_mAP +0.1 \(epoch 1\) +0.1", out, re.MULTILINE)
    assert re.search(r"^train_cfg.max_epochs +3 +9", out, re.MULTILINE)
    titles = Page(tmp_path / "page.html").all("h3")
    assert {"Training: loss", "Validation: coco/bbox_mAP", "Accuracy: top-1"} <= set(titles)
