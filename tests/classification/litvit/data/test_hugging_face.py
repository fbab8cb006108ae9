"""Columns, classes and rows of Hugging Face data, in memory and streamed."""

import zipfile

import datasets
import pytest
import torch

from litvit.data.augment import AugmentConfig
from litvit.data.loader import train_loader
from litvit.data.readers import DataConfig, class_list, open_images, open_train_and_val
from litvit.errors import InputError
from litvit.processes import Processes

INTEGER, STRING, NAMED = datasets.Value("int64"), datasets.Value("string"), datasets.ClassLabel(names=list("zba"))
DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def make(digits, tmp_path):
    """Write a data set of 12 + 6 rows with an image per row, and further columns of given types."""
    images = [path.read_bytes() for path in sorted((digits / "train").rglob("*.png"))]

    def make(image="image", broken=(), files=1, **columns):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for split, rows in (("train", 12), ("validation", 6)):
            table, types = {}, {}
            if image:
                table[image] = [{"bytes": images[row], "path": None} for row in range(rows)]
                for row, content in broken if split == "train" else ():
                    table[image][row] = content if content is None else {"bytes": content, "path": "odd.jpg"}
                types[image] = datasets.Image()
            for name, (kind, values) in columns.items():
                table[name] = [values[row % len(values)] for row in range(rows)]
                types[name] = kind
            whole = datasets.Dataset.from_dict(table, features=datasets.Features(types))
            for file in range(files):
                whole.shard(files, file).to_parquet(folder / f"{split}-{file:05d}-of-{files:05d}.parquet")
        return folder

    return make


def config_of(folder, tmp_path, reader="hfds", **changes):
    changes = {"val_split": "validation", **changes}
    return DataConfig(str(tmp_path / "cache"), dataset=f"{reader}/{folder}", **changes)


def targets_of(images):
    images.transform = lambda image: image.size
    return [images[index][1] for index in range(len(images))]


def test_a_folder_of_images_is_a_data_set(digits, tmp_path):
    train, val, num_classes = open_train_and_val(config_of(digits, tmp_path))
    assert (len(train), len(val), num_classes) == (80, 40, 10)


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"fine_label": (NAMED, [0, 1, 2])}, ["z", "b", "a"]),
        ({"label": (INTEGER, [0, 1, 2])}, ["0", "1", "2"]),
        ({"species": (STRING, ["owl", "ant", "cat"])}, ["ant", "cat", "owl"]),
        ({"label": (NAMED, [0, 1, 2]), "coarse_label": (NAMED, [1, 1, 1])}, ["z", "b", "a"]),
        ({"kind": (NAMED, [0, 1, 2]), "author": (STRING, ["x"])}, ["z", "b", "a"]),
    ],
)
def test_columns_are_found_and_classes_are_named(make, tmp_path, columns, classes):
    train, val, num_classes = open_train_and_val(config_of(make("img", **columns), tmp_path))
    assert (num_classes, class_list(train), class_list(val)) == (3, classes, classes)
    kind, values = next(iter(columns.values()))
    expected = [classes.index(value) if kind is STRING else value for value in values]
    assert targets_of(train)[:3] == targets_of(val)[:3] == expected


def test_strings_of_val_are_numbered_as_in_train(make, tmp_path):
    folder = make(kind=(STRING, ["c", "b", "a", "c", "b", "c", "a"]))  # val has the first six rows
    datasets.Dataset.from_parquet(str(folder / "validation-00000-of-00001.parquet")).filter(
        lambda row: row["kind"] != "a"
    ).to_parquet(folder / "validation-00000-of-00001.parquet")
    _, val, _ = open_train_and_val(config_of(folder, tmp_path))
    assert targets_of(val) == [2, 1, 2, 1, 2]
    assert val.notes == ["no images of 1 classes of train: a"]


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
@pytest.mark.parametrize(
    ("image", "columns", "flags", "says"),
    [
        (None, {"label": (NAMED, [0])}, {}, "the images may be none of its columns .label.: name it by --input-key"),
        ("a", {"fine": (NAMED, [0]), "coarse": (NAMED, [0])}, {}, "any of fine, coarse .*name it by --target-key"),
        ("a", {"x": (STRING, ["b"]), "y": (INTEGER, [0])}, {}, "any of x, y .*name it by --target-key"),
        ("a", {"label": (NAMED, [0])}, {"target_key": "kind"}, "--target-key kind: the data has no such column, but a"),
        ("a", {"label": (NAMED, [0])}, {"input_key": "image"}, "--input-key image: the data has no such column"),
    ],
)
def test_ambiguous_or_missing_columns_are_one_line(make, tmp_path, reader, image, columns, flags, says):
    folder = make(image, **columns)
    with pytest.raises(InputError, match=says):
        open_train_and_val(config_of(folder, tmp_path, reader, train_num_samples=12, **flags))


def test_keys_choose_columns(make, tmp_path):
    folder = make("a", fine=(NAMED, [0, 1, 2]), coarse=(NAMED, [1, 1, 1]))
    train, _, _ = open_train_and_val(config_of(folder, tmp_path, target_key="coarse", input_key="a"))
    assert set(targets_of(train)) == {1}


def test_rows_without_a_label_are_refused(make, tmp_path):
    for kind, values, says in ((INTEGER, [0, -1], "row 1 of train has the class -1"), (STRING, ["a", None], "None")):
        with pytest.raises(InputError, match=says):
            open_train_and_val(config_of(make(label=(kind, values)), tmp_path))


