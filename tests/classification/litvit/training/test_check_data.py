"""Every image of a data set decoded once, before a run needs it."""

import re

from PIL import Image

from litvit.training import check_data


def test_check_data_lists_what_cannot_be_decoded(digits_copy, run_main):
    assert run_main(check_data, digits_copy, "-j", 1).status == 0
    Image.new("RGB", (9, 9)).save(digits_copy / "val" / "3" / "half.jpg")
    content = (digits_copy / "val" / "3" / "half.jpg").read_bytes()
    (digits_copy / "val" / "3" / "half.jpg").write_bytes(content[: len(content) // 2])
    outcome = run_main(check_data, digits_copy, "-j", 1)
    assert outcome.status == 1
    assert re.search(r"cannot read the image .*val/3/half.jpg", outcome.out)
    assert "80 + 41 images in 10 classes: 1 cannot be decoded" in outcome.out
