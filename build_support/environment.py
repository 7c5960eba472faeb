"""torch and the tools of the environment that is built for. Nothing here imports torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MINIMUM_TORCH = "2.10"
MINIMUM_CMAKE = "3.25"
MINIMUM_SETUPTOOLS = "77"  # whose pyproject.toml knows license expressions


class Choice(NamedTuple):
    """How one op library is built, if at all: CMake's options, a sentence that explains them, the targets."""

    options: list[str]
    reason: str
    targets: Sequence[str] = ()


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


@dataclass(frozen=True)
class Torch:
    """An installed torch, as its version.py describes it."""

    folder: Path
    version: str
    cuda: str | None  # the version of CUDA that it is built with, such as "13.0"
    hip: str | None

    @property
    def new_enough(self) -> bool:
        return version_tuple(self.version) >= version_tuple(MINIMUM_TORCH)

    @classmethod
    def at(cls, folder: Path) -> Torch:
        text = (folder / "version.py").read_text()

        def value(name: str) -> str | None:
            match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
            return match[1] if match else None

        return cls(folder, value("__version__") or "", value("cuda"), value("hip"))


def find_torch() -> Torch | None:
    """torch in the environment that is built for: isolated builds hide it from import, not its folder."""
    for folder in (*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")):
        if (Path(folder) / "torch" / "version.py").is_file():
            return Torch.at(Path(folder) / "torch")
    return None


def need_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        sys.exit(f"flashdecpp: torch >= {MINIMUM_TORCH} was not found; pip install torch, then try again")
    if not torch.new_enough:
        sys.exit(
            f"flashdecpp: torch >= {MINIMUM_TORCH} is needed, but {torch.folder} has {torch.version}; "
            "pip install -U torch, then try again"
        )
    return torch


def need_setuptools(version: str) -> None:
    if version_tuple(version) < version_tuple(MINIMUM_SETUPTOOLS):
        sys.exit(
            f"flashdecpp: setuptools {MINIMUM_SETUPTOOLS} is needed, but this environment has {version}; "
            f"pip install 'setuptools>={MINIMUM_SETUPTOOLS}'"
        )


def tool(name: str, remedy: str) -> str:
    """Full path of a build tool. Exits with a hint on how to get it if it is missing."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        sys.exit(f"flashdecpp: {name} was not found; {remedy}")
    return path


def need_cmake() -> str:
    remedy = f"pip install 'cmake>={MINIMUM_CMAKE}'"
    cmake = tool("cmake", remedy)
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = text.removeprefix("cmake version ").partition("\n")[0]
    if version_tuple(version) < version_tuple(MINIMUM_CMAKE):
        sys.exit(
            f"flashdecpp: CMake {MINIMUM_CMAKE} is needed, but {cmake} is {version or 'unusable'}; {remedy}"
        )
    return cmake


def need_compiler() -> None:
    compiler = os.environ.get("CXX")
    if compiler is None and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        sys.exit("flashdecpp: no C++ compiler was found; install g++ (apt install g++) or set CXX")


def max_jobs() -> int | None:
    """The parallel compilations that MAX_JOBS allows, if it is set."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if given and not (given.isdecimal() and int(given)):
        sys.exit(f"flashdecpp: MAX_JOBS must be a number from 1 on, got {given!r}")
    return int(given) if given else None


def listed(variable: str) -> list[str]:
    """The entries of an environment variable, separated by semicolons, commas or whitespace."""
    return [entry for entry in re.split(r"[;,\s]+", os.environ.get(variable, "")) if entry]


def left_out(entries: list[str], why: str) -> str:
    return f" without {', '.join(entries)}, {why}" if entries else ""
