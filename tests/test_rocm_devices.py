"""How info, tune and the tables treat ROCm devices, with torch's device properties faked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashdecpp import info
from flashdecpp.tuning import device

CUDA = torch.device("cuda", 0)


@pytest.fixture(params=["gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-", "gfx1100"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    properties = SimpleNamespace(
        name="AMD Instinct",
        gcnArchName=request.param,
        multi_processor_count=104,
        warp_size=32 if request.param == "gfx1100" else 64,
        total_memory=64 << 30,
        L2_cache_size=8 << 20,
        major=9,
        minor=0,
    )
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return properties


def test_a_device_is_identified_by_its_target(gpu: SimpleNamespace) -> None:
    target = gpu.gcnArchName.partition(":")[0]
    assert device.gfx_target(CUDA) == target
    assert device.device_name(CUDA) == target
    assert device.gpu_properties(CUDA).arch == int(target[3:], 16)
    assert device.gpu_properties(CUDA).num_sms == 104


def test_inputs_are_rotated_past_the_memory_side_cache(gpu: SimpleNamespace) -> None:
    expected = {"gfx90a": 8 << 20, "gfx942": 256 << 20, "gfx1100": 96 << 20}
    assert device.cache_bytes(CUDA) == expected[device.gfx_target(CUDA)]


def test_a_table_records_its_rocm_version(gpu: SimpleNamespace) -> None:
    record = device.environment(CUDA)
    assert record["hip"] == "6.4.43482"
    assert record["driver"] != ""
    assert "cuda" not in record


def test_info_shows_target_waves_and_a_missing_library(gpu: SimpleNamespace) -> None:
    text = "\n".join(info._gpu_lines())
    target = device.gfx_target(CUDA)
    assert f"{target}, waves of {gpu.warp_size}, 104 compute units, 64 GiB" in text
    assert "the hip op library is not loaded" in text


def test_info_shows_which_kernels_run(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "gpu_library", lambda: SimpleNamespace(name="hip", loaded=True))
    text = "\n".join(info._kernel_lines())
    assert "loads through registers" in text
    assert "gemv below M = 17, blas above" in text


def test_an_nvidia_gpu_has_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert device.gfx_target(CUDA) is None
