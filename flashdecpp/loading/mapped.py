"""Read-only memory maps whose pages can be released once they have been copied."""

import mmap
from pathlib import Path

from flashdecpp.errors import ModelError

from .json_files import check_file


def map_file(path: Path) -> mmap.mmap:
    """Maps a file. Raises a ModelError for one that cannot be mapped."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:  # mmap of an empty file
        raise ModelError(f"{path} is empty") from None


def release_pages(data: mmap.mmap, offset: int, length: int) -> None:
    """Drops the whole pages of a range from this process. They can be read again from the page cache."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        data.madvise(mmap.MADV_DONTNEED, start, stop - start)
