"""Images of torchvision's data sets as a folder."""

from PIL import Image
from torchvision.datasets import FakeData

from litvit.data.readers import open_train_and_val
from litvit.studies.cifar10 import write_images
from litvit.studies.plan import read_study


def test_images_of_torchvision_become_a_folder_that_trains(tmp_path, small_study):
    classes = ["cat", "dog", "frog"]
    for split in ("train", "val"):
        write_images(tmp_path / split, FakeData(12, (3, 32, 32), len(classes)), classes)
    config = read_study(str(small_study())).configs(str(tmp_path))["A"]
    train, val, _ = open_train_and_val(config.data)
    assert len(train) == len(val) == 12
    image, label = FakeData(12, (3, 32, 32), len(classes))[7]
    written = Image.open(tmp_path / "val" / classes[label] / "00007.png")
    assert written.tobytes() == image.tobytes()