def test_a_missing_data_set_or_split_is_one_line(digits, tmp_path):
    with pytest.raises(InputError, match="cannot read val of --dataset hfds/.*Unknown split"):
        open_train_and_val(config_of(digits, tmp_path, val_split="val"))
    with pytest.raises(InputError, match="cannot read train of --dataset hfids/"):
        open_train_and_val(config_of(tmp_path / "gone", tmp_path, "hfids"))


def test_a_broken_row_is_named_and_replaced_in_memory(make, tmp_path):
    folder = make(broken=[(1, b"no image"), (4, None)], label=(NAMED, [0, 1, 2]))
    train, _, _ = open_train_and_val(config_of(folder, tmp_path))
    loader = train_loader(train, AugmentConfig(), DATA_CONFIG, Processes(torch.device("cpu")), batch_size=6, workers=0)
    batches = list(loader)
    assert sum(len(batch.images) for batch in batches) == 12
    assert {fault.path for batch in batches for fault in batch.faults} == {"row 1 of train (odd.jpg)", "row 4 of train"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_names_and_replaces_broken_rows(make, tmp_path, workers):
    folder = make(broken=[(1, b"no image"), (4, None)], label=(NAMED, [0, 1, 2]), files=3)
    config = config_of(folder, tmp_path, "hfids", train_num_samples=24)  # so that each process reads all of its rows
    train, val, num_classes = open_train_and_val(config)
    assert (num_classes, class_list(train)) == (3, ["z", "b", "a"])
    processes = Processes(torch.device("cpu"))
    loader = train_loader(train, AugmentConfig(), DATA_CONFIG, processes, batch_size=3, workers=workers)
    batches = list(loader)
    assert len(batches) == 8
    reasons = {fault.reason for batch in batches for fault in batch.faults}
    assert any("(odd.jpg)" in reason and "no format that Pillow knows" in reason for reason in reasons)
    assert any("the row holds no image" in reason for reason in reasons)
    val.transform = lambda image: image.size
    assert sorted(sample.target for sample in val) == [0, 0, 1, 1, 2, 2]


def test_processes_share_a_stream(make, tmp_path):
    folder = make(label=(INTEGER, list(range(12))), files=4)
    config = config_of(folder, tmp_path, "hfids", train_num_samples=12, num_classes=12)
    seen = []
    for rank in range(2):
        train, _, _ = open_train_and_val(config)
        processes = Processes(torch.device("cpu"), rank, 2)
        loader = train_loader(train, AugmentConfig(), DATA_CONFIG, processes, batch_size=3, workers=2)
        seen.append({int(target) for batch in loader for target in batch.target})
    assert seen[0] | seen[1] == set(range(12))
    assert not seen[0] & seen[1]


def test_a_stream_of_strings_takes_a_class_map(make, tmp_path):
    folder = make(kind=(STRING, ["owl", "ant", "cat"]))
    config = config_of(folder, tmp_path, "hfids", num_classes=3)
    with pytest.raises(InputError, match="row 0 of train has the class 'owl' in kind; --class-map FILE numbers names"):
        open_images(config, "train")
    (tmp_path / "map.txt").write_text("cat\nant\n")
    with_map = open_images(config_of(folder, tmp_path, "hfids", class_map=str(tmp_path / "map.txt")), "train")
    with_map.transform = lambda image: image.size
    assert "'owl' in kind, which the class map lacks" in next(iter(with_map)).faults[0].reason
    (tmp_path / "map.txt").write_text("cat\nant\nowl\n")
    images = open_images(config_of(folder, tmp_path, "hfids", class_map=str(tmp_path / "map.txt")), "train")
    images.transform = lambda image: image.size
    assert [sample.target for sample in images][:3] == [2, 1, 0]


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_images_in_an_archive(digits, tmp_path, reader):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in "34":
            zipped.write(next((digits / "train" / name).iterdir()), f"{name}.png")
    types = datasets.Features({"image": datasets.Image(), "label": INTEGER})
    rows = [{"bytes": None, "path": f"zip://{name}.png::{archive}"} for name in "34"]
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=types)
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    images = open_images(config_of(tmp_path / "set", tmp_path, reader), "train")
    images.transform = lambda image: image.size
    samples = [images[0], images[1]] if reader == "hfds" else [(sample.pixels, sample.target) for sample in images]
    assert samples == [((32, 32), 0), ((32, 32), 1)]


def test_copies_are_not_kept_in_the_data_itself(make):
    folder = make(label=(NAMED, [0, 1, 2]))
    before = sorted(folder.parent.rglob("*"))
    for root in (folder, folder.parent):
        for _ in range(2):
            train, _, _ = open_train_and_val(config_of(folder, root.parent, val_split="validation"))
            config = DataConfig(str(root), dataset=f"hfds/{folder}", val_split="validation")
            train, _, _ = open_train_and_val(config)
            assert len(train) == 12
    assert sorted(path for path in folder.parent.rglob("*") if "cache" not in str(path)) == before


def test_classes_without_rows_are_told(make, tmp_path):
    train, _, num_classes = open_train_and_val(config_of(make(label=(INTEGER, [1, 3])), tmp_path))
    assert num_classes == 4
    assert train.notes == ["no rows of 2 of the 4 classes: 0, 2"]
