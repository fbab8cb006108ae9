"""What is an image, of which class, and what is left out with a sentence."""

import io
import os
import shutil
import socket
import tarfile

import pytest
from PIL import Image, features

from litvit.data.listing import ImageFiles, class_folders, image_suffixes
from litvit.errors import InputError


def write(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (4, 4)).save(path)
    else:
        path.write_bytes(content)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.jpg", "dog/2.jpg"):
        write(tmp_path / "train" / name)
    return tmp_path / "train"


def classes_of(images):
    names = {number: name for name, number in images.class_to_idx.items()}
    return {name: names[target] for name, target in zip(images.names, images.targets, strict=True)}


def pack(folder):
    """Pack a folder as a .tar beside it."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for entry in sorted(folder.iterdir()):
            tar.add(entry, entry.name)
    return folder.with_suffix(".tar")


STRAYS = {
    ".DS_Store": "left out 1 hidden files and folders: .DS_Store",
    ".ipynb_checkpoints/1-checkpoint.png": "left out 1 hidden files and folders: .ipynb_checkpoints",
    "cat/.ipynb_checkpoints/1-checkpoint.png": "left out 1 hidden files and folders: cat/.ipynb_checkpoints",
    "cat/._1.png": "left out 1 hidden files and folders: cat/._1.png",
    "__MACOSX/cat/1.png": "left out 1 hidden files and folders: __MACOSX",
    "stray.png": "left out 1 images outside of class folders: stray.png",
    "cat/notes.txt": "left out 1 files that are not images (.txt): cat/notes.txt",
    "cat/README": "left out 1 files that are not images (no suffix): cat/README",
    "owl/notes.txt": "left out 1 folders without images as classes: owl",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("stray", "note"), STRAYS.items())
def test_what_is_left_out_is_said(root, stray, note, packed):
    before = classes_of(ImageFiles(root))
    write(root / stray, None if stray.endswith(".png") else b"")
    images = ImageFiles(pack(root) if packed else root)
    assert classes_of(images) == before
    assert any(found.startswith(note) for found in images.notes)


def test_clean_data_has_no_notes(root):
    assert not ImageFiles(root).notes
    assert not ImageFiles(pack(root)).notes


def test_classes_are_found_without_listing_all_images(root):
    for stray in STRAYS:
        write(root / stray, None if stray.endswith(".png") else b"")
    (root / "again").symlink_to(root, target_is_directory=True)
    write(root / "yak" / "part" / "1.webp")
    (root / "yak" / "empty").mkdir()
    assert class_folders(root) == list(ImageFiles(root).class_to_idx) == ["cat", "dog", "yak"]


@pytest.mark.parametrize("packed", [False, True])
def test_empty_class_folders_are_no_classes(root, packed):
    (root / "ant").mkdir()
    images = ImageFiles(pack(root) if packed else root)
    assert images.class_to_idx == {"cat": 0, "dog": 1}
    assert images.notes == ["left out 1 folders without images as classes: ant"]


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_in_a_folder_of_a_class_is_of_the_class(root, packed):
    for name in ("cat/part/3.png", "dog/part/deeper/3.png"):
        write(root / name)
    images = ImageFiles(pack(root) if packed else root)
    assert classes_of(images)["cat/part/3.png"] == "cat"
    assert classes_of(images)["dog/part/deeper/3.png"] == "dog"
    assert images.notes == [
        "2 images lie deeper in the folder of their class: cat/part/3.png, dog/part/deeper/3.png",
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_that_holds_all_classes_is_looked_through(root, packed):
    shutil.copytree(root, root.parent / "whole" / "data" / "train")
    whole = root.parent / "whole"
    images = ImageFiles(pack(whole) if packed else whole)
    assert set(images.class_to_idx) == {"cat", "dog"}
    assert images.notes == ["the classes are the folders in data/train/"]
    assert set(ImageFiles(whole, known_classes=["data"]).class_to_idx) == {"data"}


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".TIFF", ".bmp", ".gif", ".ppm", ".JPEG", ".jfif"])
def test_what_pillow_reads_is_an_image(root, suffix):
    write(root / f"owl/1{suffix}")
    images = ImageFiles(root)
    assert images.class_to_idx == {"cat": 0, "dog": 1, "owl": 2}
    with Image.open(images[4][0]) as image:
        assert image.size == (4, 4)


def test_suffixes_of_documents_and_films_are_not_images():
    assert not {".pdf", ".eps", ".mpg", ".h5", ".txt", ".json"} & image_suffixes()
    assert not features.check("avif") or ".avif" in image_suffixes()


def test_classes_and_images_have_one_order_whatever_their_case_or_zeros(tmp_path):
    for name in ("Cat/1.png", "cat/1.png", "2/10.png", "2/9.png", "02/1.png", "10/1.png", "m1²/1.png", "²/1.png"):
        write(tmp_path / name)
    images = ImageFiles(tmp_path)
    assert list(images.class_to_idx) == ["02", "2", "10", "Cat", "cat", "m1²", "²"]
    assert [name for name in images.names if name.startswith("2/")] == ["2/9.png", "2/10.png"]
    assert class_folders(tmp_path) == list(images.class_to_idx)


def test_links_are_followed_but_not_in_circles(root):
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    (root / "dog" / "to_cat").symlink_to(root / "cat", target_is_directory=True)
    (root / "cat" / "to_dog").symlink_to(root / "dog", target_is_directory=True)
    (root / "owl").symlink_to(root / "dog", target_is_directory=True)
    (root / "itself").symlink_to(root / "itself")
    images = ImageFiles(root)
    assert {"owl/1.jpg", "dog/to_cat/1.png", "cat/to_dog/1.jpg"} <= set(images.names)
    assert set(images.class_to_idx) == {"cat", "dog", "owl"}
    assert class_folders(root) == ["cat", "dog", "owl"]
    note = next(note for note in images.notes if "links in a circle" in note)
    assert "cat/again" in note or "..." in note


def test_a_link_that_leads_nowhere_stays_an_image_which_reading_names(root):
    (root / "cat" / "3.png").symlink_to(root / "gone.png")
    images = ImageFiles(root)
    assert "cat/3.png" in images.names
    with pytest.raises(FileNotFoundError):
        images[images.names.index("cat/3.png")]


def test_pipes_and_sockets_are_not_opened(root):
    os.mkfifo(root / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(root / "cat")  # the path of a socket must be short
        listener.bind("socket.png")
    images = ImageFiles(root)
    assert len(images) == 4
    assert any(note.startswith("left out 2 pipes, sockets and devices") for note in images.notes)


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    (root / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):  # the superuser, who runs tests in containers, may list any folder
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    notes = ImageFiles(root).notes
    assert "left out 1 folders that cannot be listed: locked (Permission denied)" in notes


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["cat/1.heic"], []])
def test_no_image_in_a_class_folder_is_refused(tmp_path, files):
    for name in files:
        write(tmp_path / name, b"")
    with pytest.raises(InputError, match="has no images in folders of classes"):
        ImageFiles(tmp_path)


def test_a_tar_of_one_tar_per_class_and_links(root):
    for name in ("cat", "dog"):
        pack(root / name)
        shutil.rmtree(root / name)
    os.link(root / "cat.tar", root / "owl.tar")
    path = pack(root)
    images = ImageFiles(path)
    assert images.class_to_idx == {"cat": 0, "dog": 1}
    assert images.names == ["cat/1.png", "cat/2.png", "dog/1.jpg", "dog/2.jpg"]
    for index in range(4):
        with Image.open(images[index][0]) as image:
            image.load()


def test_links_within_a_tar_are_images(root):
    os.link(root / "cat" / "1.png", root / "cat" / "3.png")
    (root / "dog" / "3.png").symlink_to("../cat/2.png")
    (root / "dog" / "4.png").symlink_to("/elsewhere.png")
    images = ImageFiles(pack(root))
    assert set(images.names) == {"cat/1.png", "cat/2.png", "cat/3.png", "dog/1.jpg", "dog/2.jpg", "dog/3.png"}
    content = {name: images[index][0].read() for index, name in enumerate(images.names)}
    assert content["cat/3.png"] == content["cat/1.png"]
    assert content["dog/3.png"] == content["cat/2.png"]
    assert images.notes == ["left out 1 links to what the .tar does not hold: dog/4.png"]


def test_a_tar_that_was_appended_to_holds_each_image_once(root):
    path = pack(root)
    with tarfile.open(path, "a") as tar:
        Image.new("RGB", (9, 9)).save(root / "cat" / "1.png")
        tar.add(root / "cat" / "1.png", "./cat/1.png")
    images = ImageFiles(path)
    assert len(images) == 4
    with Image.open(images[0][0]) as image:
        assert image.size == (9, 9)


def test_a_tar_that_is_cut_off_is_refused_wherever_the_cut_is(root):
    path = pack(root)
    whole = path.read_bytes()
    for size in (1000, 1536, 1800, 2048, len(whole.rstrip(b"\0"))):
        path.write_bytes(whole[:size])
        with pytest.raises(tarfile.ReadError):
            ImageFiles(path)


def test_of_members_with_one_name_the_last_one_counts_and_links_lead_to_links(tmp_path):
    def add(tar, name, content=None, link=None):
        info = tarfile.TarInfo(name)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, link
        info.size = len(content or b"")
        tar.addfile(info, io.BytesIO(content or b""))

    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "a/1.jpg", link="../b/1.jpg")
        add(tar, "b/1.jpg", b"old")
        add(tar, "a/1.jpg", b"new")
        for number in (1, 2):  # before and after what they lead to
            add(tar, f"c/{number}.jpg", link=f"{number + 1}.jpg")
        add(tar, "c/3.jpg", b"end")
        add(tar, "c/4.jpg", link="2.jpg")
        add(tar, "c/5.jpg", link="6.jpg")
        add(tar, "c/6.jpg", link="5.jpg")
    images = ImageFiles(tmp_path / "train.tar")
    assert {name: images[index][0].read() for index, name in enumerate(images.names)} == {
        "a/1.jpg": b"new",
        "b/1.jpg": b"old",
        **{f"c/{number}.jpg": b"end" for number in (1, 2, 3, 4)},
    }
    assert images.notes == ["left out 2 links to what the .tar does not hold: c/5.jpg, c/6.jpg"]


def test_a_tar_that_is_damaged_or_followed_by_another_is_refused(root):
    path = pack(root)
    whole = path.read_bytes()
    place = whole.index(b"dog/1.jpg")
    path.write_bytes(whole[:place] + b"x" * 200 + whole[place + 200 :])
    with pytest.raises(tarfile.ReadError, match="it is damaged from byte|invalid header"):
        ImageFiles(path)
    path.write_bytes(whole + whole)
    with pytest.raises(tarfile.ReadError, match="another archive follows its end"):
        ImageFiles(path)


def test_a_link_to_a_folder_in_a_tar_is_a_class(root):
    (root / "owl").symlink_to("dog", target_is_directory=True)
    (root / "cat" / "up").symlink_to("..", target_is_directory=True)
    images = ImageFiles(pack(root))
    assert images.class_to_idx == {"cat": 0, "dog": 1, "owl": 2}
    assert {"owl/1.jpg", "owl/2.jpg"} < set(images.names)
    assert images.notes == ["left out 1 links to what the .tar does not hold: cat/up"]


def test_a_broken_tar_in_a_tar_is_named(root):
    (root / "owl.tar").write_bytes(b"no archive" * 200)
    with pytest.raises(tarfile.ReadError, match="owl.tar in it"):
        ImageFiles(pack(root))
