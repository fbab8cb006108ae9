"""benchmark.py as a user runs it."""

import json
import os
from datetime import datetime, timedelta

import benchmark
import pytest
import timm
import torch
import validate
from PIL import Image

from litvit.runs.folder import save_weights

QUICK = ("--repeats", 1, "--threads", 1)
SIZES = ("--no-speed", "--threads", 1)


@pytest.fixture
def measure(run_main, tmp_path):
    """Run a subcommand in this process; return what it printed, and the rows of its JSON."""

    def run(*args):
        file = tmp_path / "figures.json"
        outcome = run_main(benchmark, *args, "--json", file)
        assert outcome.status == 0, outcome.err
        return outcome.out, json.loads(file.read_text())["rows"]

    return run


def test_dtm_adds_up_the_shapes(measure):
    out, (*rows, total) = measure("dtm", "--batch-size", 1, *QUICK)
    assert "| 96 x 56 x 56 -> 192 | forward |" in out
    assert "| sum | forward + backward |" in out
    assert len(rows) == 3
    for name in ("ours", "torchvision", "linear"):
        assert total["forward"][name] == pytest.approx(sum(row["forward"][name] for row in rows))
        assert total["forward"][name] > 0


def test_models_prints_a_table(measure):
    out, rows = measure("models", "published_lvt", "resnet10t", "--batch-size", 1, *QUICK)
    assert "| published_lvt | 5.52 | 0.89 |" in out
    assert [row["model"] for row in rows] == ["published_lvt", "resnet10t"]


def test_table1_puts_the_published_ratios_next_to_the_measured(measure):
    out, (lit, peer, other) = measure("table1", "lit_ti", "pvt_small", "resnet10t", "--batch-size", 1, *QUICK)
    assert lit["counterpart"] == peer["model"] == "pvt_small"
    for key in ("inference_images_per_second", "training_images_per_second"):
        assert lit["ratios"][key] == pytest.approx(lit[key] / peer[key])
    published = {"inference_images_per_second": 1294 / 1007, "training_memory": 5868 / 6996, "test_memory": 1194 / 1356}
    assert lit["published_ratios"] == pytest.approx(published)
    line = next(line for line in out.splitlines() if line.startswith("| lit_ti | 19.89 | 3.61 |"))
    assert f"{lit['ratios']['inference_images_per_second']:.2f} (1.29)" in line
    assert "ratios" not in other


@pytest.fixture(scope="module")
def report_of_validate(digits, tmp_path_factory):
    """Folder of a report that validate.py has written, of a small LIT on 40 digits."""
    folder = tmp_path_factory.mktemp("report")
    kwargs = {"dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
    model = timm.create_model("lit_ti", num_classes=10, img_size=32, **kwargs)
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "model_kwargs": kwargs}
    save_weights(folder / "weights.safetensors", model.state_dict(), description)
    flags = ["--checkpoint", folder / "weights.safetensors", "--report", folder, "--device", "cpu", "-j", 0]
    assert validate.main([str(digits), *map(str, flags)]) == 0
    return folder


@pytest.fixture
def write_result(report_of_validate, tmp_path):
    """Write what validate.py would have written of ImageNet, with changes; return the file."""

    def write(name, **changes):
        result = json.loads((report_of_validate / "result.json").read_text())
        assert result.pop("parameters") < 1e6  # of the small LIT
        result |= {"data": "/imagenet", "images": 50_000, "num_classes": 1000, "img_size": 224, **changes}
        file = tmp_path / name
        file.write_text(json.dumps(result))
        return file

    return write


def test_paper_puts_published_numbers_beside_those_it_counts(measure):
    out, rows = measure("paper", "--tables", 4, 2, 2, *SIZES)
    assert "| LIT-Ti | lit_ti | 19.89 (19) | 3.61 (3.6) | - (81.1) |" in out
    assert "| PVT-S, MSA in stages 2 to 4 | pvt_small_msa_no1 | 20.14 (20) | 4.45 (4.5) | - (80.8) |" in out
    assert out.index("## Table 2") < out.index("## Table 4")
    assert not any(text in out for text in ("Table 1", "Table 3", "images/s", "medians", "Results"))
    assert [row["model"] for row in rows[:4]] == ["lit_ti_plain", "lit_ti", "lit_s_plain", "lit_s"]
    assert rows[1]["published"]["macs"] == 3.6


