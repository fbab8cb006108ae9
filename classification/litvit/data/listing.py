"""The images of a folder or .tar with one folder per class: what is an image, of which class, and what is left out."""

import glob
import io
import os
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from timm.data.readers.reader import Reader

from litvit.errors import InputError, printable

# Formats that Pillow names but does not decode itself: documents, films, and those of other programs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_LEFTOVERS = {"__MACOSX", "@eaDir"}  # of macOS's archives and Synology's disks
_NUMBERS = re.compile(r"\d+")
_SHOWN = 3  # examples of what is left out
STDIN = "-"


def image_suffixes() -> set[str]:
    """Return the suffixes of files that the installed Pillow reads, such as ".jpg", in lower case."""
    formats = Image.registered_extensions()  # loads all of Pillow's formats
    suffixes = {suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _NOT_DECODED}
    return suffixes | {".mpo"}  # JPEG files of several pictures


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names as timm does: numbers in them count as numbers, and capitals like small letters. No two names tie."""
    return sorted(sorted(names), key=lambda name: _NUMBERS.sub(_sortable_number, name.lower()))


def _sortable_number(match: re.Match) -> str:
    digits = str(int(match[0]))
    return f"\0{chr(len(digits))}{digits}"  # before all text, and by length before digits


def shorten(names: Collection[str]) -> str:
    """Join the first few names for a message."""
    shown = ", ".join(printable(str(name)) for name in list(names)[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")


class ImageFiles(Reader):
    """The images of a folder or .tar, in the order of their names: a reader of timm's interface.

    `<class>/.../<image>` is an image of the class, whatever lies between. A folder or .tar that holds all its images in
    one folder of several ones, such as `train/cat`, `train/dog`, has these for classes.

    Args:
        root: Folder or .tar. A .tar may hold one .tar per class.
        known_classes: Class names that a folder which holds everything is not looked through for.

    Attributes:
        class_to_idx: Class name to number, in natural order.
        notes: Sentences on what was left out, and what was taken for a class.

    Raises:
        InputError: no images in class folders.
        OSError, tarfile.TarError: a folder that cannot be listed, or a .tar that is broken or cut off.
    """

    def __init__(self, root: Path, known_classes: Collection[str] = ()):
        super().__init__()
        self.root = root
        found = _TarScan() if root.is_file() else _FolderScan()
        images = natural_order(found.walk(root))
        self._places = found.places
        common = _common_folder(images, known_classes)
        names, classes, nested = [], [], []
        for name in images:
            class_name, _, rest = name[len(common) :].partition("/")
            if not rest:
                found.leave_out("images outside of class folders", name)
                continue
            names.append(name)
            classes.append(class_name)
            if "/" in rest:
                nested.append(name)
        self.class_to_idx = {name: number for number, name in enumerate(natural_order(set(classes)))}
        self.names, self.targets = names, [self.class_to_idx[name] for name in classes]
        self.notes = [f"left out {len(files)} {reason}: {shorten(files)}" for reason, files in found.left_out.items()]
        if common:
            self.notes.append(f"the classes are the folders in {printable(common)}")
        if nested:
            self.notes.append(f"{len(nested)} images lie deeper in the folder of their class: {shorten(nested)}")
        inside = {name[len(common) :].partition("/")[0] for name in found.folders if name.startswith(common)}
        empty = natural_order(inside - self.class_to_idx.keys() - {""})
        if empty:
            self.notes.append(f"left out {len(empty)} folders without images as classes: {shorten(empty)}")
        if not names:
            why = "; ".join(self.notes) or "it is empty"
            raise InputError(f"{printable(root)} has no images in folders of classes ({why})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        name = self.names[index]
        if self._places is None:
            return open(os.path.join(self.root, name), "rb"), self.targets[index]
        offset, size = self._places[name]
        with open(self.root, "rb") as tar:
            tar.seek(offset)
            return io.BytesIO(tar.read(size)), self.targets[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.names[index]
        if basename:
            return os.path.basename(name)
        return os.path.join(self.root, name) if absolute else name


class NamedFiles(Reader):
    """Image files without classes, as a reader of timm's interface."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names, self.targets, self.class_to_idx = names, [0] * len(names), {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.names[index], "rb"), 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.names[index]


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a .tar.

    Raises:
        tarfile.ReadError: the .tar is cut off, a header is damaged, or another archive follows. `tarfile` takes all of
            these for the end.
    """
    for member in tar:
        tar.members = []  # tarfile keeps them all, which takes twice the memory of the listing
        yield member
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off: fetch or pack it again")
    if end.strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged from byte {tar.offset}: fetch or pack it again")
    while end:
        end = tar.fileobj.read(1 << 20)
        if end.strip(b"\0"):
            raise tarfile.ReadError("another archive follows its end: pack both as one")


def image_files(root: Path) -> list[str]:
    """Return the paths of all images in a folder, relative to it, in the order of their names.

    Raises:
        OSError: the folder cannot be listed.
    """
    return natural_order(_FolderScan().walk(root))


def find_images(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find the image files that a command line names.

    Args:
        sources: Files, folders, which are searched with all that is in them, patterns, or "-" for names on stdin, one
            per line.

    Returns:
        Paths of the files, and a line for each source without any.
    """
    found, problems = [], []
    for source in sources:
        if source == STDIN:
            lines = [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
            names, more = find_images([line for line in lines if line != STDIN])
            found += names
            problems += more
            continue
        paths = [source] if os.path.lexists(source) else sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not paths:
            problems.append(f"no image at {printable(source)}")
        if "**" in source:  # it names what is in the folders, too
            paths = [path for path in paths if not os.path.isdir(path)]
        for path in paths:
            try:
                inside = image_files(Path(path)) if os.path.isdir(path) else None
            except OSError as error:
                problems.append(f"cannot list {printable(path)}: {error.strerror}")
                continue
            if inside == []:
                problems.append(f"{printable(path)} holds no images")
            found += [path] if inside is None else [os.path.join(path, name) for name in inside]
    return found, problems


def class_folders(root: Path) -> list[str]:
    """Return the names of the classes that `ImageFiles` finds in a folder, without listing all of its images."""
    classes = {path.partition("/")[0] for path in _FolderScan().walk(root, one_per_class=True) if "/" in path}
    return natural_order(classes) if len(classes) > 1 else list(ImageFiles(root).class_to_idx)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _common_folder(images: list[str], known_classes: Collection[str]) -> str:
    """Return the folder, with a slash, that holds all images in several folders; "" if the root does."""
    folders = {image.rpartition("/")[0] for image in images}
    common = os.path.commonpath(folders) if folders else ""
    return "" if common in folders or not common or common.split("/")[0] in known_classes else f"{common}/"


class _Scan:
    """A walk over the files below a root, by paths relative to it, with slashes.

    Attributes:
        folders: Folders that may hold images.
        left_out: Reason to what was left out for it.
        places: Offset and size of every image in the .tar, in bytes; None for a folder.
    """

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self.left_out: dict[str, dict[str, None]] = defaultdict(dict)  # each path once, in order
        self.places: dict[str, tuple[int, int]] | None = None
        self._suffixes = image_suffixes()

    def leave_out(self, reason: str, path: str) -> None:
        """Note what is left out, once."""
        self.left_out[reason][path] = None

    def hides(self, path: str, name: str) -> bool:
        """Leave out what is hidden, or a leftover of another program. Returns whether it is."""
        is_hidden = _is_hidden(name)
        if is_hidden:
            self.leave_out("hidden files and folders", path)
        return is_hidden

    def is_image(self, path: str) -> bool:
        """Leave out a file whose suffix is not that of an image. Returns whether it is one."""
        suffix = os.path.splitext(path)[1].lower()
        if suffix in self._suffixes:
            return True
        self.leave_out(f"files that are not images ({printable(suffix) or 'no suffix'})", path)
        return False


class _FolderScan(_Scan):
    """A walk over a folder. Links to folders are followed, but not in circles."""

    def walk(self, root: Path, one_per_class: bool = False) -> Iterator[str]:
        """Yield the images, or one of every folder in the root."""
        folders: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", ())]
        done = set()
        while folders:
            folder, prefix, passed = folders.pop()
            if one_per_class and prefix.partition("/")[0] in done:
                continue
            try:
                listed = os.scandir(folder)
            except OSError as error:
                if not prefix:
                    raise
                self.leave_out("folders that cannot be listed", f"{prefix[:-1]} ({error.strerror})")
                continue
            with listed as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if self.hides(path, entry.name):
                        continue
                    try:
                        is_folder, is_link = entry.is_dir(), entry.is_symlink()
                    except OSError:  # a link to itself
                        self.leave_out("links in a circle", path)
                        continue
                    if is_folder:
                        through = passed
                        if is_link:
                            target, through = os.path.realpath(entry.path), (*passed, os.path.realpath(folder))
                            if any(f"{place}/".startswith(f"{target}/") for place in through):
                                self.leave_out("links in a circle", path)
                                continue
                        self.folders.add(path)
                        folders.append((entry.path, f"{path}/", through))
                    elif self.is_image(path):
                        # A link that leads nowhere stays an image, which reading will name.
                        if is_link or entry.is_file():
                            yield path
                            if one_per_class and prefix:
                                done.add(prefix.partition("/")[0])
                                break
                        else:
                            self.leave_out("pipes, sockets and devices", path)


class _TarScan(_Scan):
    """A walk over a .tar, and over the .tar files in it."""

    def walk(self, root: Path) -> Iterator[str]:
        """Yield the images, each once, and note their places."""
        self.places, self._links = {}, {}
        with tarfile.open(root, "r:") as tar:
            self._scan(tar, "", 0)
        places = dict(self.places)
        for path in self._links:
            target, passed = path, set()
            while target in self._links and target not in passed:
                passed.add(target)
                target = self._links[target]
            inside = (
                []
                if f"{path}/".startswith(f"{target}/")
                else [name for name in places if name.startswith(f"{target}/")]
            )
            for name in inside:  # a link to a folder
                self.places[path + name[len(target) :]] = places[name]
            if target in places and self.is_image(path):
                self.places[path] = places[target]
            elif target not in places and not inside:
                self.leave_out("links to what the .tar does not hold", path)
        yield from self.places

    def _scan(self, tar: tarfile.TarFile, prefix: str, start: int) -> None:
        for member in tar_members(tar):
            path = prefix + os.path.normpath(member.name).lstrip("/")
            parts = path.split("/")
            if ".." in parts:
                self.leave_out("names that lead out of the .tar", path)
            elif path in (".", "") or any(self.hides("/".join(parts[: i + 1]), part) for i, part in enumerate(parts)):
                continue
            elif member.isdir():
                self.folders.add(path)
            elif member.isreg() and path.lower().endswith(".tar"):
                try:
                    with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                        self._scan(inner, f"{path[:-4]}/", start + member.offset_data)
                except tarfile.TarError as error:
                    raise tarfile.ReadError(f"{path} in it: {error}") from error
            elif member.islnk() or member.issym():
                # A hard link names a member, a symbolic one a path from its own folder.
                base = os.path.dirname(path) if member.issym() else prefix
                name = member.linkname if member.issym() else member.linkname.lstrip("/")
                self._links[path] = os.path.normpath(os.path.join(base, name))
                self.places.pop(path, None)  # of members with one name the last one counts
            elif not self.is_image(path):
                continue
            elif not member.isreg() or member.issparse():
                self.leave_out("pipes, devices and sparse files", path)
            else:
                self.places[path] = start + member.offset_data, member.size
                self._links.pop(path, None)
