"""Augmentations of the user's own: used, checked, and told apart."""

import pickle

import pytest
from PIL import Image

from litvit.data import augment
from litvit.data.augment import AugmentConfig, TrainTransform, register_augmentation
from litvit.errors import InputError

IMAGE = Image.new("RGB", (48, 40), (200, 30, 30))
NORMALISATION = (0.5,) * 3, (0.5,) * 3


@pytest.fixture(autouse=True)
def _no_other_augmentations(monkeypatch):
    monkeypatch.setattr(augment, "AUGMENTATIONS", {})


def transform(name):
    return TrainTransform(AugmentConfig(aa=name, color_jitter=0.9, hflip=0.0), (3, 32, 32), *NORMALISATION)


def test_it_takes_the_place_of_timms_colours():
    @register_augmentation
    def blue():
        return lambda image: Image.new(image.mode, image.size, (0, 0, 255))

    pixels = transform("blue")(IMAGE).pixels
    assert pixels.flatten(1).unique(dim=1).tolist() == [[0], [0], [255]]


@pytest.mark.parametrize(
    "wrong", [lambda image: image.resize((9, 9)), lambda image: image.convert("L"), lambda image: None]
)
def test_another_size_or_mode_is_a_bug_that_names_it(wrong):
    @register_augmentation
    def own():
        return wrong

    with pytest.raises(TypeError, match=r"the augmentation own has returned .*, not an image of \(\(32, 32\), 'RGB'\)"):
        transform("own")(IMAGE)


def test_a_name_stands_for_one_augmentation():
    def first():
        return lambda image: image

    register_augmentation(first)
    register_augmentation(first)

    def other():
        return lambda image: image

    other.__name__ = "first"
    with pytest.raises(ValueError, match="two augmentations are called first"):
        register_augmentation(other)


def test_an_unknown_name_is_one_line():
    for name in ("grey", "rand_grey"):
        with pytest.raises(InputError, match=f"--aa {name} is neither a policy of timm nor registered by a module"):
            transform(name)


def grey():
    return lambda image: image.convert("L").convert(image.mode)


def test_it_reaches_loader_processes_that_are_started_afresh():
    register_augmentation(grey)
    augmentation = transform("grey").colours[0]
    assert pickle.loads(pickle.dumps(augmentation))(IMAGE).tobytes() == augmentation(IMAGE).tobytes()


@pytest.mark.parametrize(
    "policy",
    ["rand-foo", "rand-m9-mstd", "rand-m9-xyz5", "rand-tfoo", "original-foo", "augmix-q", "v1", "random", "rand-m9-"],
)
def test_unknown_policies_are_refused(policy):
    with pytest.raises(InputError, match=f"--aa {policy}"):
        TrainTransform(AugmentConfig(aa=policy), (3, 32, 32), [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    "policy",
    ["rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.5-mmax15-tweights", "original-mstd0.5", "v0r", "augmix-m5-w4"],
)
def test_policies_of_timm(policy):
    TrainTransform(AugmentConfig(aa=policy), (3, 32, 32), [0.5] * 3, [0.5] * 3)
