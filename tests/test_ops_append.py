"""append_attention: rotary_append and decode_attention in one op, with the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import copy
from strategies import LAYOUTS, Place, int32, rotary
from tolerance import assert_same, compare

from flashdecpp import ops

NAN = float("nan")
CACHE = ("k_cache", "v_cache", "seq_lens", "block_table")


def assert_as_separate(arguments: dict, **options) -> None:
    """Results, caches and phi are those of the two ops, and q, k and v stay as they are."""
    apart = copy(arguments | options)
    scales = {name: apart.get(name) for name in ("k_scale", "v_scale")}
    new = {name: apart.pop(name) for name in ("q", "k", "v")}
    cache = {name: apart.pop(name) for name in CACHE}
    turn = {"cos_sin": apart.pop("cos_sin"), "interleaved": apart.pop("interleaved", False)}
    # An op that allocates might find the answer in memory that another left.
    together = copy(arguments | options)
    actual = ops.append_attention(**together)
    ops.rotary_append(**new, **cache, **turn, **scales)
    expected = ops.decode_attention(new["q"], **cache, **apart)
    for got, wanted, what in zip(actual, expected, ("out", "lse"), strict=True):
        assert_same(got, wanted, what)
    for name in ("k_cache", "v_cache"):
        assert_same(together[name].float(), cache[name].float(), name)
    if options.get("carried_phi") is not None:
        assert_same(together["carried_phi"], apart["carried_phi"], "carried_phi")
    for name in ("q", "k", "v"):
        assert_same(together[name], arguments[name], name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(64, 64), (80, 32), (128, 128), (128, 64), (96, 96), (192, 192), (256, 64), (128, 24), (40, 8)],
)
def test_rotations(place: Place, head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    """rotary_dims of 24 and 8 do not fit the vectors of one launch."""
    sizes = {"q_len": 3, "head_dim": head_dim, "rotary_dim": rotary_dim}
    assert_as_separate(rotary(place, [37, 1, 5, 0, 130], **sizes), interleaved=interleaved)
    compare("append_attention", **rotary(place, [37, 1, 5, 0], **sizes), interleaved=interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 1, 8, 16, 24, 64])
def test_cache_layout(place: Place, block_size: int | None, layout: str) -> None:
    assert_as_separate(rotary(place, [37, 1, 0, 100, 16], q_len=2, block_size=block_size, layout=layout))


@pytest.mark.parametrize("q_len", range(1, 17))
def test_new_tokens_and_left_padding(place: Place, q_len: int) -> None:
    """New tokens in one KV tile, in two, and before the first."""
    lengths = [0, 1, q_len, 15, 16, 17, 16 + q_len, 90]
    assert_as_separate(rotary(place, lengths, q_len=q_len, q_heads=6))


@pytest.mark.parametrize("group", [1, 2, 5, 7, 8, 16])
def test_query_heads_per_kv_head(place: Place, group: int) -> None:
    """Up to 64 query rows of a KV head: several query tiles, only one of which may append."""
    assert_as_separate(rotary(place, [37, 70], q_heads=2 * group, q_len=4))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("lengths", [[1000], [1025, 3, 512], [700] * 5, [33] * 40, [0, 2500, 0]])
def test_splits(place: Place, lengths: list[int], num_splits: int, head_dim: int) -> None:
    """Uniform and stream-K splits, in which one of many CTAs has the new tokens."""
    sizes = {"head_dim": head_dim, "q_heads": 8, "kv_heads": 4, "block_size": 16, "max_positions": 4096}
    assert_as_separate(rotary(place, lengths, **sizes), num_splits=num_splits)


@pytest.mark.parametrize("block_size", [None, 16])
def test_fp8_cache(place: Place, block_size: int | None) -> None:
    arguments = rotary(place, [37, 1, 5, 300], q_len=2, head_dim=128, fp8=True, block_size=block_size)
    assert_as_separate(arguments)
    assert_as_separate(arguments | {"k_scale": None, "v_scale": None})


def test_options(place: Place) -> None:
    arguments = rotary(place, [37, 200, 5], q_len=2)
    heads = torch.linspace(-1, 1, 4, device=place.device)
    assert_as_separate(arguments, window=20, softcap=5.0, alibi_slopes=heads / 8, sinks=heads, scale=0.2)
    assert_as_separate(arguments, phi=heads, fallback_count=int32(place, [0]))
    assert_as_separate(arguments, carried_phi=torch.full((3, 4), NAN, device=place.device))
    assert_as_separate(arguments | {"cos_sin": None})


def test_old_bits_at_the_new_slots_do_not_matter(place: Place) -> None:
    arguments = rotary(place, [48, 20], q_len=3, block_size=16)
    expected = ops.append_attention(**copy(arguments))
    table = arguments["block_table"].tolist()
    for sequence, length in enumerate([48, 20]):
        for position in range(length - 3, length):
            for cache in (arguments["k_cache"], arguments["v_cache"]):
                cache[table[sequence][position // 16], position % 16] = NAN
    for got, wanted in zip(ops.append_attention(**arguments), expected, strict=True):
        assert_same(got, wanted)


def test_positions_beyond_the_rotary_table_are_not_rotated(place: Place) -> None:
    arguments = rotary(place, [40, 39], q_len=2, max_positions=39)
    assert_as_separate(arguments)


def test_misaligned_projection(place: Place) -> None:
    """q, k and v that vector loads do not fit."""
    arguments = rotary(place, [40, 39], q_len=2)
    for name in ("k", "v"):
        x = arguments[name]
        shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape)
        arguments[name] = shifted.copy_(x)
    assert_as_separate(arguments)


def test_steps_in_a_row(place: Place) -> None:
    """A token at a time, each behind the launch that appended the one before."""
    arguments = rotary(place, [1, 15], block_size=None, max_len=160)  # all its slots exist
    apart = copy(arguments)
    for _ in range(64):
        arguments["seq_lens"] += 1
        apart["seq_lens"] += 1
        out, _ = ops.append_attention(**arguments)
        arguments["q"] = out + arguments["q"]
        new = {name: apart[name].clone() for name in ("q", "k", "v")}
        cache = {name: apart[name] for name in CACHE}
        ops.rotary_append(**new, **cache, cos_sin=apart["cos_sin"])
        expected, _ = ops.decode_attention(new["q"], **cache)
        apart["q"] = expected + apart["q"]
        assert_same(arguments["q"], apart["q"])


@settings(max_examples=25)
@given(data=st.data())
def test_any_call(place: Place, data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, head_dim = draw(st.integers(1, 4)), 8 * draw(st.integers(1, 32))
    q_len = draw(st.integers(1, 16))
    arguments = rotary(
        place,
        draw(st.lists(st.one_of(st.integers(0, 60), st.integers(0, 900)), min_size=1, max_size=6)),
        q_len=q_len,
        q_heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)) if draw(st.booleans()) else None,
        max_positions=draw(st.sampled_from([40, 1024])),
        fp8=draw(st.booleans()),
        block_size=draw(st.sampled_from([None, 1, 8, 16, 40])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
    assert_as_separate(
        arguments,
        interleaved=draw(st.booleans()),
        window=draw(st.sampled_from([-1, 1, 17, 200])),
        num_splits=draw(st.sampled_from([0, 0, 1, 3])),
    )