def test_paper_times_a_model_beside_its_counterpart(measure):
    out, rows = measure("paper", "--tables", 2, "--batch-size", 1, *QUICK)
    plain, lit, *_ = rows
    assert lit["counterpart"] == "lit_ti_plain"
    for key in ("inference_images_per_second", "training_images_per_second"):
        assert lit["ratios"][key] == pytest.approx(lit[key] / plain[key])
    speed = f"{lit['inference_images_per_second']:.1f} | {lit['ratios']['inference_images_per_second']:.2f}"
    assert f"| lit_ti_plain | {speed} |" in out


def test_paper_shows_what_validate_has_found(measure, write_result, tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    write_result("report/result.json", model="lit_ti.in1k", checkpoint="pretrained", top1=81.084, real_top1=86.62)
    other = write_result("v|2.json", model="lit_ti", checkpoint="tiny.pth", top1=70.4, images=10_000, data="/v2")
    elsewhere = write_result("resnet.json", model="resnet18")  # in Table 1 alone
    out, rows = measure("paper", "--tables", 2, *SIZES, "--results", report, other, elsewhere)
    assert "| lit_ti | 19.89 (19) | 3.61 (3.6) | 81.08 (81.1) | 86.62 (86.6) | 70.40 (70.4) |" in out
    assert "| lit_s | 27.97 (27) | 4.08 (4.1) | - (81.5) | - (86.4) | - (70.4) |" in out
    assert f"| lit_ti | ImageNet-V2 | tiny.pth | {tmp_path}/v\\|2.json | /v2 |" in out
    origin = {"weights": "lit_ti.in1k", "file": f"{report}/result.json", "data": "/imagenet"}
    assert rows[1]["accuracies"]["top1"] == {"percent": 81.084, **origin}
    assert rows[3]["accuracies"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet34"}, "is a result of resnet34, which is in none of LIT's tables"),
        ({"num_classes": 10}, "is a result for 10 classes, not 1000"),
        ({"parameters": 5}, "is a result of another lit_ti, with other --model-kwargs"),
        ({"img_size": [224, 384]}, "is a result at [224, 384] pixels, not 224"),
        ({"flip": True}, "is a result with mirror images (--flip)"),
        ({"images": 40}, "is a result on 40 images, not on ImageNet's 50000 or ImageNet-V2's 10000"),
        ({"images": 10_000, "real_top1": 80.0}, "is a result on 10000 images with labels of ImageNet-Real"),
        ({"top1": None}, "top1 is null, not a percentage"),
        ({"real_top1": "86"}, 'real_top1 is "86", not a percentage'),
        ({"top1": 810.0}, "top1 is 810.0, not a percentage"),
    ],
)
def test_paper_refuses_results_that_do_not_belong_in_its_tables(run_main, write_result, tmp_path, changes, message):
    file = write_result("result.json", **changes)
    outcome = run_main(benchmark, "paper", *SIZES, "--results", file, "--output", tmp_path / "out")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {file}")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top1: 81.1", "is not JSON"),
        ("\N{DEGREE SIGN}".encode("latin-1"), "is not JSON"),
        ("[81.1]", "it lacks model, data, images, num_classes, img_size, top1"),
        ('{"rows": [], "model": "lit_ti"}', "it lacks data, images, num_classes, img_size, top1"),
    ],
)
def test_paper_refuses_files_that_are_no_results(run_main, tmp_path, text, message):
    file = tmp_path / "result.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = run_main(benchmark, "paper", *SIZES, "--results", file)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith(f"error: {file}")
    assert message in outcome.err


