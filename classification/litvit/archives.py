"""Archives of torch.save, verified before torch reads them."""

import zipfile
from pathlib import Path

from litvit.errors import InputError


def begins_with(path: str | Path, start: bytes) -> bool:
    """Return whether a file begins with these bytes. An archive of torch.save begins with PK, 3 and 4."""
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def verify_archive(path: str | Path, *, checksums: bool = True) -> None:
    """Verify a file of torch.save, a zip file, before torch reads it. torch looks at neither checksums nor sizes.

    Args:
        path: Zip file.
        checksums: Whether the whole file is read and compared with its checksums.

    Raises:
        zipfile.BadZipFile: The file is damaged, cut off, or no zip file.
        InputError: It would unpack to more than its own size. torch.save compresses nothing.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            unpacked = sum(record.file_size for record in records)
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            packed |= unpacked > Path(path).stat().st_size
            damaged = archive.testzip() if checksums and not packed else None
    except OSError:
        raise
    except Exception as error:  # a damaged header can make zipfile raise nearly anything
        raise zipfile.BadZipFile(str(error)) from error
    if packed:
        raise InputError(
            f"{path} is a compressed archive of {unpacked / 2**20:.0f} MiB, and torch.save compresses nothing: save "
            "the checkpoint again"
        )
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged}")
