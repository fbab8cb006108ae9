"""litvit explore --serve: the page and its pictures on the loopback."""

import http.client
import json
import threading

import pytest

from litvit.errors import InputError
from litvit.explorer.server import MAX_BYTES, Server, serve

from .conftest import EVIL


@pytest.fixture(scope="module")
def server(explorer):
    """A running server."""
    server, addresses = Server([explorer], []), []
    thread = threading.Thread(target=serve, args=(server, addresses.append))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    assert addresses == [server.address]


def ask(server, method="GET", path="/", body=None, length=None, **headers):
    """Send a request. Returns the status and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    headers = {"Host": f"127.0.0.1:{server.server_port}", **headers}
    if body is not None:
        headers["Content-Length"] = str(len(body) if length is None else length)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_picture_is_answered_and_a_broken_one_is_named(server, browser, folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    browser.screen()
    browser.open(server.address)
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    file = browser.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(folder / f"{EVIL}.png")], nodeId=file)
    browser.wait("document.documentElement.dataset.ready")
    assert browser.run("document.querySelector('.panel h2').textContent") == f"{EVIL}.png"
    assert browser.run("document.querySelectorAll('.view [data-points=\"64\"] path').length") == 64
    assert browser.problems == []
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "plain.png").read_bytes()[:200])
    browser.call("DOM.setFileInputFiles", files=[str(broken)], nodeId=file)
    browser.wait("document.querySelector('#problem').textContent")
    text = browser.run("document.querySelector('#problem').textContent")
    assert text.startswith("cannot read the image broken.png (")
    assert browser.run("document.querySelectorAll('.panel').length") == 1
    # Dropped on the page, beside the one that is there.
    files = {"items": [], "files": [str(folder / "plain.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.call("Input.dispatchDragEvent", type=kind, x=200, y=200, data=files)
    browser.wait("document.querySelectorAll('.thumb').length === 2")
    assert browser.run("document.querySelector('.panel h2').textContent") == "plain.png"
    assert browser.run("document.querySelector('#problem').textContent") == ""
    assert {address.rpartition("/")[0] for address in browser.requests if address.startswith("http")} == {
        server.address.rstrip("/")
    }
    assert list((tmp_path / "here").iterdir()) == []


def test_the_answer(server, folder):
    content = (folder / "plain.png").read_bytes()
    status, answer = ask(server, "POST", "/?name=a%2Fb.png", content, Origin=server.address.rstrip("/"))
    assert status == 200
    found = json.loads(answer)
    assert found["name"] == "a/b.png"
    assert len(found["seen"][0]["classes"]) == 3
    status, answer = ask(server, "POST", "/", b"no picture")
    assert status == 400
    assert json.loads(answer)["error"].startswith("cannot read the image picture (no format that Pillow knows)")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.org"},
        {"Host": "example.org:PORT"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1.example.org:PORT"},
        {"Host": None},
        {"Origin": "http://example.org"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:PORT"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_others_are_refused(server, folder, method, headers):
    port = str(server.server_port)
    headers = {name: value and value.replace("PORT", port) for name, value in headers.items()}
    body = (folder / "plain.png").read_bytes() if method == "POST" else None
    status, answer = ask(server, method, "/", body, **headers)
    assert status == 403
    assert b"<html" not in answer


def test_the_body_is_limited(server):
    assert ask(server, "POST", "/", b"", length=MAX_BYTES + 1)[0] == 413
    assert ask(server, "POST", "/", None)[0] == 411
    assert ask(server, "POST", "/", b"", length="-1")[0] == 411
    assert ask(server, "GET", "/etc/passwd")[0] == 404
    assert ask(server, "GET", Host=f"localhost:{server.server_port}")[0] == 200


def test_a_port_that_is_taken(server, explorer):
    with pytest.raises(InputError, match=rf"--serve {server.server_port}: .*free port"):
        Server([explorer], [], server.server_port)
    with pytest.raises(InputError, match="--serve 70000"):
        Server([explorer], [], 70000)
