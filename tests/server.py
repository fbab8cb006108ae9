"""A web server on the loopback for tests of downloads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Server(NamedTuple):
    """A running server.

    Attributes:
        address: Address of its folder.
        asked: One entry per request.
        cut: Names of files whose transfer breaks off after half of them.
    """

    address: str
    asked: list[str]
    cut: set[str]


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder while the block runs."""
    asked, cut = [], set()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            asked.append(self.path)

        def copyfile(self, source, outputfile) -> None:
            content = source.read()
            outputfile.write(content[: len(content) // 2] if Path(self.path).name in cut else content)

        def end_headers(self) -> None:
            # What the Hub's client asks for: a file's version, and the commit that it belongs to.
            self.send_header("ETag", f'"{len(self.path)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            super().end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", asked, cut)
        finally:
            server.shutdown()
