import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_dilation, binary_erosion
from sklearn.datasets import load_digits

from litvit import demo_data
from litvit.demo_data import SceneSettings, Settings, build, draw_scene, source_digits
from litvit.demo_data.__main__ import main
from litvit.demo_data.layouts import TASKS
from litvit.errors import InputError

SMALL = Settings(train_per_class=3, val_per_class=2, image_size=48)
DETECTION = SceneSettings("detection", train=6, val=3, image_size=96)
SEGMENTATION = SceneSettings("segmentation", train=6, val=3, image_size=96)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def scenes(count: int = 40, digits: int = 1, size=(64, 64), scale=(0.7, 1.0)):
    val = source_digits(0)["val"]
    for seed in range(count):
        rng = np.random.default_rng(seed)
        labels = rng.integers(10, size=digits)
        yield labels.tolist(), draw_scene(rng, [(int(label), val[label][seed % 30]) for label in labels], size, scale)


def test_splits_hold_every_real_digit_once():
    splits = source_digits(3)
    data = load_digits()
    for label in range(10):
        train, val = splits["train"][label], splits["val"][label]
        both = np.concatenate([train, val]) * 16
        assert 0.18 < len(val) / len(both) < 0.22
        assert sorted(map(bytes, both)) == sorted(map(bytes, data.images[data.target == label]))
    assert not np.array_equal(source_digits(4)["val"][0], splits["val"][0])


def test_image_folder_layout(tmp_path):
    assert build(tmp_path / "new" / "demo", SMALL)
    for split, count in (("train", 3), ("val", 2)):
        classes = sorted((tmp_path / "new" / "demo" / split).iterdir())
        assert [folder.name for folder in classes] == list("0123456789")
        assert all(len(list(folder.glob("*.png"))) == count for folder in classes)
    with Image.open(tmp_path / "new" / "demo" / "train" / "7" / "00002.png") as image:
        assert (image.size, image.mode) == ((48, 48), "RGB")
        assert np.asarray(image).std() > 10


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    build(folder, DETECTION)
    return folder


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ade")
    build(folder, SEGMENTATION)
    return folder


def test_coco_instances(coco):
    drawn = []
    for split, count in (("train", 6), ("val", 3)):
        truth = COCO(coco / "annotations" / f"instances_{split}2017.json")
        assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list("0123456789")
        assert truth.getImgIds() == list(range(1, count + 1))
        assert truth.getAnnIds() == list(range(1, len(truth.anns) + 1))
        assert {path.name for path in (coco / f"{split}2017").iterdir()} == {
            image["file_name"] for image in truth.imgs.values()
        }
        for number in range(count):
            scene = DETECTION.scene(split, number)
            with Image.open(coco / f"{split}2017" / truth.imgs[number + 1]["file_name"]) as image:
                assert (image.size, image.format) == ((128, 96), "JPEG")
                assert np.abs(np.asarray(image, dtype=float) - scene.image).mean() < 5
            annotations = truth.imgToAnns[number + 1]
            assert 2 <= len(annotations) == len(scene.objects) <= 5
            for annotation, thing in zip(annotations, scene.objects, strict=True):
                left, top, right, bottom = thing.box
                assert annotation["category_id"] == thing.label + 1
                assert annotation["bbox"] == [left, top, right - left, bottom - top]
                assert annotation["area"] == thing.mask.sum()
                assert np.array_equal(truth.annToMask(annotation), thing.mask)
            drawn.append(scene.image.tobytes())
    assert len(set(drawn)) == 9


def test_coco_panoptic(coco):
    for split, count in (("train", 6), ("val", 3)):
        truth = json.loads((coco / "annotations" / f"panoptic_{split}2017.json").read_text())
        categories = [(category["id"], category["name"], category["isthing"]) for category in truth["categories"]]
        names = (*demo_data.CLASSES, *demo_data.BACKGROUNDS)
        assert categories == [(i, name, int(i <= 10)) for i, name in enumerate(names, 1)]
        for number, (image, annotation) in enumerate(zip(truth["images"], truth["annotations"], strict=True)):
            scene = DETECTION.scene(split, number)
            assert image["id"] == annotation["image_id"] == number + 1
            assert Path(image["file_name"]).stem == Path(annotation["file_name"]).stem
            with Image.open(coco / "annotations" / f"panoptic_{split}2017" / annotation["file_name"]) as png:
                ids = np.asarray(png).astype(int) @ [1, 256, 65536]
            label = np.full(ids.shape, -1)
            for segment in annotation["segments_info"]:
                mask = ids == segment["id"]
                rows, columns = np.nonzero(mask)
                left, top, width, height = segment["bbox"]
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
                assert segment["area"] == mask.sum()
                label[mask] = segment["category_id"] - 1
            expected = scene.background + 10
            for thing in scene.objects:
                expected[thing.mask] = thing.label
                assert len(np.unique(ids[thing.mask])) == 1
            assert np.array_equal(label, expected)
            assert len(annotation["segments_info"]) == len(np.unique(ids)) > len(scene.objects)
        assert number + 1 == count


