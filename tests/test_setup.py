"""The decisions of setup.py, without building anything."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with setup() stubbed out."""
    path = Path(__file__).parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("flashdecpp_setup", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec.loader.exec_module(module)
    for name in ("FLASHDECPP_CUDA", "TORCH_CUDA_ARCH_LIST", "FLASHDECPP_HIP", "PYTORCH_ROCM_ARCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module, "present_gpus", lambda: [])
    monkeypatch.setattr(module, "find_rocm", lambda: (Path("/opt/rocm"), "/opt/rocm/bin/amdclang++"))
    monkeypatch.setattr(module, "present_amd_gpus", lambda: [])
    return module


def test_torch_notation_becomes_cmake_architectures(build: ModuleType) -> None:
    assert build.cmake_architectures(["8.0", "9.0", "9.0a", "8.6+PTX"]) == [
        "80-real",
        "90a-real",
        "86-real",
        "86-virtual",
    ]


def test_the_newest_architectures_have_their_own_suffixes(build: ModuleType) -> None:
    assert build.cmake_architectures(["10.0a", "10.0f+PTX", "12.1"]) == [
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
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, asked, architectures, left_out
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    options, reason = build.cuda_choice()
    assert f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}" in options
    assert left_out in reason


@pytest.mark.parametrize("blank", ["", "   ", " ; ,\n"])
def test_a_blank_list_counts_as_unset(build: ModuleType, monkeypatch: pytest.MonkeyPatch, blank) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", blank)
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", blank)
    assert "not set, so the default" in build.cuda_choice()[1]
    assert "not set, so the default" in build.hip_choice()[1]


@pytest.mark.parametrize("asked", ["7.5", "Turing", "5.0 6.1+PTX"])
def test_only_old_architectures_give_a_one_line_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, asked
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has .*; the kernels need 8\.0"):
        build.cuda_choice()


@pytest.mark.parametrize("asked", ["sm_80", "8", "8.0+ptx", "native", "ampere-ish", "8.0x"])
def test_an_invalid_architecture_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch, asked) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{asked}")
    with pytest.raises(SystemExit, match=re.escape(f"TORCH_CUDA_ARCH_LIST has {asked!r}; write")):
        build.cuda_choice()


def test_a_malformed_architecture_gives_a_one_line_error(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'sm_80'"):
        build.cmake_architectures(["sm_80"])


def test_an_architecture_before_ampere_gives_a_one_line_error(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"has 7\.5; the kernels need 8\.0"):
        build.cmake_architectures(["7.5"])


def test_without_nvcc_cuda_is_left_out_and_says_why(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    options, reason = build.cuda_choice()
    assert options == ["-DFLASHDECPP_CUDA=OFF"]
    assert "no nvcc" in reason


def test_cuda_asked_for_without_nvcc_is_an_error(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("FLASHDECPP_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found; install"):
        build.cuda_choice()


def test_the_architecture_list_overrides_the_installed_gpu(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "present_gpus", lambda: ["9.0"])
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in build.cuda_choice()[0]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6")
    options, reason = build.cuda_choice()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real" in options
    assert "TORCH_CUDA_ARCH_LIST" in reason


def test_without_a_gpu_the_default_covers_ampere_and_hopper(build: ModuleType) -> None:
    options, reason = build.cuda_choice()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real" in options
    assert "no GPU here" in reason


def test_a_missing_tool_gives_a_one_line_error_with_the_remedy(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no-such-tool was not found; pip install it"):
        build.tool("no-such-tool", "pip install it")


def test_without_rocm_hip_is_left_out_and_says_why(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_rocm", lambda: None)
    options, reason = build.hip_choice()
    assert options == ["-DFLASHDECPP_HIP=OFF"]
    assert "no ROCm" in reason
    monkeypatch.setenv("FLASHDECPP_HIP", "1")
    with pytest.raises(SystemExit, match="ROCm was not found; install"):
        build.hip_choice()


def test_rocm_architectures_are_requested_or_installed_or_all(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, reason = build.hip_choice()
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx90a;gfx942;gfx1100" in options
    assert "no GPU here" in reason
    monkeypatch.setattr(build, "present_amd_gpus", lambda: ["gfx942"])
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx942" in build.hip_choice()[0]
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx906;gfx90a gfx1100")
    options, reason = build.hip_choice()
    assert "-DFLASHDECPP_HIP_ARCHITECTURES=gfx90a;gfx1100" in options
    assert "PYTORCH_ROCM_ARCH without gfx906," in reason


def test_rocm_architectures_without_matrix_instructions_give_a_one_line_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx906;gfx1030")
    with pytest.raises(SystemExit, match="has gfx906, gfx1030; the kernels need gfx90a, gfx942 or gfx11xx"):
        build.hip_choice()


def test_rocm_is_found_at_rocm_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    path = Path(__file__).parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("flashdecpp_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    for file in ("include/hip/hip_runtime.h", "bin/hipcc"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert module.find_rocm() == (tmp_path, str(tmp_path / "bin/hipcc"))
