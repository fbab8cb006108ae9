"""benchmark.py as a user runs it."""

import json
import os
from datetime import datetime, timedelta

import benchmark
import pytest
import torch

QUICK = ("--repeats", 1, "--threads", 1)


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
        (("table1",), "LIT-S / Swin-Ti"),
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
