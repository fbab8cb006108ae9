"""The explorer's page on the loopback: it takes pictures, and the models answer."""

import io
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from litvit.data.dataset import unreadable
from litvit.errors import InputError, printable
from litvit.explorer.data import Explorer, explore, make_page

LOOPBACK = "127.0.0.1"
MAX_BYTES = 64 << 20  # of a picture's file


class Server(ThreadingHTTPServer):
    """A server of the page for this machine's own browser. No other site's page may ask it, and it writes no file.

    Args:
        explorers: Models.
        pictures: What the page shows at first, see `make_page`.
        port: Port, 0 for any that is free.

    Raises:
        InputError: The port is taken or not allowed.
    """

    daemon_threads = True

    def __init__(self, explorers: Sequence[Explorer], pictures: Sequence[dict], port: int = 0):
        self.explorers, self.page = explorers, make_page(explorers, pictures, MAX_BYTES)
        self.one_at_a_time = threading.Lock()  # hooks in a model are everybody's
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--serve {port}: {reason}; --serve alone takes a free port") from error

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if urlsplit(self.path).path == "/":
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        else:
            self._complain(404, "there is one page here, /")

    def do_POST(self) -> None:
        if self._is_refused():
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._complain(411, "the length of the picture is missing")
            return
        if int(length) > MAX_BYTES:
            self._complain(413, f"the file is larger than {MAX_BYTES >> 20} MB: make the picture smaller")
            return
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            self._complain(400, "the picture did not arrive whole: send it again")
            return
        name = printable(parse_qs(urlsplit(self.path).query).get("name", ["picture"])[0])

        def open_image() -> Image.Image:
            with unreadable(lambda: name):
                return Image.open(io.BytesIO(content))

        try:
            with self.server.one_at_a_time:
                picture = explore(self.server.explorers, open_image, name)
        except InputError as error:
            self._complain(400, str(error))
            return
        self._answer(200, json.dumps(picture).encode(), "application/json")

    def _is_refused(self) -> bool:
        """Refuse what does not come from this page: other names of this machine, and pages of other sites."""
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]
        hosts += [LOOPBACK, "localhost"] if port == 80 else []  # browsers leave that port out
        origin = self.headers.get("Origin")
        is_own = origin is None or origin in [f"http://{host}" for host in hosts]
        is_own &= self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")
        if self.headers.get("Host") in hosts and is_own:
            return False
        self._complain(403, f"this page is for {self.server.address} alone")
        return True

    def _complain(self, status: int, message: str) -> None:
        self.close_connection = True  # a body that was not read is no further request
        self._answer(status, json.dumps({"error": message}).encode(), "application/json")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print no line per request."""


def serve(server: Server, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        server: Server, which is closed at the end.
        announce: Function that tells the user the address.
    """
    with server:
        announce(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
