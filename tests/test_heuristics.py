"""The host's choices, without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cli import run

from flashdecpp import _C

H100 = _C.nvidia_device("NVIDIA H100 80GB HBM3", 90, 132, 228 << 10)
H100_GENERIC = _C.nvidia_device("NVIDIA H100 80GB HBM3", 90, 132, 228 << 10, generic=True)
A100 = _C.nvidia_device("NVIDIA A100-SXM4-80GB", 80, 108, 164 << 10)
L40S = _C.nvidia_device("NVIDIA L40S", 89, 142, 100 << 10)
B200 = _C.nvidia_device("NVIDIA B200", 100, 148, 228 << 10)
RTX_5090 = _C.nvidia_device("NVIDIA GeForce RTX 5090", 120, 170, 100 << 10)
MI210 = _C.amd_device("gfx90a", 0x90A, 104, 64)
RX_7900_XTX = _C.amd_device("gfx1100", 0x1100, 48, 32)
DEVICES = (H100, H100_GENERIC, A100, L40S, B200, RTX_5090, MI210, RX_7900_XTX)


def choose_linear(points: _C.InflectionPoints, m: int, k: int) -> str:
    return _C.choose_linear(_C.LinearProblem(m=m, n=4096, k=k), H100, points).impl


@pytest.mark.parametrize(
    ("m", "k", "chosen"),
    [(1, 4096, "gemv"), (2, 4096, "gemv"), (3, 4096, "flat_gemm"), (7, 4096, "flat_gemm"), (8, 4096, "blas")],
)
def test_linear_changes_at_the_inflection_points(m: int, k: int, chosen: str) -> None:
    assert choose_linear(_C.InflectionPoints(m1=3, m2=8), m, k) == chosen


@given(m=st.integers(1, 512), k=st.integers(1, 1 << 16).filter(lambda k: k % 8))
def test_a_k_that_breaks_vector_alignment_goes_to_blas(m: int, k: int) -> None:
    assert choose_linear(_C.default_inflection_points(H100), m, k) == "blas"


@pytest.mark.parametrize("device", [MI210, RX_7900_XTX])
def test_without_asynchronous_copies_the_default_rule_has_no_flat_gemm(device) -> None:
    points = _C.default_inflection_points(device)
    assert [choose_linear(points, m, 4096) for m in (1, 16, 17)] == ["gemv", "gemv", "blas"]


@pytest.mark.parametrize("device", [H100, A100])
def test_the_default_rule_has_one_range_of_m_for_each_implementation(device) -> None:
    points = _C.default_inflection_points(device)
    choices = [choose_linear(points, m, 4096) for m in range(1, 513)]
    changes = [b for a, b in zip([None, *choices], choices, strict=False) if a != b]
    assert changes == ["gemv", "flat_gemm", "blas"]


@pytest.mark.parametrize(
    ("n", "k", "blocks"),
    [
        (22016, 4096, 1),  # more tiles than SMs
        (4096, 4096, 1),  # too short a tile to pay for the reduction
        (4096, 11008, 2),
        (1536, 1536, 4),
        (64, 64, 1),  # one stage
        (64, 1 << 16, 8),
    ],
)
def test_tiles_are_split_along_k_where_the_reduction_pays_off(n: int, k: int, blocks: int) -> None:
    assert _C.choose_flat_cluster(H100, n, k) == blocks


@given(n=st.integers(1, 1 << 18), k=st.integers(1, 1 << 16))
def test_every_cta_of_a_cluster_has_a_stage_of_k(n: int, k: int) -> None:
    cluster = _C.choose_flat_cluster(H100, n, k)
    assert cluster in (1, 2, 4, 8)
    assert cluster == 1 or cluster * 128 <= k


def attention_cluster(work_tiles: int, num_splits: int = 0, limit: int = 8, long_cache: bool = False) -> int:
    return _C.choose_attention_cluster(132, work_tiles, num_splits, limit, long_cache)


def test_clusters_leave_part_of_the_gpu_free() -> None:
    """Where two CTAs per work tile are all that fit, more of them go without a cluster."""
    assert [attention_cluster(work_tiles) for work_tiles in (1, 2, 8, 16, 29, 30, 32, 59, 60, 64, 256)] == [
        8, 8, 8, 4, 4, 1, 1, 1, 1, 1, 1,
    ]  # fmt: skip


def test_clusters_on_a_long_cache_leave_less_of_the_gpu_idle() -> None:
    """8 clusters of 8 would occupy 64 of 132 SMs, and 16 of 4 as many."""
    assert [attention_cluster(work_tiles, long_cache=True) for work_tiles in (1, 2, 4, 8, 16, 28)] == [
        8, 8, 8, 4, 1, 4,
    ]  # fmt: skip


@given(work_tiles=st.integers(1, 300), limit=st.integers(0, 8))
def test_clusters_on_a_long_cache_occupy_no_fewer_sms(work_tiles: int, limit: int) -> None:
    def occupied(cluster: int) -> int:
        resident = (132 if cluster <= 2 else 9 * 132 // 10) // cluster
        return max(resident // work_tiles, 1) * work_tiles * cluster

    short, long = (attention_cluster(work_tiles, limit=limit, long_cache=long) for long in (False, True))
    assert long <= short
    assert occupied(long) >= occupied(short)


def test_a_cluster_is_no_larger_than_its_work() -> None:
    assert [attention_cluster(1, limit=limit) for limit in (0, 1, 2, 3, 5, 8)] == [1, 1, 1, 1, 4, 8]


@given(work_tiles=st.integers(1, 1 << 20), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_whole_clusters_for_any_batch(work_tiles: int, num_splits: int) -> None:
    cluster = attention_cluster(work_tiles, num_splits)
    assert num_splits % cluster == 0
    assert cluster == 8 or num_splits % (2 * cluster) != 0


def attention_grid(
    batch: int, tiles: int, kv_tiles: int, num_splits: int = 0, min_ctas: int = 64, max_slots: int = 1 << 12
) -> tuple[int, ...]:
    """With 132 resident CTAs: uniform splits, KV tiles below which the split is stream-K, streams, their
    limit, CTAs, slots.
    """
    problem = _C.AttentionGridProblem(
        resident=132,
        batch=batch,
        work_tiles_per_sequence=tiles,
        num_splits=num_splits,
        kv_tiles=kv_tiles,
        min_kv_tiles=8,
        min_ctas=min_ctas,
        max_slots=max_slots,
    )
    return grid_tuple(_C.choose_attention_grid(problem))


def grid_tuple(grid: _C.AttentionGrid) -> tuple[int, ...]:
    return (
        grid.uniform_splits,
        grid.min_uniform_tiles,
        grid.streams,
        grid.max_streams,
        grid.blocks,
        grid.slots,
    )


def test_one_short_sequence_is_not_split_too_finely() -> None:
    assert attention_grid(1, 8, kv_tiles=4) == (1, 0, 0, 0, 8, 0)
    assert attention_grid(1, 1, kv_tiles=64) == (8, 0, 0, 0, 8, 8)


def test_one_sequence_is_split_uniformly_and_fills_half_the_gpu_unless_long() -> None:
    assert attention_grid(1, 8, kv_tiles=512) == (8, 0, 0, 0, 64, 64)
    assert attention_grid(1, 8, kv_tiles=8192) == (16, 0, 0, 0, 128, 128)


def test_short_sequences_are_not_split_in_large_batches() -> None:
    assert attention_grid(8, 8, kv_tiles=64)[0] == 1
    assert attention_grid(8, 8, kv_tiles=128)[0] == 2


def test_half_the_gpu_must_be_enough_to_saturate_memory() -> None:
    assert attention_grid(1, 8, kv_tiles=512, min_ctas=65) == (16, 0, 0, 0, 128, 128)


def test_a_batch_may_be_split_uniformly_or_stream_k() -> None:
    assert attention_grid(8, 8, kv_tiles=512) == (2, 0, 16, 16, 128, 256)
    assert attention_grid(64, 8, kv_tiles=2048) == (1, 64 * 64, 16, 64, 512, 1024)


def test_streams_and_sequences_are_aligned_where_that_costs_few_ctas() -> None:
    assert attention_grid(128, 4, kv_tiles=64)[2] == 32
    assert attention_grid(30, 4, kv_tiles=64)[2] == 33
    assert attention_grid(3, 132, kv_tiles=64)[2] == 1


@given(
    batch=st.integers(2, 1 << 10),
    kv_heads=st.integers(1, 256),
    kv_tiles=st.integers(1, 1 << 16),
    max_slots=st.integers(0, 1 << 12),
)
def test_partials_fit_into_the_workspace(batch: int, kv_heads: int, kv_tiles: int, max_slots: int) -> None:
    uniform_splits, _, streams, max_streams, blocks, slots = attention_grid(
        batch, kv_heads, kv_tiles, max_slots=max_slots
    )
    assert 1 <= streams <= max_streams
    assert streams * kv_heads <= max(132, kv_heads)
    assert max_streams * kv_heads <= blocks
    assert batch * kv_heads * uniform_splits <= blocks
    assert slots <= max_slots
    assert slots >= (2 * max_streams * kv_heads if max_streams > 1 else 0)
    assert slots >= (batch * kv_heads * uniform_splits if uniform_splits > 1 else 0)


@given(batch=st.integers(1, 1 << 10), kv_heads=st.integers(1, 64), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_kept(batch: int, kv_heads: int, num_splits: int) -> None:
    blocks = batch * kv_heads * num_splits
    expected = (num_splits, 0, 0, 0, blocks, blocks if num_splits > 1 else 0)
    assert attention_grid(batch, kv_heads, 1, num_splits) == expected


# ------------------------------------------------------------- the whole choice of decode_attention
# An independent restatement of the launch code's templates from before the choice became one function. It
# must give the same numbers for every problem and device of that time.


def former_attention(p: dict, device: _C.DeviceProperties) -> tuple:
    amd, sms = device.arch >= 0x900, device.num_sms
    tma = not amd and device.has_tma and p["suits_tma"] and p["block_size"] % 16 == 0
    dims = next(dims for dims in (64, 96, 128, 192, 256) if p["head_dim"] <= dims)
    narrow, kv_bytes = dims <= 128, p["kv_bytes"]
    group = p["q_heads"] // p["kv_heads"]
    rows = p["q_len"] * group
    query_tiles = -(-rows // 16)
    slot_rows = 16 if query_tiles > 1 else rows
    per_sequence = p["kv_heads"] * query_tiles
    work_tiles = p["batch"] * per_sequence
    latency = False
    if tma:
        stages = (3 if kv_bytes == 1 else 4 if dims <= 64 else 2) if narrow else 3 if dims <= 192 else 2
        latency = narrow and p["num_splits"] == 0 and work_tiles <= sms
        warps, ctas_per_sm = (8, 1) if latency else (4, 2 if narrow else 1)
        stage_bytes = 2 * -(-dims // (128 // kv_bytes)) * 128 * 16
    else:
        warps, ctas_per_sm, stages = 4 if narrow else 2, 1, 1 if amd else 2
        stage_bytes = 2 * 16 * (dims + 16 // kv_bytes) * kv_bytes
    slot_bytes = slot_rows * (p["head_dim"] * 4 + 16) + 8
    kv_tiles = max(-(-p["capacity"] // 16), 1)
    resident = sms * ctas_per_sm
    enough = resident if query_tiles > 1 else (6 << 20) // (warps * stages * stage_bytes)
    max_cluster = 8 if p["num_splits"] > 0 else min(8, kv_tiles // warps)
    cluster = 1
    if tma and narrow:
        long_cache = kv_tiles >= 1024
        cluster = _C.choose_attention_cluster(resident, work_tiles, p["num_splits"], max_cluster, long_cache)
    worth = 128 if cluster > 1 else 2 * warps if latency else warps
    resident = (resident if cluster <= 2 else 9 * resident // 10) // cluster
    grid = _C.AttentionGridProblem(
        resident=resident,
        batch=p["batch"],
        work_tiles_per_sequence=per_sequence,
        num_splits=min(p["num_splits"] // cluster, -(-kv_tiles // worth)),
        kv_tiles=kv_tiles,
        min_kv_tiles=8 * cluster,
        min_ctas=-(-enough // cluster),
        max_slots=(16 << 20) // slot_bytes,
    )
    path = "register loads" if amd else "TMA" if tma else "cp.async"
    return path, dims, latency, warps, cluster, worth, grid_tuple(_C.choose_attention_grid(grid))


@st.composite
def attention_problems(draw: st.DrawFn) -> dict:
    kv_heads = draw(st.sampled_from([1, 2, 4, 5, 8, 32]) | st.integers(1, 64))
    return {
        "batch": draw(st.sampled_from([1, 2, 8, 64]) | st.integers(1, 1024)),
        "q_len": draw(st.integers(1, 16)),
        "q_heads": kv_heads * draw(st.integers(1, 16)),
        "kv_heads": kv_heads,
        "head_dim": 8 * draw(st.integers(1, 32)),
        "capacity": draw(st.integers(0, 4096) | st.integers(0, 1 << 20)),
        "block_size": draw(st.sampled_from([0, 1, 8, 16, 24, 32, 64, 256])),
        "num_splits": draw(st.just(0) | st.integers(0, 64)),
        "kv_bytes": draw(st.sampled_from([1, 2])),
        "suits_tma": draw(st.booleans()),
    }


@settings(max_examples=400)
@given(p=attention_problems(), device=st.sampled_from([H100, H100_GENERIC, A100, L40S, MI210, RX_7900_XTX]))
@example(
    p={
        "batch": 8,
        "q_len": 1,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "capacity": 1024,
        "block_size": 16,
        "num_splits": 0,
        "kv_bytes": 2,
        "suits_tma": True,
    },
    device=H100,
)
def test_attention_choices_are_unchanged(p: dict, device: _C.DeviceProperties) -> None:
    config = _C.choose_attention(_C.AttentionProblem(**p), device)
    chosen = (
        config.path,
        config.dims,
        config.latency,
        config.warps,
        config.cluster,
        config.min_tiles_per_cluster,
    )
    assert (*chosen, grid_tuple(config.grid)) == former_attention(p, device)


@given(p=attention_problems(), device=st.sampled_from(DEVICES))
def test_a_choice_describes_itself(p: dict, device: _C.DeviceProperties) -> None:
    problem = _C.AttentionProblem(**p)
    config = _C.choose_attention(problem, device)
    assert str(config).startswith(f"{config.path} (")
    assert f"{config.work_tiles} work tiles, {config.ctas} CTAs" in str(config)
    assert f"{p['batch']} x {p['q_len']}, {p['q_heads']}/{p['kv_heads']} heads" in str(problem)


def attention_on(device: _C.DeviceProperties, head_dim: int = 128, **others: int) -> _C.AttentionConfig:
    shapes = {"batch": 8, "q_len": 1, "q_heads": 32, "kv_heads": 8, "capacity": 1024, "block_size": 16}
    return _C.choose_attention(_C.AttentionProblem(head_dim=head_dim, **shapes, **others), device)


# ------------------------------------------------------------------------------------- capabilities


def test_capabilities_follow_from_the_compute_capability() -> None:
    capabilities = {
        device.name: (device.has_tma, device.has_clusters, device.has_pdl, device.has_wgmma)
        for device in DEVICES
    }
    assert capabilities == {
        H100.name: (False, False, True, False),  # H100_GENERIC, the last of this name
        A100.name: (False, False, False, False),
        L40S.name: (False, False, False, False),
        B200.name: (True, True, True, False),
        RTX_5090.name: (True, True, True, False),
        "gfx90a": (False, False, False, False),
        "gfx1100": (False, False, False, False),
    }
    assert H100.has_tma and H100.has_clusters and H100.has_pdl and H100.has_wgmma


def test_code_for_an_older_architecture_lacks_newer_capabilities() -> None:
    ptx = _C.nvidia_device("", 90, 132, 228 << 10, sm_90=False, sm_90a=False)
    assert not (ptx.has_tma or ptx.has_clusters or ptx.has_pdl or ptx.has_wgmma)
    sm_90 = _C.nvidia_device("", 90, 132, 228 << 10, sm_90a=False)
    assert sm_90.has_tma and sm_90.has_clusters and not sm_90.has_wgmma


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("kv_bytes", [1, 2])
def test_tma_attention_runs_where_its_shared_memory_fits(head_dim: int, kv_bytes: int) -> None:
    paths = [attention_on(device, head_dim, kv_bytes=kv_bytes).path for device in DEVICES]
    loads = "register loads"
    assert paths == ["TMA", "cp.async", "cp.async", "cp.async", "TMA", "cp.async", loads, loads]


def test_wgmma_is_hopper_only_and_gemv_uses_tensor_cores_from_hopper_on() -> None:
    problem = _C.LinearProblem(m=16, n=4096, k=4096)
    assert [_C.choose_flat_gemm(problem, device).wgmma for device in DEVICES] == [True] + 7 * [False]
    assert not _C.choose_flat_gemm(problem, H100, suits_tma=False).wgmma
    kernels = [_C.choose_gemv(device, 1).kernel for device in DEVICES]
    mma, cuda = "tensor cores", "CUDA cores"
    assert kernels == [mma, cuda, cuda, cuda, mma, mma, cuda, cuda]


def test_amd_streams_gemv_from_three_rows_on_unless_fused() -> None:
    kernels = [_C.choose_gemv(MI210, m, fused).kernel for m in (2, 3) for fused in (False, True)]
    assert kernels == ["CUDA cores", "CUDA cores", "matrix cores, streamed", "CUDA cores"]


# ------------------------------------------------------------------------------- earlier choices of linear

FLAT_TILES = (
    (8, 32, 128, 6, 1.5),
    (16, 32, 128, 5, 1.5),
    (32, 64, 128, 3, 1.2),
    (64, 128, 64, 3, 0.95),
    (128, 128, 64, 3, 0.7),
)


def former_flat_gemm(m: int, n: int, k: int, device: _C.DeviceProperties) -> tuple[int, int, int]:
    """Tile, K splits and K tiles per split of the generic kernel."""
    amd = device.arch >= 0x900
    shared = min((64 if amd else 160) << 10, device.shared_bytes_per_cta)
    index = 0
    for i, (block_m, block_n, block_k, stages, _) in enumerate(FLAT_TILES):
        fitting = min(stages, shared // ((block_m + block_n) * (block_k + 8) * 2))
        if block_m % (16 if amd else 8) or fitting < 2:
            continue
        index = i
        if block_m >= m:
            break
    block_m, block_n, block_k, _, rate = FLAT_TILES[index]
    tiles, k_tiles = -(-m // block_m) * -(-n // block_n), -(-k // block_k)
    best, best_time = 1, 0.0
    for splits in range(1, min(max(k_tiles // 3, 1), 16) + 1):
        blocks = tiles * splits
        block_kib = block_n * block_k * 2 / 1024 * -(-k_tiles // splits)
        rounds = math.ceil(blocks / (device.num_sms * 2))
        time = max(blocks * block_kib / device.num_sms, rounds * block_kib / rate) + rounds * 58
        if splits > 1:
            time += 90 + 2 * blocks * (block_m * block_n * 4 / 1024) / device.num_sms
        if splits == 1 or time < 0.97 * best_time:
            best, best_time = splits, time
    per_split = -(-k_tiles // best)
    return index, -(-k_tiles // per_split), per_split


@settings(max_examples=300)
@given(
    m=st.integers(1, 300),
    n=st.integers(1, 1 << 16),
    k=st.integers(1, 1 << 15),
    residual=st.booleans(),
    device=st.sampled_from(DEVICES),
)
def test_flat_gemm_choices_are_unchanged(
    m: int, n: int, k: int, residual: bool, device: _C.DeviceProperties
) -> None:
    config = _C.choose_flat_gemm(_C.LinearProblem(m=m, n=n, k=k, residual=residual), device)
    if config.wgmma:
        cluster = _C.choose_flat_cluster(device, n, k)
        fills = -(-n // 64) * cluster > device.num_sms
        assert (config.cluster, config.late_stages) == (cluster, 2**31 - 1 if fills or residual else 2)
    else:
        assert (config.tile, config.k_splits, config.k_tiles_per_split) == former_flat_gemm(m, n, k, device)
    assert ("wgmma" in str(config)) == config.wgmma


@given(
    m=st.integers(1, 100),
    n=st.integers(1, 1 << 16),
    k=st.integers(1, 1 << 15),
    vectors=st.booleans(),
    fused=st.booleans(),
    device=st.sampled_from(DEVICES),
)
def test_quantized_linear_choices_are_unchanged(
    m: int, n: int, k: int, vectors: bool, fused: bool, device: _C.DeviceProperties
) -> None:
    config = _C.choose_quantized_linear(_C.LinearProblem(m=m, n=n, k=k, vectors=vectors), device, fused)
    amd = device.arch >= 0x900
    assert config.streams == (vectors and m <= 48 and k % 16 == 0 and not (amd and fused))
    assert config.tiles == (2 if n >= 64 * device.num_sms else 1)


def test_the_default_rule_by_device() -> None:
    points = [_C.default_inflection_points(device) for device in DEVICES]
    assert [(p.m1, p.m2) for p in points] == [
        (9, 65), (3, 9), (3, 9), (3, 9), (9, 17), (9, 17), (17, 17), (17, 17),
    ]  # fmt: skip


def test_linear_explains_its_choice() -> None:
    def why(m: int = 1, k: int = 4096, measured: _C.InflectionPoints | None = None, **others: bool) -> str:
        return str(_C.choose_linear(_C.LinearProblem(m=m, n=4096, k=k, **others), H100, measured))

    assert why(1) == "gemv: M below 9 (the default rule)"
    assert why(9) == "flat_gemm: M from 9 to below 65 (the default rule)"
    assert why(65) == "blas: M of 65 or more (the default rule)"
    assert why(4, measured=_C.InflectionPoints(3, 9)) == "flat_gemm: M from 3 to below 9 (measured)"
    assert why(k=4095).startswith("blas: K is not a multiple of 8")
    assert why(vectors=False).startswith("blas: float32, or weight rows")


@given(m=st.integers(1, 600), k=st.integers(1, 1 << 14), dot=st.booleans())
def test_cpu_choices_are_unchanged(m: int, k: int, dot: bool) -> None:
    for dtype in (_C.DType.float32, _C.DType.float16, _C.DType.bfloat16):
        blas = dtype == _C.DType.bfloat16 and dot and m > (64 if k < 2048 else 32)
        assert _C.choose_cpu_linear(dtype, m, k, dot) == ("blas" if blas else "gemv")
        assert _C.choose_cpu_linear(dtype, m, k, dot, _C.InflectionPoints(3, 9)) == (
            "gemv" if m < 3 else "flat_gemm" if m < 9 else "blas"
        )
        expected = "decoded in registers" if m < 32 else "dequantized in strips"
        quantized = _C.choose_cpu_quantized_linear(dtype, m, k, dot)
        assert quantized == ("dequantized, then blas" if blas else expected)


# ------------------------------------------------------------------------------------- limits, info, the log


def test_limits_match_the_ops() -> None:
    limits = _C.MAX_NEW_TOKENS, _C.MAX_HEAD_DIM, _C.MAX_QUERY_GROUP, _C.MAX_STREAMED_ROWS
    assert limits == (16, 256, 16, 48)


def test_info_shows_the_choice_of_decode_attention_and_why() -> None:
    result = run("info", "--attention", "8,1,32,8,128,1024,16; 1,1,32,32,128,4096")
    assert result.status == 0, result.errors
    *_, paged, contiguous = result.output.decode().splitlines()
    assert "[8 x 1, 32/8 heads, d128, room for 1024 keys, paged by 16] -> " in paged
    assert "[1 x 1, 32/32 heads, d128, room for 4096 keys, contiguous] -> " in contiguous
    if not torch.cuda.is_available():
        expected = _C.AttentionProblem(
            batch=8, q_len=1, q_heads=32, kv_heads=8, head_dim=128, capacity=1024, block_size=16
        )
        assert paged.endswith(f"-> {_C.choose_attention(expected, H100)}")


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("8,1,32,8,128", "must be batch,q_len,q_heads,kv_heads,head_dim,max_len"),
        ("8,17,32,8,128,1024", "a q_len of 1 to 16"),
        ("8,1,32,5,128,1024", "q_heads a multiple of kv_heads"),
        ("8,1,32,1,128,1024", "at most 16 q_heads per KV head"),
        ("8,1,32,8,100,1024", "a head_dim that is a multiple of 8 up to 256"),
        ("0,1,32,8,128,1024", "a batch above 0"),
    ],
)
def test_info_validates_like_decode_attention(call: str, problem: str) -> None:
    assert problem in run("info", "--attention", call).complaint


LINEAR_TWICE = """
import torch
from flashdecpp import ops
x, weight = torch.ones(3, 64), torch.ones(32, 64)
for rows in (x, x, x[:2]):
    ops.linear(rows, weight)
