"""Files of links, kept in torch.hub's folder: each is there whole, or not at all."""

import errno
import hashlib
import os
import platform
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlparse
from urllib.request import Request, urlopen

import safetensors
import torch
from tqdm import tqdm

from litvit.archives import begins_with, verify_archive
from litvit.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

TIMEOUT = 60  # seconds without a byte
_CHUNK = 2**20  # bytes
_HASH = re.compile(
    r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.[^.]*$"
)  # in a file's name, where eight digits may be a date
_fetched: set[Path] = set()  # files of links that this process has asked for


def cache_folder() -> Path:
    """Return the folder of torch.hub's checkpoints, which TORCH_HOME may move."""
    return Path(torch.hub.get_dir(), "checkpoints")


def is_link(source: str | Path) -> bool:
    """Return whether a source is the address of a file on the web."""
    return str(source).startswith(("http://", "https://"))


def kept_file(link: str, folder: str | Path | None = None) -> Path:
    """Return where the file of a link is kept. Links of one name do not meet: each has a folder of its own.

    Args:
        link: Link to a checkpoint.
        folder: Folder to keep files in, None for torch.hub's.
    """
    name = Path(unquote(urlparse(link).path)).name or "checkpoint"
    return Path(folder or cache_folder(), hashlib.sha256(link.encode()).hexdigest()[:16], name)


def fetch(source: str | Path, folder: str | Path | None = None) -> Path:
    """Return the file of a path or a link. A link's file is fetched once, by one process.

    The length that the server tells, the hash in a name such as `lit_s-0a1b2c3d.pth`, and the checksums of the file are
    verified. A file that is broken is fetched again.

    Args:
        source: Path, or link to a checkpoint.
        folder: Folder to keep files in, None for torch.hub's.

    Raises:
        InputError: The link cannot be fetched, or gives no whole checkpoint. Nothing is left behind.
    """
    if not is_link(source):
        return Path(source).expanduser()
    link = str(source)
    try:
        file = kept_file(link, folder)
        if not is_whole(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.parent):
                if not is_whole(file):  # no other process has fetched it meanwhile
                    _replace(file, link)
    except HTTPError as error:
        raise InputError(f"cannot fetch {link}: {error}") from error
    except URLError as error:
        instead = "without a network, name a file that was fetched elsewhere in its place"
        raise InputError(f"cannot fetch {link}: {error.reason}; {instead}") from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            place = f"no space left in {file.parent.parent}: make room, or name another folder by TORCH_HOME"
            raise InputError(f"cannot fetch {link}: {place}") from error
        raise InputError(f"cannot fetch {link}: {error}") from error
    _fetched.add(file)
    return file


def forget(file: Path) -> None:
    """Delete a file that no reader takes if it is a link's, so that the next try fetches it again."""
    if file in _fetched:
        file.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a block. A lock ends with its process, however that ends."""
    if fcntl is None:  # several processes fetch a file each, and the last one stays
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(file: Path, link: str) -> None:
    # Another machine that shares the folder may fetch it too: the lock is this machine's.
    temporary = file.with_name(f".{platform.node()}.part")
    try:
        _download(link, temporary)
        if not is_whole(temporary):
            raise OSError("what came is cut off, or no checkpoint")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _download(link: str, file: Path) -> None:
    digest = hashlib.sha256()
    request = Request(quote(link, safe="%/:?#[]@!$&'()*+,;=~"), headers={"User-Agent": "litvit"})
    with urlopen(request, timeout=TIMEOUT) as response, file.open("wb") as out:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        name = unquote(urlparse(link).path).rpartition("/")[2]
        with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty()) as bar:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if total is not None and out.tell() != total:
            raise OSError(f"{out.tell()} of {total} bytes came: try again")
        out.flush()
        os.fsync(out.fileno())
    expected = _HASH.search(urlparse(link).path)
    if expected and not digest.hexdigest().startswith(expected[1]):
        raise OSError(f"the hash of what came begins with {digest.hexdigest()[:8]}, not {expected[1]}")


def is_whole(file: Path) -> bool:
    """Return whether a file is a checkpoint, and neither cut off nor damaged as far as its format can tell."""
    try:
        if begins_with(file, b"PK\x03\x04"):
            verify_archive(file)
        elif not begins_with(file, b"\x80"):  # torch's format before version 1.6
            with safetensors.safe_open(file, framework="pt"):
                pass
    except (OSError, zipfile.BadZipFile, safetensors.SafetensorError, InputError):
        return False
    return True
