"""Checkpoints for mmengine: fetching them from links."""

import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.multiprocessing

from litvit.errors import InputError
from litvit.openmmlab import load_from_url
from litvit.openmmlab.checkpoints import fetch


@contextmanager
def serve(folder):
    """Serve a folder. Yields its address and a list that is as long as what was asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(args)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


@pytest.fixture
def www(tmp_path, monkeypatch):
    """A folder to serve, with weights of 1 in a/w.pth and of 2 in b/w.pth."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "www" / name).mkdir(parents=True)
        torch.save({"state_dict": {"w": torch.full((2000,), value)}}, tmp_path / "www" / name / "w.pth")
    return tmp_path / "www"


def read(link):
    return load_from_url(link)["state_dict"]["w"][0].item()


def fetch_it(rank, folder, link):
    os.environ |= {"TORCH_HOME": str(folder), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(load_from_url(link), folder / f"{rank}.pth")


def test_one_of_two_processes_fetches_a_link(www, tmp_path):
    with serve(www) as (address, asked):
        arguments = (tmp_path, f"{address}/a/w.pth")
        torch.multiprocessing.start_processes(fetch_it, arguments, nprocs=2, start_method="fork")
    assert len(asked) == 1
    for rank in range(2):
        held = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert torch.equal(held["state_dict"]["w"], torch.ones(2000))


def test_two_links_of_one_name(www):
    with serve(www) as (address, asked):
        assert [read(f"{address}/{name}/w.pth") for name in "aba"] == [1, 2, 1]
    assert len(asked) == 2


@pytest.mark.parametrize("damage", ["cut off", "flipped bit", "no checkpoint"])
def test_a_broken_file_is_fetched_again(damage, www):
    with serve(www) as (address, asked):
        file = fetch(f"{address}/a/w.pth")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= damage == "flipped bit"
        file.write_bytes({"cut off": content[:-2000], "no checkpoint": b"<html>"}.get(damage, content))
        assert read(f"{address}/a/w.pth") == 1
        assert len(asked) == 2
        # What is broken at its source is no checkpoint, and is not kept.
        (www / "b/w.pth").write_bytes((www / "b/w.pth").read_bytes()[:-2000])
        with pytest.raises(InputError, match="cannot fetch http.*/b/w.pth: what came is cut off"):
            read(f"{address}/b/w.pth")
    assert [path for path in file.parents[1].rglob("*") if path.is_file()] == [file]
    with pytest.raises(InputError, match="cannot fetch http.*/b/w.pth: "):  # nobody serves it any more
        fetch(f"{address}/b/w.pth")
