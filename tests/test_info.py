"""What `flashdecpp info` and LLM say of a GPU or CPU that the libraries were not built for."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashdecpp import _C, ModelError, _gpu_support, _threads, info
from flashdecpp._gpu_support import cuda_code, hip_code
from flashdecpp.engine.llm import resolve_device

LOADED = SimpleNamespace(name="cuda", loaded=True, problem=None)


@pytest.mark.parametrize(
    ("architectures", "capability", "code"),
    [
        ("80-real;90a-real", (8, 0), "compiled"),
        ("80-real;90a-real", (8, 9), "compiled"),
        ("80-real;90a-real", (9, 0), "compiled"),
        ("80-real;90a-real", (7, 5), "none"),
        ("80-real;90a-real", (10, 0), "none"),
        ("80-real;90a-real", (12, 0), "none"),
        ("80-real;80-virtual;90a-real", (9, 0), "compiled"),
        ("80-real;80-virtual;90a-real", (10, 0), "jit"),
        ("80-real;80-virtual;90a-real", (12, 1), "jit"),
        ("80-virtual", (8, 0), "jit"),
        ("80-virtual", (8, 6), "jit"),
        ("80-virtual", (7, 5), "none"),
        ("86", (8, 6), "compiled"),
        ("86", (8, 9), "compiled"),
        ("86", (8, 0), "none"),
        ("86", (9, 0), "jit"),
        ("90a", (9, 0), "compiled"),
        ("90a", (10, 0), "none"),
        ("90a-virtual", (9, 0), "jit"),
        ("90a-virtual", (12, 0), "none"),
        ("100a-real", (10, 0), "compiled"),
        ("100a-real", (10, 3), "none"),
        ("100f-real", (10, 3), "compiled"),
        ("100f-real", (12, 0), "none"),
        ("103f-real", (10, 0), "none"),
        ("100f-virtual", (10, 3), "jit"),
        ("100f-virtual", (12, 0), "none"),
        ("120-real;120-virtual", (12, 1), "compiled"),
        ("120-real;120-virtual", (13, 0), "jit"),
        ("120-virtual;100-real", (10, 0), "compiled"),
        ("120-virtual;80-real", (10, 0), "none"),
        ("", (9, 0), "none"),
        ("all-major", (9, 0), "compiled"),
    ],
)
def test_code_for_an_nvidia_gpu(architectures: str, capability: tuple[int, int], code: str) -> None:
    assert cuda_code(architectures, capability) == code


def test_code_for_an_amd_gpu() -> None:
    assert hip_code("gfx90a;gfx942", "gfx942") == "compiled"
    assert hip_code("gfx90a;gfx942", "gfx94") == "none"
    assert hip_code("gfx90a;gfx942", "gfx1100") == "none"


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: str) -> None:
    """Makes torch show an NVIDIA GPU, and a loaded library that is built for these architectures."""
    properties = SimpleNamespace(
        name="NVIDIA Test",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=100,
        total_memory=16 << 30,
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": architectures})
    for module in (_gpu_support, info):
        monkeypatch.setattr(module, "gpu_library", lambda: LOADED)


def test_a_gpu_without_code_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (12, 0), "80-real;90a-real")
    text = "\n".join(info._gpu_lines())
    for part in (
        "no code for NVIDIA Test (compute capability 12.0), only for 80-real, 90a-real",
        '`TORCH_CUDA_ARCH_LIST="12.0" pip install --force-reinstall --no-deps .`',
    ):
        assert part in text
    with pytest.warns(UserWarning, match=r"the model runs on the CPU: .* no code for NVIDIA Test"):
        assert resolve_device(None) == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(
            ModelError, match=f"device {device} was asked for, but .* no code for NVIDIA Test"
        ):
            resolve_device(device)


def test_a_gpu_that_is_too_old_is_not_promised_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5), "80-real;80-virtual")
    text = "\n".join(info._gpu_lines())
    assert "NVIDIA Test has compute capability 7.5, and the CUDA kernels need 8.0" in text
    assert "pip install" not in text


def test_a_gpu_without_its_library_is_treated_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), "90a-real")
    missing = SimpleNamespace(name="cuda", loaded=False, problem="not built")
    monkeypatch.setattr(_gpu_support, "gpu_library", lambda: missing)
    with pytest.warns(UserWarning, match=r"the cuda op library is not loaded \(not built\)"):
        assert resolve_device(None) == torch.device("cpu")
    with pytest.raises(ModelError, match=r"the cuda op library is not loaded \(not built\)"):
        resolve_device("cuda")


@pytest.mark.parametrize(("capability", "jit"), [((9, 0), False), ((12, 0), True)])
def test_a_gpu_with_code_is_used(
    capability: tuple[int, int], jit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability, "80-real;80-virtual;90a-real")
    assert ("compiles on first use" in "\n".join(info._gpu_lines())) == jit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda")


AVX2 = "fpu avx avx2 fma f16c bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("fpu sse2", None),
        ("fpu avx2 fma bmi2", None),
        (AVX2, "avx2"),
        (f"{AVX2} avx512f", "avx2"),
        (AVX512, "avx512"),
        (f"{AVX512} avx512_bf16", "avx512_bf16"),
        (f"{AVX512} amx_tile amx_bf16", "avx512"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", "avx512_amx"),
    ],
)
def test_instruction_sets_of_a_processor(tmp_path: Path, flags: str, best: str | None) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: CPU\nflags\t\t: {flags}\n\nflags\t\t: {flags}\n")
    assert info.best_instruction_set(cpuinfo) == best
    assert info.best_instruction_set(tmp_path / "nowhere") is None


def test_info_says_if_the_library_lacks_the_processors_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHDECPP_CPU_ISA", raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {AVX512}\n")
    text = "\n".join(info._cpu_lines("avx2", ["baseline", "avx2"], cpuinfo))
    assert "this processor has avx512, which the library was not built for (only baseline, avx2)" in text
    assert "FLASHDECPP_CPU_ISAS=native pip install" in text
    built = info._cpu_lines("avx512", ["baseline", "avx512"], cpuinfo)
    assert "not built for" not in "\n".join(built)
    monkeypatch.setenv("FLASHDECPP_CPU_ISA", "baseline")
    chosen = info._cpu_lines("baseline", ["baseline", "avx2"], cpuinfo)
    assert "not built for" not in "\n".join(chosen)


def test_info_shows_threads_and_why() -> None:
    text = "\n".join(info._cpu_lines("baseline", ["baseline"]))
    assert f"{torch.get_num_threads()} threads" in text
    assert _threads.explanation() in text and _threads.waiting_policy() in text


def test_the_build_lists_what_it_was_built_for() -> None:
    build = _C.build_info()
    assert "baseline" in build["cpu_isas"].split(", ")
    assert bool(build["hip_architectures"]) == ("hip: built" in build["reasons"])
