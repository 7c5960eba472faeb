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


def test_one_short_sequence_is_not_split_into_crumbs() -> None:
    assert _C.choose_num_splits(H100, independent_blocks=8, capacity=64) == 1


def test_one_long_sequence_fills_the_machine() -> None:
    splits = _C.choose_num_splits(H100, independent_blocks=8, capacity=131072)
    assert splits * 8 >= H100.multiprocessors


@given(blocks=st.integers(1, 1 << 16), capacity=st.integers(0, 1 << 20))
def test_no_split_is_shorter_than_a_tile(blocks: int, capacity: int) -> None:
    tiles = max(1, -(-capacity // 64))
    assert 1 <= _C.choose_num_splits(H100, blocks, capacity) <= min(tiles, 128)


def test_enough_sequences_are_not_split() -> None:
    assert _C.choose_num_splits(H100, independent_blocks=2 * H100.multiprocessors, capacity=1024) == 1


def test_build_info_says_what_was_built_and_why() -> None:
    info = _C.build_info()
    assert "cpu: always built" in info["reasons"]
    assert "cuda: " in info["reasons"]
    assert info["cxx"]
    assert bool(info["cuda_architectures"]) == ("cuda: built" in info["reasons"])
