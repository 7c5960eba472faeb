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


def attention_grid(units: int, groups: int, num_splits: int = 0, max_slots: int = 1 << 12):
    """Blocks, those that fill the machine, and slots; one block a multiprocessor, worth 8 groups at least."""
    return _C.choose_attention_grid(H100, 1, units, num_splits, groups, 8, max_slots)


def test_one_short_sequence_is_not_cut_into_crumbs() -> None:
    assert attention_grid(units=1, groups=4) == (1, 1, 0)
    assert attention_grid(units=8, groups=8 * 64) == (64, 64, 128)


def test_one_long_sequence_fills_the_machine() -> None:
    assert attention_grid(units=1, groups=1 << 13) == (132, 132, 264)


def test_units_are_cut_evenly_where_that_costs_few_blocks() -> None:
    assert attention_grid(units=64, groups=1 << 13) == (128, 128, 256)
    assert attention_grid(units=256, groups=1 << 15) == (128, 128, 256)
    assert attention_grid(units=100, groups=1 << 13) == (132, 132, 264)


def test_much_work_is_evened_out_by_small_blocks() -> None:
    assert attention_grid(units=8, groups=1 << 18) == (3 * 132, 132, 6 * 132)
    assert attention_grid(units=8, groups=1 << 18, max_slots=6 * 132 - 1) == (128, 128, 256)


@given(units=st.integers(1, 1 << 16), groups=st.integers(1, 1 << 20), max_slots=st.integers(0, 1 << 12))
def test_parts_fit_into_the_workspace(units: int, groups: int, max_slots: int) -> None:
    blocks, filling, slots = attention_grid(units, units * groups, max_slots=max_slots)
    assert 1 <= filling <= H100.multiprocessors
    assert blocks in (filling, 3 * H100.multiprocessors)
    assert slots == (2 * blocks if blocks > 1 else 0)
    assert slots <= max_slots or blocks == 1


@given(units=st.integers(1, 1 << 16), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_kept(units: int, num_splits: int) -> None:
    blocks = units * num_splits
    assert attention_grid(units, units, num_splits) == (blocks, blocks, blocks if num_splits > 1 else 0)


def test_build_info_says_what_was_built_and_why() -> None:
    info = _C.build_info()
    assert "cpu: always built" in info["reasons"]
    assert "cuda: " in info["reasons"]
    assert info["cxx"]
    assert bool(info["cuda_architectures"]) == ("cuda: built" in info["reasons"])
