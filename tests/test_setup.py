"""What the build decides, what a source distribution holds, and what an interrupted build leaves."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

from flashdecpp._library import cpu_instruction_set

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from build_support import backend, cuda, environment, hip, progress  # noqa: E402
from build_support.environment import Torch  # noqa: E402

CPU_TORCH = Torch(Path("torch"), "2.13.0+cpu", None, None)
CUDA_TORCH = Torch(Path("torch"), "2.13.0+cu130", "13.0", None)
ROCM_TORCH = Torch(Path("torch"), "2.13.0+rocm7", None, "7.0")
SWITCHES = ("FLASHDECPP_CUDA", "TORCH_CUDA_ARCH_LIST", "FLASHDECPP_HIP", "PYTORCH_ROCM_ARCH", "MAX_JOBS")
# What nvcc 13.0 compiles for
NVCC = {(7, 5), (8, 0), (8, 6), (8, 7), (8, 8), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nvcc and ROCm, but without GPUs and choices of the user."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(cuda, "supported", lambda nvcc: NVCC)
    monkeypatch.setattr(cuda, "present_gpus", lambda: [])
    monkeypatch.setattr(hip, "find_rocm", lambda: (Path("/opt/rocm"), "/opt/rocm/bin/amdclang++"))
    monkeypatch.setattr(hip, "present_gpus", lambda: [])


def test_torch_notation_becomes_cmake_architectures() -> None:
    assert cuda.cmake_architectures(["8.0", "9.0", "9.0a", "8.6+PTX"]) == [
        "80-real",
        "90a-real",
        "86-real",
        "86-virtual",
    ]


def test_the_newest_architectures_have_their_own_suffixes() -> None:
    assert cuda.cmake_architectures(["10.0a", "10.0f+PTX", "12.1"]) == [
        "100a-real",
        "100f-real",
        "100f-virtual",
        "121-real",
    ]


@pytest.mark.parametrize(
    ("asked", "architectures", "left_out"),
    [
        (
            "7.5 8.0 8.6 9.0 10.0 12.0+PTX",  # as set in NVIDIA's images
            ["80-real", "86-real", "90a-real", "100-real", "120-real", "120-virtual"],
            "without 7.5,",
        ),
        ("5.2;6.0,7.0+PTX\t8.9\n", ["89-real"], "without 5.2, 6.0, 7.0+PTX,"),
        ("Volta Ampere Hopper", ["80-real", "86-real", "86-virtual", "90a-real", "90-virtual"], "7.0+PTX,"),
    ],
)
def test_architectures_that_are_too_old_are_skipped_and_reported(
    monkeypatch: pytest.MonkeyPatch, asked, architectures, left_out
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    options, reason, _ = cuda.choose(CUDA_TORCH)
    assert f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}" in options
    assert left_out in reason


@pytest.mark.parametrize("blank", ["", "   ", " ; ,\n"])
def test_a_blank_list_counts_as_unset(monkeypatch: pytest.MonkeyPatch, blank) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", blank)
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", blank)
    assert "not set, so the default" in cuda.choose(CUDA_TORCH)[1]
    assert "not set, so the default" in hip.choose(ROCM_TORCH)[1]


@pytest.mark.parametrize("asked", ["7.5", "Turing", "5.0 6.1+PTX"])
def test_only_old_architectures_give_a_one_line_error(monkeypatch: pytest.MonkeyPatch, asked) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has .*; the kernels need 8\.0"):
        cuda.choose(CUDA_TORCH)


@pytest.mark.parametrize("asked", ["sm_80", "8", "8.0+ptx", "native", "ampere-ish", "8.0x"])
def test_an_invalid_architecture_is_named(monkeypatch: pytest.MonkeyPatch, asked) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{asked}")
    with pytest.raises(SystemExit, match=re.escape(f"TORCH_CUDA_ARCH_LIST has {asked!r}; write")):
        cuda.choose(CUDA_TORCH)


def test_architectures_that_nvcc_does_not_know_are_skipped_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "supported", lambda nvcc: {(7, 5), (8, 0), (8, 6), (9, 0)})
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0a 10.0 12.0+PTX")
    options, reason, _ = cuda.choose(CUDA_TORCH)
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real" in options
    assert "without 7.5, which the kernels don't run on without 10.0, 12.0+PTX, which this nvcc" in reason
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    with pytest.raises(SystemExit, match=r"knows nothing newer than 9\.0"):
        cuda.choose(CUDA_TORCH)


def test_without_nvcc_cuda_is_left_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    options, reason, _ = cuda.choose(CUDA_TORCH)
    assert options == ["-DFLASHDECPP_CUDA=OFF"]
    assert "no nvcc" in reason


def test_cuda_asked_for_without_nvcc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    monkeypatch.setenv("FLASHDECPP_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found; install"):
        cuda.choose(CUDA_TORCH)


def test_the_architecture_list_overrides_the_installed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "present_gpus", lambda: ["9.0"])
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in cuda.choose(CUDA_TORCH)[0]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6")
    options, reason, _ = cuda.choose(CUDA_TORCH)
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real" in options
    assert "TORCH_CUDA_ARCH_LIST" in reason


def test_without_a_gpu_the_default_covers_ampere_and_hopper_and_ptx_for_newer_ones() -> None:
    options, reason, _ = cuda.choose(CUDA_TORCH)
    assert "-DCMAKE_CUDA_ARCHITECTURES=80;90a-real" in options  # "80" is sm_80's code and its PTX
    assert "no GPU here" in reason


def test_a_missing_tool_gives_a_one_line_error_with_the_remedy() -> None:
    with pytest.raises(SystemExit, match="no-such-tool was not found; pip install it"):
        environment.tool("no-such-tool", "pip install it")


def test_without_rocm_hip_is_left_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hip, "find_rocm", lambda: None)
    options, reason, _ = hip.choose(ROCM_TORCH)
    assert options == ["-DFLASHDECPP_HIP=OFF"]
    assert "no ROCm" in reason
    monkeypatch.setenv("FLASHDECPP_HIP", "1")
    with pytest.raises(SystemExit, match="ROCm was not found; install"):
        hip.choose(ROCM_TORCH)


def test_rocm_architectures_are_requested_or_installed_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    options, reason, _ = hip.choose(ROCM_TORCH)
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx90a;gfx942;gfx1100" in options
    assert "no GPU here" in reason
    monkeypatch.setattr(hip, "present_gpus", lambda: ["gfx942"])
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx942" in hip.choose(ROCM_TORCH)[0]
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx906;gfx90a gfx1100")
    options, reason, _ = hip.choose(ROCM_TORCH)
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx90a;gfx1100" in options
    assert "PYTORCH_ROCM_ARCH without gfx906," in reason


def test_rocm_architectures_without_matrix_instructions_give_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx906;gfx1030")
    with pytest.raises(SystemExit, match="has gfx906, gfx1030; the kernels need gfx90a, gfx942 or gfx11xx"):
        hip.choose(ROCM_TORCH)


def test_rocm_is_found_at_rocm_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    for file in ("include/hip/hip_runtime.h", "bin/hipcc"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert hip.find_rocm() == (tmp_path, str(tmp_path / "bin/hipcc"))


@pytest.mark.parametrize(
    ("library", "torch", "gpus", "variables", "built"),
    [
        (cuda, CPU_TORCH, [], {}, False),
        (cuda, CUDA_TORCH, [], {}, True),
        (cuda, CPU_TORCH, ["9.0"], {}, True),
        (cuda, CPU_TORCH, [], {"TORCH_CUDA_ARCH_LIST": "9.0"}, True),
        (cuda, CPU_TORCH, [], {"FLASHDECPP_CUDA": "1"}, True),
        (cuda, CUDA_TORCH, ["9.0"], {"FLASHDECPP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}, False),
        (hip, CPU_TORCH, [], {}, False),
        (hip, CUDA_TORCH, [], {}, False),
        (hip, ROCM_TORCH, [], {}, True),
        (hip, CPU_TORCH, ["gfx942"], {}, True),
        (hip, CPU_TORCH, [], {"PYTORCH_ROCM_ARCH": "gfx90a"}, True),
        (hip, CPU_TORCH, [], {"FLASHDECPP_HIP": "1"}, True),
        (hip, ROCM_TORCH, ["gfx942"], {"FLASHDECPP_HIP": "0"}, False),
    ],
)
def test_a_gpu_library_is_built_where_it_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
    library,
    torch: Torch,
    gpus: list[str],
    variables: dict[str, str],
    built: bool,
) -> None:
    monkeypatch.setattr(library, "present_gpus", lambda: gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options, reason, _ = library.choose(torch)
    name = library.__name__.rpartition(".")[2]
    assert (
        (options[0] == f"-DFLASHDECPP_{name.upper()}=ON") == built == reason.startswith(f"{name}: built for")
    )


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None",
            (None, None, True),
        ),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None", ("13.0", None, True)),
        ("__version__ = '2.10.0'\ncuda = None\nhip: Optional[str] = '7.0.1'", (None, "7.0.1", True)),
        ("__version__ = '2.9.1+cu128'\ncuda = '12.8'", ("12.8", None, False)),
    ],
)
def test_torch_is_described_without_importing_it(tmp_path: Path, lines: str, expected: tuple) -> None:
    (tmp_path / "version.py").write_text(lines + "\n")
    found = Torch.at(tmp_path)
    assert (found.cuda, found.hip, found.new_enough) == expected


def test_the_torch_of_this_environment_is_found() -> None:
    import torch

    found = environment.find_torch()
    assert found is not None
    assert (found.version, found.cuda, found.hip) == (
        torch.__version__,
        torch.version.cuda,
        torch.version.hip,
    )
    assert (found.folder / "include/torch/csrc/stable").is_dir()


def test_an_old_torch_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "find_torch", lambda: Torch(tmp_path, "2.9.1", None, None))
    with pytest.raises(SystemExit, match=r"torch >= 2\.10 is needed, but .* has 2\.9\.1; pip install"):
        environment.need_torch()
    monkeypatch.setattr(environment, "find_torch", lambda: None)
    with pytest.raises(SystemExit, match="torch >= 2\\.10 was not found; pip install torch"):
        environment.need_torch()


def test_an_old_cmake_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    cmake.chmod(0o755)
    monkeypatch.setattr(environment, "tool", lambda name, remedy: str(cmake))
    with pytest.raises(SystemExit, match=r"CMake 3\.25 is needed, but .*/cmake is 3\.18\.4; pip install"):
        environment.need_cmake()


def test_an_old_setuptools_is_a_one_line_error() -> None:
    with pytest.raises(SystemExit, match=r"setuptools 77 is needed, but this environment has 65\.5\.0; pip"):
        environment.need_setuptools("65.5.0")
    environment.need_setuptools("77.0.3")


@pytest.mark.parametrize("given", ["0", "-2", "many", "1.5"])
def test_an_invalid_number_of_jobs_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a number from 1 on, got '{given}'"):
        environment.max_jobs()


@pytest.mark.parametrize(("found", "wanted"), [(None, ["torch>=2.10"]), (CPU_TORCH, [])])
def test_only_builds_that_compile_ask_for_torch(monkeypatch: pytest.MonkeyPatch, found, wanted) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend, "find_torch", lambda: found)
    assert backend.get_requires_for_build_wheel() == wanted
    assert backend.get_requires_for_build_editable() == wanted
    assert backend.get_requires_for_build_sdist() == []


def test_an_sdist_holds_all_sources(tmp_path: Path) -> None:
    build = "from build_support import backend; import sys; print(backend.build_sdist(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    folders = ("build_support", "csrc", "flashdecpp", "tests", "bench", "docs", "examples")
    wanted = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and "__pycache__" not in path.parts
    }
    assert len(wanted) > 300
    assert wanted <= held
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith(".so") or name.startswith(("build/", ".venv"))]


# --- CMake


def configure(build: Path, *options: str) -> str:
    cmake, ninja = environment.need_cmake(), environment.tool("ninja", "")
    command = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DFLASHDECPP_PYTHON=OFF",
        *options,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_missing_pybind11_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pybind11.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        configure(tmp_path / "build", "-DFLASHDECPP_PYTHON=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON")
    assert "needs pybind11" in failed.value.stderr


def test_native_is_what_the_library_would_choose_and_the_baseline(tmp_path: Path) -> None:
    chosen = configure(tmp_path / "native")
    isas = re.search(r"cpu: built for ([\w, ]+) \(this processor's best, and the baseline\)", chosen)
    assert isas is not None
    assert set(isas[1].split(", ")) == {"baseline", cpu_instruction_set()}
    assert "cpu: built for baseline, avx2 (" in configure(tmp_path / "named", "-DFLASHDECPP_CPU_ISAS=avx2")
    everything = configure(tmp_path / "all", "-DFLASHDECPP_CPU_ISAS=all")
    assert "cpu: built for baseline, avx2, avx512, avx512_bf16" in everything


def test_an_unknown_instruction_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        configure(tmp_path, "-DFLASHDECPP_CPU_ISAS=avx2|avx3")
    assert "FLASHDECPP_CPU_ISAS has avx3;" in failed.value.stderr


def test_the_build_says_how_much_it_compiles(tmp_path: Path) -> None:
    configure(tmp_path, "-DFLASHDECPP_CPU_ISAS=avx2")
    sources = progress.steps(tmp_path, environment.tool("ninja", ""))
    names = {Path(source).name for source in sources}
    assert {"ops.cpp.o", "isa_baseline.cpp.o", "isa_avx2.cpp.o", "attention.cpp.o"} <= names
    assert len(names) == len(sources)
    said = progress.announce(sources, 1, 2)
    assert re.fullmatch(rf"flashdecpp compiles {len(sources)} files, about .* on 2 cores", said)
    assert (
        progress.announce(["a.cu"] * 30, 2, 2) == "flashdecpp compiles 30 files, about 10 minutes on 2 cores"
    )
    assert progress.announce(["isa_avx2.cpp"], 1, 16).endswith("about 40 seconds on 16 cores")


def test_max_jobs_limits_the_cores_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = progress.available_cores()
    monkeypatch.setenv("MAX_JOBS", "1")
    assert progress.available_cores() == 1
    monkeypatch.setenv("MAX_JOBS", "1000")
    assert progress.available_cores() == cores


# --- Interrupted builds, of a project with one source and one header

LISTS = """
cmake_minimum_required(VERSION 3.25)
project(answer LANGUAGES CXX)
add_executable(answer answer.cpp)
"""
SOURCE = """
#include <cstdio>
#include "answer.h"
int main() { std::printf("%d", ANSWER); }
"""
# Where there is a file `hang`, writes half an object and waits to be killed. Where there is a file `silent`,
# names no headers, as after a crash that lost the end of a file.
COMPILER = """#!{python}
import pathlib, subprocess, sys, time
arguments, folder = sys.argv[1:], pathlib.Path({folder!r})
if "-c" in arguments and (folder / "hang").exists():
    pathlib.Path(arguments[arguments.index("-o") + 1]).write_bytes(b"\\x7fELF")
    (folder / "hangs").touch()
    time.sleep(60)