"""


def stderr_of(script: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("flashdecpp: ")]


def test_the_log_shows_each_problem_once() -> None:
    assert stderr_of(LINEAR_TWICE, FLASHDECPP_LOG="choices") == [
        "flashdecpp: linear float32 [3 x 64 by [32, 64]] -> own kernel (the default rule)",
        "flashdecpp: linear float32 [2 x 64 by [32, 64]] -> own kernel (the default rule)",
    ]
    assert stderr_of(LINEAR_TWICE, FLASHDECPP_LOG="") == []


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (torch.zeros(3, 6), "rows must be int64, got float32"),
        (torch.zeros(6, dtype=torch.int64), r"rows must be \[rows, 6\]"),
        (torch.zeros(2, 5, dtype=torch.int64), "rows must have shape"),
        (torch.zeros(6, 2, dtype=torch.int64).T, "rows must be contiguous"),
    ],
)
def test_a_malformed_table_is_refused(rows: torch.Tensor, problem: str) -> None:
    with pytest.raises(RuntimeError, match=f"^flashdecpp::_install_linear_table: {problem}"):
        torch.ops.flashdecpp._install_linear_table.cpu(rows)


ATTENTION_AND_LINEAR = """
import torch
from flashdecpp import ops, reference
torch.manual_seed(0)
half = {"device": "cuda", "dtype": torch.float16}
q, lengths = torch.randn(2, 1, 8, 128, **half), torch.tensor([300, 7], device="cuda", dtype=torch.int32)
k, v = torch.randn(2, 2, 512, 2, 128, **half)
for options in ({}, {"num_splits": 3}):
    out, _ = ops.decode_attention(q, k, v, lengths, **options)
    expected, _ = reference.decode_attention(q, k, v, lengths)
    torch.testing.assert_close(out.float(), expected.float(), atol=4e-3, rtol=4e-3)