def test_ade20k(ade):
    assert (*demo_data.BACKGROUNDS, *demo_data.CLASSES) == demo_data.SEGMENTATION_CLASSES
    for split, folder, count in (("train", "training", 6), ("val", "validation", 3)):
        images, labels = (sorted((ade / kind / folder).iterdir()) for kind in ("images", "annotations"))
        assert [path.name for path in labels] == [path.stem + ".png" for path in images]
        assert len(images) == count
        for number in range(count):
            scene = SEGMENTATION.scene(split, number)
            with Image.open(labels[number]) as png:
                assert png.mode == "P"
                label, colours = np.asarray(png), np.asarray(png.convert("RGB"))
            strokes = np.any([thing.mask for thing in scene.objects], axis=0)
            # The pixels around a stroke are mixed of its colour and the background's.
            unlabelled = binary_dilation(strokes, np.ones((3, 3))) & ~strokes
            expected = np.where(unlabelled, 0, scene.background + 1)
            for thing in scene.objects:
                expected[thing.mask] = 5 + thing.label
            assert np.array_equal(label, expected)
            assert np.array_equal(colours, np.array([(0, 0, 0), *demo_data.PALETTE])[label])
    assert len({(0, 0, 0), *demo_data.PALETTE}) == 15


def test_detection_and_segmentation_show_the_same_scenes(coco, ade):
    for one, other in (("train2017", "training"), ("val2017", "validation")):
        pictures = zip(sorted((coco / one).iterdir()), sorted((ade / "images" / other).iterdir()), strict=True)
        assert all(mine.read_bytes() == yours.read_bytes() for mine, yours in pictures)


