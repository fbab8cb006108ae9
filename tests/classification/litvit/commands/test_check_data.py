"""Every image of a data set decoded once, before a run needs it."""

import io
import os
import re
import tarfile

import numpy as np
from PIL import Image

from litvit.commands import check_data


def test_check_data_lists_what_cannot_be_decoded(digits_copy, run_main):
    assert run_main(check_data, digits_copy, "-j", 1).status == 0
    Image.new("RGB", (9, 9)).save(digits_copy / "val" / "3" / "half.jpg")
    content = (digits_copy / "val" / "3" / "half.jpg").read_bytes()
    (digits_copy / "val" / "3" / "half.jpg").write_bytes(content[: len(content) // 2])
    outcome = run_main(check_data, digits_copy, "-j", 1)
    assert outcome.status == 1
    assert re.search(r"cannot read the image .*val/3/half.jpg", outcome.out)
    assert "80 + 41 images in 10 classes: 1 cannot be decoded" in outcome.out


def test_check_data_tells_what_is_left_out_scaled_and_turned(digits_copy, run_main):
    values = np.full((9, 9), 30000, np.uint16)
    Image.fromarray(values).save(digits_copy / "train" / "3" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 9)).save(digits_copy / "val" / "4" / "turned.jpg", exif=exif)
    damaged = digits_copy / "val" / "4" / "damaged.png"  # a sound image, whose EXIF data cannot be read
    Image.new("RGB", (9, 9)).save(damaged, exif=b"garbagegarbage")
    Image.new("RGB", (9, 9)).save(digits_copy / "val" / "4" / "upright.tif", exif=exif)  # Pillow turns it itself
    (digits_copy / "val" / "4" / ".DS_Store").touch()
    (digits_copy / "val" / "4" / "notes.txt").touch()
    outcome = run_main(check_data, digits_copy, "-j", 0)
    assert outcome.status == 1
    assert re.search(r"1 images have 16 bits per pixel, which are scaled to 8: .*train/3/deep.png", outcome.out)
    assert re.search(r"1 images are photographs that are not stored upright .*: .*val/4/turned.jpg", outcome.out)
    assert "val: left out 1 hidden files and folders: 4/.DS_Store" in outcome.out
    assert "val: left out 1 files that are not images (.txt): 4/notes.txt" in outcome.out
    assert "81 + 43 images in 10 classes: 0 cannot be decoded" in outcome.out
    (digits_copy / "train" / "3" / "deep.png").unlink()
    assert run_main(check_data, digits_copy, "-j", 0).status == 0
    assert "photographs" not in run_main(check_data, digits_copy, "-j", 0, "--exif-transpose").out


def test_check_data_prints_names_that_are_not_text(digits_copy, run_script):
    for name in (os.fsdecode(b"broken\xff.jpg"), "new\nline.jpg"):
        (digits_copy / "train" / "3" / name).write_bytes(b"no image")
    command = ("litvit/__main__.py", "check-data", digits_copy, "-j", 0)
    outcome = run_script(*command, PYTHONIOENCODING="utf-8:strict")
    assert outcome.status == 1
    assert r"train/3/broken\xff.jpg (no format" in outcome.out
    assert r"train/3/new\nline.jpg (no format" in outcome.out


def test_check_data_reads_streams(digits, tmp_path, run_main):
    image = next((digits / "train").rglob("*.png")).read_bytes()
    with tarfile.open(tmp_path / "both-0000.tar", "w") as tar:
        for key, suffix, content in (("a", "png", image), ("a", "cls", b"0"), ("b", "png", b"no"), ("b", "cls", b"1")):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    split = "both-{0000..0000}.tar"
    flags = ["--dataset", "wds/x", "--train-split", split, "--val-split", split, "--num-classes", 2]
    outcome = run_main(check_data, tmp_path, *flags, "--train-num-samples", 3, "-j", 1)
    assert outcome.status == 1
    assert outcome.out.count("cannot read the image b of ") == 2
    assert f"{split}: there are 2 images, not the 3 that are announced" in outcome.out
    assert "2 + 2 images in 2 classes: 2 cannot be decoded" in outcome.out