subprocess.run(["c++", *arguments], check=True)
if "-MF" in arguments and (folder / "silent").exists():
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text("")
"""


class Project:
    def __init__(self, folder: Path, forget_unfinished: Callable[[Path, str], None]) -> None:
        self.folder, self.build, self.forget_unfinished = folder, folder / "build", forget_unfinished
        self.ninja = environment.tool("ninja", "")
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.format(python=sys.executable, folder=str(folder)))
        compiler.chmod(0o755)
        (folder / "CMakeLists.txt").write_text(LISTS)
        (folder / "answer.cpp").write_text(SOURCE)
        self.set_answer(1)
        command = [environment.need_cmake(), "-S", str(folder), "-B", str(self.build), "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={self.ninja}", f"-DCMAKE_CXX_COMPILER={compiler}"]
        subprocess.run(command, check=True, capture_output=True)

    def set_answer(self, value: int) -> None:
        (self.folder / "answer.h").write_text(f"#define ANSWER {value}\n")

    def answer(self) -> int:
        """That of the program as setup.py builds it."""
        self.forget_unfinished(self.build, self.ninja)
        subprocess.run([self.ninja, "-C", str(self.build)], check=True, capture_output=True)
        return int(subprocess.run([str(self.build / "answer")], check=True, capture_output=True).stdout)

    def kill_build(self, sent: signal.Signals) -> None:
        """Ends ninja and the compiler in the middle of a compilation."""
        (self.folder / "hang").touch()
        ninja = subprocess.Popen(
            [self.ninja, "-C", str(self.build)], stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 30
        while not (self.folder / "hangs").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(ninja.pid, sent)
        ninja.wait()
        (self.folder / "hang").unlink()
        (self.folder / "hangs").unlink()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return Project(tmp_path, runpy.run_path(str(ROOT / "setup.py"))["forget_unfinished"])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_half_an_object_is_compiled_again(project: Project, sent: signal.Signals) -> None:
    project.kill_build(sent)
    assert project.answer() == 1
    project.set_answer(2)
    project.kill_build(sent)
    assert project.answer() == 2


def test_an_object_without_its_headers_is_compiled_again(project: Project) -> None:
    (project.folder / "silent").touch()
    assert project.answer() == 1
    (project.folder / "silent").unlink()
    project.set_answer(2)
    assert project.answer() == 2