@pytest.mark.parametrize("settings", [SMALL, DETECTION, SEGMENTATION])
def test_same_pictures_whatever_the_number_of_processes(tmp_path, settings):
    build(tmp_path / "one", settings, workers=1)
    build(tmp_path / "three", settings, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    build(tmp_path / "other", replace(settings, seed=1))
    same = contents(tmp_path / "one").items() & contents(tmp_path / "other").items()
    assert not same


def test_complete_set_is_left_alone(tmp_path):
    build(tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not build(tmp_path, SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TASKS[SMALL.task], "write_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "demo", SMALL)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_set_is_refused_and_kept(tmp_path):
    build(tmp_path, SMALL)
    (tmp_path / "train" / "3" / "00000.png").unlink()
    before = contents(tmp_path)
    with pytest.raises(InputError, match="or a part of it: remove it"):
        build(tmp_path, SMALL)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    assert build(tmp_path, SMALL)
    assert not build(tmp_path, SMALL)


def test_other_files_and_other_sets_are_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_bytes(b"mine")
    build(tmp_path / "demo", SMALL)
    for folder in (tmp_path / "mine", tmp_path / "demo"):
        before = contents(folder)
        with pytest.raises(InputError, match="holds other files, demo data of other settings"):
            build(folder, replace(DETECTION, train=2, val=1))
        assert contents(folder) == before


def test_file_in_place_of_folder(tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(InputError, match="is a file: name a folder"):
        build(tmp_path / "demo", SMALL)


def test_boxes_and_masks_are_those_of_the_strokes():
    for labels, scene in scenes():
        (thing,) = scene.objects
        assert thing.label == labels[0]
        left, top, right, bottom = thing.box
        ys, xs = np.nonzero(thing.mask)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (left, top, right, bottom)
        assert 64 * 0.3 < bottom - top <= 64
        # A stroke has one colour, but at soft edges and where the ink is faint.
        core = scene.image[binary_erosion(thing.mask, iterations=2)].astype(int)
        assert np.quantile(np.abs(core - np.median(core, axis=0)), 0.8) <= 2


def test_digits_stand_out_from_what_they_touch():
    for size, digits, scale in (((64, 64), 1, (0.7, 1.0)), ((160, 200), 4, (0.25, 0.45))):
        for _, scene in scenes(25, digits, size, scale):
            luma = scene.image @ demo_data.LUMA / 255
            # Strokes have soft edges, which are neither stroke nor background.
            everything = np.any([binary_dilation(thing.mask, iterations=3) for thing in scene.objects], axis=0)
            for thing in scene.objects:
                around = binary_dilation(thing.mask, iterations=6) & ~everything
                assert abs(np.median(luma[thing.mask]) - np.median(luma[around])) > 0.2


def test_textures_show_wherever_they_are():
    for size, digits, scale in (((64, 64), 1, (0.7, 1.0)), ((192, 256), 3, (0.2, 0.4))):
        for _, scene in scenes(40, digits, size, scale):
            ink = np.any([binary_dilation(thing.mask, iterations=3) for thing in scene.objects], axis=0)
            luma = scene.image @ demo_data.LUMA / 255
            for kind in np.unique(scene.background):
                seen = (scene.background == kind) & ~ink
                if seen.mean() > 0.3:
                    low, high = np.quantile(luma[seen], (0.05, 0.95))
                    assert high - low > 0.04, demo_data.BACKGROUNDS[kind]


def test_several_digits_lie_apart():
    for labels, scene in scenes(20, digits=5, size=(128, 192), scale=(0.3, 0.5)):
        assert [thing.label for thing in scene.objects] == labels
        assert np.sum([thing.mask for thing in scene.objects], axis=0).max() == 1
        assert scene.image.shape == (128, 192, 3)
        assert scene.background.shape == (128, 192)


def test_no_room():
    digit = source_digits(0)["val"][8][0]
    with pytest.raises(ValueError, match="no room"):
        draw_scene(np.random.default_rng(0), [(8, digit)] * 30, (64, 64), (0.9, 0.95))


def test_scenes_vary():
    kinds, heights, centres, colours = set(), [], [], []
    for _, scene in scenes(60):
        (thing,) = scene.objects
        kinds |= set(np.unique(scene.background).tolist())
        left, top, right, bottom = thing.box
        heights.append(bottom - top)
        centres.append(((left + right) / 2, (top + bottom) / 2))
        colours.append(np.median(scene.image[thing.mask], axis=0))
    assert kinds == set(range(len(demo_data.BACKGROUNDS)))
    assert np.std(heights) > 4
    assert np.std(centres, axis=0).min() > 2
    assert np.std(colours, axis=0).min() > 40


def test_demo_picture_is_the_one_in_the_repository(tmp_path):
    demo_data.save_image(tmp_path / "drawn.JPEG")
    shipped = Path(demo_data.__file__).parents[2] / "visualization" / "demo.JPEG"
    with Image.open(tmp_path / "drawn.JPEG") as drawn, Image.open(shipped) as kept:
        assert kept.size == drawn.size == (448, 448)
        # Versions of the image library may round differently.
        assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(kept)).mean() < 2
    assert shipped.stat().st_size < 60_000


def test_command_line(tmp_path, capsys):
    argv = [str(tmp_path / "demo"), "--train-per-class", "2", "--val-per-class", "1", "--image-size", "32", "-j", "1"]
    main(argv)
    assert "20 training and 10 validation images" in capsys.readouterr().out
    main(argv)
    assert "already there" in capsys.readouterr().out
    for task in ("detection", "segmentation"):
        main([str(tmp_path / task), "--task", task, "--train", "2", "--val", "1", "--image-size", "96", "-j", "2"])
        assert "2 training and 1 validation images" in capsys.readouterr().out
        assert len(contents(tmp_path / task)) > 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "16"], "--image-size is 16, but must be at least 32"),
        (["--train-per-class", "0"], "--train-per-class is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--image-size", "big"], "invalid int value: 'big'"),
        (["--task", "pose"], "invalid choice: 'pose'"),
        (["--task", "detection", "--image-size", "64"], "--image-size is 64, but must be at least 96"),
        (["--task", "segmentation", "--val", "0"], "--val is 0, but must be at least 1"),
        (["--train", "5"], "--train is not for --task classification, which has --train-per-class and"),
        (["--task", "detection", "--val-per-class", "5"], "which has --train and --val"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        main([str(tmp_path / "demo"), *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "demo").exists()
