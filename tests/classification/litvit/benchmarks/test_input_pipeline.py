"""The files that the input pipeline is measured with."""

import statistics

from PIL import Image

from litvit.benchmarks.input_pipeline import write_photos


def test_photos_are_as_large_as_imagenets(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_photos(tmp_path / name, 6, (500, 375))
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert len({file.read_bytes() for file in first}) == 6
    assert {Image.open(file).size for file in first} == {(500, 375)}
    assert 80e3 < statistics.mean(file.stat().st_size for file in first) < 130e3
