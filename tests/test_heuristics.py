"""The host's choices, without a GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdecpp import _C

H100 = _C.DeviceProperties(multiprocessors=132, arch=90)
A100 = _C.DeviceProperties(multiprocessors=108, arch=80)


@pytest.mark.parametrize(
    ("m", "k", "chosen"),
    [(1, 4096, "gemv"), (2, 4096, "gemv"), (3, 4096, "flat_gemm"), (7, 4096, "flat_gemm"), (8, 4096, "blas")],
)
def test_linear_changes_at_the_inflection_points(m: int, k: int, chosen: str) -> None:
    assert _C.choose_linear(_C.InflectionPoints(m1=3, m2=8), m, k) == chosen


@given(m=st.integers(1, 512), k=st.integers(1, 1 << 16).filter(lambda k: k % 8))
def test_a_k_that_vector_loads_cannot_start_on_goes_to_blas(m: int, k: int) -> None:
    assert _C.choose_linear(_C.default_inflection_points(H100), m, k) == "blas"


@pytest.mark.parametrize(
    ("device", "ranges"), [(H100, ["gemv", "blas"]), (A100, ["gemv", "flat_gemm", "blas"])]
)
def test_the_default_rule_has_one_range_of_m_for_each_implementation(device, ranges: list[str]) -> None:
    points = _C.default_inflection_points(device)
    choices = [_C.choose_linear(points, m, 4096) for m in range(1, 513)]
    changes = [b for a, b in zip([None, *choices], choices, strict=False) if a != b]
    assert changes == ranges


def attention_grid(batch: int, kv_heads: int, groups: int, num_splits: int = 0, workspace: int = 16 << 20):
    """Two blocks of four waves a multiprocessor; parts of 2 KiB."""
    return _C.choose_attention_grid(H100, 2, 4, batch, kv_heads, groups, num_splits, 2048, workspace)


def test_one_short_sequence_is_not_cut_into_crumbs() -> None:
    assert attention_grid(batch=1, kv_heads=1, groups=4) == (1, 1, 0)
    assert attention_grid(batch=1, kv_heads=8, groups=64) == (1, 64, 128)


def test_one_long_sequence_fills_the_machine() -> None:
    assert attention_grid(batch=1, kv_heads=1, groups=1 << 13) == (1, 264, 528)


def test_waves_take_heads_of_their_own_where_there_are_many() -> None:
    assert attention_grid(batch=64, kv_heads=8, groups=128) == (4, 264, 528)
    assert attention_grid(batch=64, kv_heads=7, groups=128) == (1, 264, 528)


@given(
    batch=st.integers(1, 1 << 10),
    kv_heads=st.integers(1, 64),
    groups=st.integers(1, 1 << 13),
    workspace=st.integers(1 << 14, 1 << 24),
)
def test_blocks_are_resident_and_their_parts_fit(
    batch: int, kv_heads: int, groups: int, workspace: int
) -> None:
    heads, blocks, slots = attention_grid(batch, kv_heads, groups, workspace=workspace)
    assert kv_heads % heads == 0
    assert 1 <= blocks <= 2 * H100.multiprocessors
    assert slots == (2 * blocks if blocks > 1 else 0)
    assert slots * heads * 2048 <= workspace


@given(batch=st.integers(1, 1 << 10), kv_heads=st.integers(1, 64), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_kept(batch: int, kv_heads: int, num_splits: int) -> None:
    blocks = batch * kv_heads * num_splits
    assert attention_grid(batch, kv_heads, 64, num_splits) == (1, blocks, blocks if num_splits > 1 else 0)


def test_build_info_says_what_was_built_and_why() -> None:
    info = _C.build_info()
    assert "cpu: always built" in info["reasons"]
    assert "cuda: " in info["reasons"]
    assert info["cxx"]
    assert bool(info["cuda_architectures"]) == ("cuda: built" in info["reasons"])