def test_paper_refuses_folders_without_a_result_and_two_results_of_one_model(run_main, write_result, tmp_path):
    outcome = run_main(benchmark, "paper", *SIZES, "--results", tmp_path)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"cannot read {tmp_path}/result.json: No such file" in outcome.err
    first, second = write_result("a.json"), write_result("b.json", model="lit_ti.in1k")
    outcome = run_main(benchmark, "paper", *SIZES, "--results", first, second)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"{first} and {second} are both ImageNet results of lit_ti" in outcome.err


def test_paper_writes_a_report_with_charts(run_main, write_result, tmp_path):
    folder = tmp_path / "new" / "report"
    results = write_result("result.json", model="lit_ti_plain", top1=80.1)
    outcome = run_main(benchmark, "paper", "--tables", 2, *SIZES, "--results", results, "--output", folder)
    assert outcome.status == 0, outcome.err
    assert sorted(file.name for file in folder.iterdir()) == ["ablations.png", "paper.json", "paper.md"]
    with Image.open(folder / "ablations.png") as picture:
        assert min(picture.size) >= 300
    text = (folder / "paper.md").read_text()
    assert outcome.out.strip() in text
    assert "(ablations.png)" in text
    assert len(json.loads((folder / "paper.json").read_text())["rows"]) == 4
    for name in ("speed.png", "notes.txt"):
        (folder / name).touch()
    assert run_main(benchmark, "paper", "--tables", 4, *SIZES, "--output", folder).status == 0
    assert sorted(file.name for file in folder.iterdir()) == ["ablations.png", "notes.txt", "paper.json", "paper.md"]
    assert "Table 2" not in (folder / "paper.md").read_text()


def test_paper_that_fails_leaves_no_folder(run_main, tmp_path):
    folder = tmp_path / "report"
    flags = ("--tables", 2, "--batch-size", 1, *QUICK)
    assert run_main(benchmark, "paper", *flags, "--compile", "fast", "--output", folder).status == 2
    assert not folder.exists()
    folder.touch()
    outcome = run_main(benchmark, "paper", *flags, "--output", folder)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"cannot write to '{folder}': File exists" in outcome.err


def test_models_can_be_compiled_and_run_in_half_precision(measure):
    out, rows = measure("models", "resnet10t", "-b", 1, "--compile", "eager", "--amp-dtype", "bfloat16", *QUICK)
    assert "autocast bfloat16, compiled eager" in out
    assert rows[0]["training_images_per_second"] > 0


def test_attention_compares_the_paths_in_both_late_stages(measure):
    out, rows = measure("attention", "--inputs", "1x64x64", "2x96x120", *QUICK)
    assert len(rows) == 8  # inputs x stages x passes
    assert "| 2 x 96 x 120 | stage 3, 12 heads, 6 x 8 | forward + backward |" in out
    assert all(row["milliseconds"].keys() == {"ours", "sdpa", "plain"} for row in rows)
    assert all(value > 0 for row in rows for value in row["milliseconds"].values())


def test_dense_pads_images_and_forces_a_path_of_attention(measure, run_main):
    models = ["lit_s:plain", "swin_tiny_patch4_window7_224", "resnet10t"]
    out, rows = measure("dense", *models, "--inputs", "1x64x100", *QUICK)
    assert [row["model"] for row in rows] == models
    assert all(row["input"] == "1 x 64 x 128" for row in rows)
    ratio = rows[2]["milliseconds"] / rows[0]["milliseconds"]
    assert f"| 1 x 64 x 128 | lit_s:plain | {rows[0]['milliseconds']:.1f} | {ratio:.2f} |" in out
    outcome = run_main(benchmark, "dense", "lit_s:fast", "--inputs", "1x64x64", *QUICK)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "must be one of plain, sdpa, triton" in outcome.err
    assert "LIT_ATTENTION" not in os.environ


