"""Checkpoints by link: whole or not there, fetched once, told in one line where they cannot be had."""

import hashlib
import os
import pickle
import platform

import pytest
import torch
from safetensors.torch import save_file
from server import serve

from litvit.checkpoints import read_state_dict
from litvit.downloads import cache_folder, fetch, kept_file
from litvit.errors import InputError


@pytest.fixture
def www(tmp_path, monkeypatch):
    """A folder to serve, with weights of 1 in a/w.pth and of 2 in b/w.pth."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "www" / name).mkdir(parents=True)
        torch.save({"state_dict": {"w": torch.full((2000,), value)}}, tmp_path / "www" / name / "w.pth")
    return tmp_path / "www"


def read(link):
    return read_state_dict(link)["w"][0].item()


def kept():
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def read_it(rank, folder, link):
    os.environ["TORCH_HOME"] = str(folder)
    (folder / str(rank)).write_text(str(read(link)))


def test_one_of_several_processes_fetches_a_link(www, tmp_path):
    with serve(www) as server:
        arguments = (tmp_path, f"{server.address}/a/w.pth")
        torch.multiprocessing.start_processes(read_it, arguments, nprocs=3, start_method="fork")
    assert len(server.asked) == 1
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["1.0"] * 3


def test_two_links_of_one_name(www):
    with serve(www) as server:
        assert [read(f"{server.address}/{name}/w.pth") for name in "aba"] == [1, 2, 1]
    assert len(server.asked) == 2


@pytest.mark.parametrize("damage", ["cut off", "flipped bit", "no checkpoint"])
def test_a_broken_file_is_fetched_again(damage, www):
    with serve(www) as server:
        file = fetch(f"{server.address}/a/w.pth")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= damage == "flipped bit"
        file.write_bytes({"cut off": content[:-2000], "no checkpoint": b"<html>"}.get(damage, content))
        assert read(f"{server.address}/a/w.pth") == 1
        assert len(server.asked) == 2
        # What is broken at its source is no checkpoint, and is not kept.
        (www / "b/w.pth").write_bytes((www / "b/w.pth").read_bytes()[:-2000])
        with pytest.raises(InputError, match=r"cannot fetch http.*/b/w\.pth: what came is cut off"):
            read(f"{server.address}/b/w.pth")
    assert kept() == [file]
    with pytest.raises(InputError, match=r"cannot fetch http.*/b/w\.pth: "):  # nobody serves it any more
        fetch(f"{server.address}/b/w.pth")


def test_a_transfer_that_breaks_off(www):
    """torch's format before version 1.6 does not tell that its end is missing: the server's length does."""
    torch.save({"w": torch.ones(2000)}, www / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"w": torch.ones(2000)}, www / "w.safetensors")
    with serve(www) as server:
        for name in ("old.pth", "a/w.pth", "w.safetensors"):
            server.cut.add(name.rpartition("/")[2])
            with pytest.raises(InputError, match=rf"cannot fetch .*/{name}: \d+ of \d+ bytes came: try again"):
                read(f"{server.address}/{name}")
            assert not kept()
        server.cut.clear()
        assert [read(f"{server.address}/{name}") for name in ("old.pth", "a/w.pth", "w.safetensors")] == [1, 1, 1]


def test_a_hash_in_the_name(www):
    content = (www / "a/w.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"w-{digest}.pth", "w-00000000.pth", "w-20210701.pth"):
        (www / name).write_bytes(content)
    with serve(www) as server:
        assert read(f"{server.address}/w-{digest}.pth") == 1
        assert read(f"{server.address}/w-20210701.pth") == 1  # a date is no hash
        with pytest.raises(InputError, match=f"the hash of what came begins with {digest}, not 00000000"):
            read(f"{server.address}/w-00000000.pth")
    assert len(kept()) == 2


def test_what_only_its_reader_finds_broken_is_fetched_again(www):
    """Nothing in torch's old format tells where its end is."""
    torch.save({"w": torch.ones(2000)}, www / "old.pth", _use_new_zipfile_serialization=False)
    with serve(www) as server:
        link = f"{server.address}/old.pth"
        file = fetch(link)
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(InputError, match="is no checkpoint, or a truncated one"):
            read(link)
        assert read(link) == 1


def test_what_is_not_there_and_what_holds_code(www):
    (www / "code.pth").write_bytes(pickle.dumps(os.getcwd))
    with serve(www) as server:
        with pytest.raises(InputError, match="HTTP Error 404"):
            fetch(f"{server.address}/none.pth")
        with pytest.raises(InputError, match="holds code"):
            read(f"{server.address}/code.pth")


def test_a_full_disk(www):
    with serve(www) as server:
        link = f"{server.address}/a/w.pth"
        folder = kept_file(link).parent
        folder.mkdir(parents=True)
        (folder / f".{platform.node()}.part").symlink_to("/dev/full")
        with pytest.raises(InputError, match=f"cannot fetch {link}: no space left in {cache_folder()}: make room"):
            fetch(link)
        assert not list(folder.iterdir())
        assert read(link) == 1


def test_a_folder_that_cannot_be_written(www, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with serve(www) as server, pytest.raises(InputError, match="cannot fetch .*Not a directory"):
        fetch(f"{server.address}/a/w.pth")


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://[half",
        "http://{host}:port/w.pth",
        "http://{host}/%00.pth",
        f"http://{{host}}/{'w' * 300}.pth",
    ],
)
def test_addresses_that_are_none(www, address):
    with serve(www) as server, pytest.raises(InputError, match="cannot fetch http") as caught:
        fetch(address.format(host=server.address.removeprefix("http://")))
    assert "\n" not in str(caught.value)
    assert not kept()


def test_names_of_all_characters(www):
    """None of them leads out of the cache."""
    for name in ("größe 1.pth", "..%2F..%2Fw.pth"):
        (www / name).write_bytes((www / "a/w.pth").read_bytes())
    with serve(www) as server:
        for path in ("größe 1.pth", "gr%C3%B6%C3%9Fe%201.pth", "..%252F..%252Fw.pth"):
            assert read(f"{server.address}/{path}") == 1
    link = "http://host/..%2F..%2Fw.pth"
    assert kept_file(link).resolve().parent.parent == cache_folder().resolve()


def test_a_kept_file_needs_neither_server_nor_a_folder_to_write_to(www):
    with serve(www) as server:
        file = fetch(f"{server.address}/a/w.pth")
    file.parent.chmod(0o500)
    assert read(f"{server.address}/a/w.pth") == 1
    file.parent.chmod(0o700)
