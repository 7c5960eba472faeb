"""Loads the op libraries into torch: the CPU one always, that of the GPUs which this torch is built for."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "lib"


@dataclass(frozen=True)
class Library:
    """One op library: where it is, and why it was not loaded if it was not."""

    name: str
    path: Path
    problem: str | None = None

    @property
    def loaded(self) -> bool:
        return self.problem is None


def _load(name: str, problem: str | None = None) -> Library:
    path = _FOLDER / f"libflashdecpp_{name}.so"
    if problem is None and not path.exists():
        problem = "not built"
    if problem is None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            problem = f"failed to load: {error}"
    return Library(name, path, problem)


def _remedy() -> str:
    here = _FOLDER.parents[1].resolve()
    return f"run `pip install .` in {here}, or from another directory if flashdecpp is installed elsewhere"


def cpu_instruction_set() -> str:
    """That of the CPU kernels: avx512_amx, avx512_bf16, avx512, avx2, neon or baseline."""
    return bytes(torch.ops.flashdecpp._cpu_isa().tolist()).decode()


def _load_all() -> dict[str, Library]:
    cpu = _load("cpu")
    if not cpu.loaded:
        raise ImportError(f"flashdecpp's op library {cpu.path} is {cpu.problem}: {_remedy()}")
    if importlib.util.find_spec("flashdecpp._C") is None:
        raise ImportError(
            f"flashdecpp is built for another Python than {sys.version.split()[0]}: {_remedy()}"
        )
    from flashdecpp import _C

    asked, built = os.environ.get("FLASHDECPP_CPU_ISA"), _C.build_info()["cpu_isas"]
    if asked is not None and cpu_instruction_set() not in built.split(", "):
        raise ImportError(
            f"FLASHDECPP_CPU_ISA is {asked!r}, which isn't built or which this CPU lacks; built are {built}"
        )
    problems: dict[str, str | None] = {"cuda": None, "hip": None}
    if torch.version.cuda is None:
        problems["cuda"] = "this torch is built without CUDA"
    if torch.version.hip is None:
        problems["hip"] = "this torch is built without ROCm"
    gpus = [_load(name, problem) for name, problem in problems.items()]
    return {library.name: library for library in (cpu, *gpus)}


LIBRARIES = _load_all()


def gpu_library() -> Library:
    """The one that serves torch's device type cuda, which ROCm's GPUs are, too; loaded or not."""
    return LIBRARIES["hip" if torch.version.hip else "cuda"]


# The inflection points of one shape: LinearRow in csrc/heuristics/linear_table.h.
LinearRow = tuple[int, int, int, int, int, int]  # dtype (a _C.DType), n, k, m1, m2, max_m


def install_linear_table(library: str, device: str, rows: Sequence[LinearRow]) -> None:
    """Replaces what linear(impl="auto") of an op library knows about a device: "cpu", or a GPU by name."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 6)
    if library == "cpu":
        torch.ops.flashdecpp._install_linear_table.cpu(table)
    else:
        torch.ops.flashdecpp._install_linear_table.gpu(device, table)