@pytest.mark.parametrize("model", ["lit_ti", "lvt"])
def test_data_times_the_steps_of_the_input_pipeline(measure, model):
    out, rows = measure("data", "--model", model, "--images", 4, "--image-size", "120x90", "--repeats", 1)
    for pipeline in ("training", "evaluation"):
        steps = {row["step"]: row["milliseconds"] for row in rows if row["pipeline"] == pipeline}
        whole = steps.pop("all")
        assert sum(steps.values()) == pytest.approx(whole)
        assert steps["decode"] > 0
    assert f"| {whole:.3f} | 100% | {1000 / whole:.0f} |" in out
    augments = any(row["step"] == "RandAugment" for row in rows)
    assert augments


def test_the_command_names_machine_and_versions(run_script, tmp_path):
    file = tmp_path / "figures.json"
    outcome = run_script(
        "benchmark.py", "attention", "--inputs", "1x32x32", *QUICK, "--json", file, LIT_ATTENTION="plain"
    )
    assert outcome.status == 0, outcome.err
    figures = json.loads(file.read_text())
    assert outcome.out.splitlines()[0] == figures["environment"]
    assert f"torch {torch.__version__}" in figures["environment"]
    assert "LIT_ATTENTION=plain" in figures["environment"]
    assert {row["chosen"] for row in figures["rows"]} == {"plain"}
    assert figures["command"].startswith("benchmark.py attention --inputs 1x32x32 ")
    assert datetime.fromisoformat(figures["date"]).utcoffset() == timedelta()


@pytest.mark.parametrize(
    ("subcommand", "text"),
    [
        ((), "medians"),
        (("paper",), "ImageNet-V2"),
        (("table1",), "LIT-S and LITv2-S / Swin-Ti"),
        (("models",), "published_lvt"),
        (("dtm",), "linear merge"),
        (("attention",), '"sdpa"'),
        (("dense",), "NAME:sdpa"),
        (("data",), "JPEG"),
    ],
)
def test_help_says_what_is_compared(run_main, subcommand, text):
    outcome = run_main(benchmark, *subcommand, "--help")
    assert outcome.status == 0
    assert text in outcome.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["models", "lit_z"], "unknown model 'lit_z'"),
        (["paper", "--tables", "5"], "invalid choice: 5 (choose from 1, 2, 3, 4)"),
        (["paper", "--tables", "two"], "argument --tables: expected at least one argument"),
        (["dtm", "--batch-size", "abc"], "'abc' is not a whole number above 0"),
        (["dtm", "--device", "tpu9"], "'tpu9'"),
        (["dtm", "--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
        (["dtm", "--json", "/"], "cannot write /: Is a directory"),
        (["attention", "--inputs", "1x64"], "'1x64' is not IMAGESxHEIGHTxWIDTH"),
        (["dense", "swin_z"], "unknown model 'swin_z'"),
        (
            ["dense", "lit_s:fast", "-i", "1x64x64"],
            "lit_s:fast: the path of attention must be one of",
        ),
        (["dense", "lit_ti:sdpa", "-i", "1x64x64"], "lit_ti:sdpa: lit_ti has no path of attention to choose"),
        (["attention", "-i", "1000x40000x40000"], "the memory is too small"),
        (["dtm", "--tf32", "--device", "cpu"], "--tf32 is for GPUs"),
        (["data", "--images", "3"], "--images must be even"),
        (["models", "vit_tiny_patch16_384"], "vit_tiny_patch16_384 is no classifier of images of 224 x 224"),
        (["models", "--dtype", "bfloat16", "--amp-dtype", "float16"], "--amp-dtype float16 is for --dtype float32"),
        (["data", "--image-size", "500"], "'500' is not WIDTHxHEIGHT"),
        (["data", "--model", "lit_z", "--images", "2"], "unknown model 'lit_z'"),
        (["models", "resnet10t", "--compile", "fast"], "--compile fast: torch has no such backend"),
    ],
)
def test_wrong_input_is_one_line(run_main, args, message):
    outcome = run_main(benchmark, *args)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_measurement_that_fails_leaves_no_file_and_spoils_none(run_main, tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("figures")
    for file in (new, old):
        assert run_main(benchmark, "models", "lit_z", "--json", file).status == 2
    assert not new.exists()
    assert old.read_text() == "figures"