x, weight = torch.randn(16, 512, **half), torch.randn(256, 512, **half)
for op in (ops.gemv, ops.flat_gemm):
    torch.testing.assert_close(op(x, weight).float(), x.float() @ weight.float().T, atol=0.1, rtol=0.02)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["", "generic"])
def test_a_gpus_kernels_follow_its_capabilities_and_the_log_shows_them(kernels: str) -> None:
    """The library and Python agree on the GPU's capabilities, including the code built for it."""
    major, minor = torch.cuda.get_device_capability()
    lines = stderr_of(ATTENTION_AND_LINEAR, FLASHDECPP_LOG="choices", FLASHDECPP_GPU_KERNELS=kernels)
    attention, splits, gemv, flat = (line.partition(" -> ")[2] for line in lines)
    newer = (major, minor) >= (9, 0) and torch.version.hip is None and kernels == ""
    assert attention.startswith("TMA") == splits.startswith("TMA") == (newer and major != 12)
    assert gemv.startswith("tensor cores") == newer
    assert flat.startswith("wgmma") == (newer and major == 9)


@pytest.mark.gpu
def test_every_gpu_keeps_its_own_kernel_attributes() -> None:
    """Attributes are set once per kernel and device, so every device must get them, in any order."""
    from flashdecpp import ops

    for index in [*range(torch.cuda.device_count()), 0]:
        with torch.device("cuda", index):
            x, weight = torch.ones(8, 512, dtype=torch.float16), torch.ones(256, 512, dtype=torch.float16)
            q, lengths = torch.ones(1, 1, 8, 128, dtype=torch.float16), torch.tensor([64], dtype=torch.int32)
            cache = torch.ones(1, 64, 8, 128, dtype=torch.float16)
        assert ops.flat_gemm(x, weight).eq(512).all()
        assert ops.decode_attention(q, cache, cache, lengths)[0].eq(1).all()


def test_build_info_lists_what_was_built_and_why() -> None:
    info = _C.build_info()
    assert "cpu: built for baseline" in info["reasons"]
    assert "cuda: " in info["reasons"]
    assert info["cxx"]
    assert bool(info["cuda_architectures"]) == ("cuda: built" in info["reasons"])
