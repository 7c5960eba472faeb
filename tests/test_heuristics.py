"""The host's choices, without a GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdecpp import _C

H100 = _C.DeviceProperties(multiprocessors=132, arch=90)
A100 = _C.DeviceProperties(multiprocessors=108, arch=80)
MI210 = _C.DeviceProperties(multiprocessors=104, arch=0x90A)
RX_7900_XTX = _C.DeviceProperties(multiprocessors=48, arch=0x1100)


@pytest.mark.parametrize(
    ("m", "k", "chosen"),
    [(1, 4096, "gemv"), (2, 4096, "gemv"), (3, 4096, "flat_gemm"), (7, 4096, "flat_gemm"), (8, 4096, "blas")],
)
def test_linear_changes_at_the_inflection_points(m: int, k: int, chosen: str) -> None:
    assert _C.choose_linear(_C.InflectionPoints(m1=3, m2=8), m, k) == chosen


@given(m=st.integers(1, 512), k=st.integers(1, 1 << 16).filter(lambda k: k % 8))
def test_a_k_that_vector_loads_cannot_start_on_goes_to_blas(m: int, k: int) -> None:
    assert _C.choose_linear(_C.default_inflection_points(H100), m, k) == "blas"


@pytest.mark.parametrize("device", [MI210, RX_7900_XTX])
def test_without_asynchronous_copies_the_default_rule_has_no_flat_gemm(device) -> None:
    points = _C.default_inflection_points(device)
    assert [_C.choose_linear(points, m, 4096) for m in (1, 16, 17)] == ["gemv", "gemv", "blas"]


@pytest.mark.parametrize("device", [H100, A100])
def test_the_default_rule_has_one_range_of_m_for_each_implementation(device) -> None:
    points = _C.default_inflection_points(device)
    choices = [_C.choose_linear(points, m, 4096) for m in range(1, 513)]
    changes = [b for a, b in zip([None, *choices], choices, strict=False) if a != b]
    assert changes == ["gemv", "flat_gemm", "blas"]


@pytest.mark.parametrize(
    ("n", "k", "blocks"),
    [
        (22016, 4096, 1),  # more tiles than multiprocessors
        (4096, 4096, 1),  # a tile is not long enough to be worth the sum
        (4096, 11008, 2),
        (1536, 1536, 4),
        (64, 64, 1),  # one stage
        (64, 1 << 16, 8),
    ],
)
def test_tiles_are_shared_along_k_where_that_is_worth_adding_up(n: int, k: int, blocks: int) -> None:
    assert _C.choose_flat_cluster(H100, n, k) == blocks


@given(n=st.integers(1, 1 << 18), k=st.integers(1, 1 << 16))
def test_every_block_of_a_cluster_has_a_stage_of_k(n: int, k: int) -> None:
    cluster = _C.choose_flat_cluster(H100, n, k)
    assert cluster in (1, 2, 4, 8)
    assert cluster == 1 or cluster * 128 <= k


def attention_team(units: int, num_splits: int = 0, most: int = 8) -> int:
    return _C.choose_attention_team(132, units, num_splits, most)


def test_clusters_leave_some_of_the_machine_over() -> None:
    assert [attention_team(units) for units in (1, 2, 8, 16, 28, 32, 40, 59, 60, 64, 256)] == [
        8, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1,
    ]  # fmt: skip


def test_a_team_is_no_larger_than_there_is_work_for() -> None:
    assert [attention_team(1, most=most) for most in (0, 1, 2, 3, 5, 8)] == [1, 1, 2, 2, 4, 8]


@given(units=st.integers(1, 1 << 20), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_of_whole_teams_whatever_the_batch(units: int, num_splits: int) -> None:
    team = attention_team(units, num_splits)
    assert num_splits % team == 0
    assert team == 8 or num_splits % (2 * team) != 0


def attention_grid(
    batch: int, units: int, groups: int, num_splits: int = 0, enough: int = 64, max_slots: int = 1 << 12
):
    """If 132 blocks run at once: blocks a unit, groups from which the work is cut by unit, shares of the
    line, most shares, blocks, slots."""
    return _C.choose_attention_grid(132, batch, units, num_splits, groups, 8, enough, max_slots)


def test_one_short_sequence_is_not_cut_into_crumbs() -> None:
    assert attention_grid(1, 8, groups=4) == (1, 0, 0, 0, 8, 0)
    assert attention_grid(1, 1, groups=64) == (8, 0, 0, 0, 8, 8)


def test_one_sequence_is_cut_by_unit_and_fills_half_of_the_machine_unless_it_is_long() -> None:
    assert attention_grid(1, 8, groups=512) == (8, 0, 0, 0, 64, 64)
    assert attention_grid(1, 8, groups=8192) == (16, 0, 0, 0, 128, 128)


def test_short_sequences_are_not_cut_where_there_are_many() -> None:
    assert attention_grid(8, 8, groups=64)[0] == 1
    assert attention_grid(8, 8, groups=128)[0] == 2


def test_half_of_the_machine_must_be_enough_to_keep_the_memory_busy() -> None:
    assert attention_grid(1, 8, groups=512, enough=65) == (16, 0, 0, 0, 128, 128)


def test_a_batch_may_go_by_unit_or_by_line() -> None:
    assert attention_grid(8, 8, groups=512) == (2, 0, 16, 16, 128, 256)
    assert attention_grid(64, 8, groups=2048) == (1, 64 * 64, 16, 64, 512, 1024)


def test_shares_and_sequences_are_aligned_where_that_costs_few_blocks() -> None:
    assert attention_grid(128, 4, groups=64)[2] == 32
    assert attention_grid(30, 4, groups=64)[2] == 33
    assert attention_grid(3, 132, groups=64)[2] == 1


@given(
    batch=st.integers(2, 1 << 10),
    kv_heads=st.integers(1, 256),
    groups=st.integers(1, 1 << 16),
    max_slots=st.integers(0, 1 << 12),
)
def test_parts_fit_into_the_workspace(batch: int, kv_heads: int, groups: int, max_slots: int) -> None:
    unit_blocks, _, shares, most_shares, blocks, slots = attention_grid(
        batch, kv_heads, groups, max_slots=max_slots
    )
    assert 1 <= shares <= most_shares
    assert shares * kv_heads <= max(132, kv_heads)
    assert most_shares * kv_heads <= blocks
    assert batch * kv_heads * unit_blocks <= blocks
    assert slots <= max_slots
    assert slots >= (2 * most_shares * kv_heads if most_shares > 1 else 0)
    assert slots >= (batch * kv_heads * unit_blocks if unit_blocks > 1 else 0)


@given(batch=st.integers(1, 1 << 10), kv_heads=st.integers(1, 64), num_splits=st.integers(1, 64))
def test_a_fixed_number_of_splits_is_kept(batch: int, kv_heads: int, num_splits: int) -> None:
    blocks = batch * kv_heads * num_splits
    expected = (num_splits, 0, 0, 0, blocks, blocks if num_splits > 1 else 0)
    assert attention_grid(batch, kv_heads, 1, num_splits) == expected


def test_build_info_says_what_was_built_and_why() -> None:
    info = _C.build_info()
    assert "cpu: always built" in info["reasons"]
    assert "cuda: " in info["reasons"]
    assert info["cxx"]
    assert bool(info["cuda_architectures"]) == ("cuda: built" in info["reasons"])
