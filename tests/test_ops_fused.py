"""The norms, rotary_append and gated_activation against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import E4M3, LAYOUTS, attention, cos_sin, int32, randn, rotary
from tolerance import assert_same, compare

from flashdecpp import ops

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# ----------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("hidden", [1, 7, 64, 576, 1000, 4096, 8200])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norm(any_place, op, hidden):
    x, weight = randn(any_place, 3, hidden) * 3, randn(any_place, hidden, seed=1)
    compare(op, x=x, weight=weight)
    compare(op, x=x, weight=weight.float(), eps=0.5)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norm_adds_to_the_residual(any_place, op):
    """The sum is rounded and stored, and the stored value is normalized."""
    for shape in ((5, 64), (2, 3, 200)):
        x, residual = randn(any_place, *shape), randn(any_place, *shape, seed=1)
        before = residual.clone()
        compare(op, x=x, weight=randn(any_place, shape[-1], seed=2), residual=residual)
        assert_same(residual, (before.float() + x.float()).to(x.dtype))


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_affine(any_place, with_weight, with_bias):
    compare(
        "layer_norm",
        x=randn(any_place, 4, 96) + 5,
        weight=randn(any_place, 96, seed=1) if with_weight else None,
        bias=randn(any_place, 96, seed=2) if with_bias else None,
    )


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norm_of_views(any_place, op):
    """Heads in a packed projection (a query norm), spaced rows, one row, and no rows."""
    packed = randn(any_place, 4, 3, 6, 64)
    weight = randn(any_place, 64, seed=1)
    for x in (packed[:, :, 1:4], packed[:, :, 2], packed[:, 0, 0], packed[0, 0, 0], packed[:0, 0, 0]):
        compare(op, x=x, weight=weight)


def test_layer_norm_far_from_zero(any_place):
    """With a mean much larger than the spread, the variance must not cancel."""
    x = randn(any_place, 2, 256) + 200
    compare("layer_norm", x=x)


# ----------------------------------------------------------------------------------- rotary embedding, append


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (128, 2), (40, 40), (256, 64)])
def test_rotary(any_place, head_dim, rotary_dim, interleaved):
    arguments = rotary(any_place, [37, 1, 5, 0], q_len=3, head_dim=head_dim, rotary_dim=rotary_dim)
    compare("rotary_append", **arguments, interleaved=interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 1, 8, 24])
def test_append_to_any_cache(any_place, block_size, layout):
    """compare checks that only the new tokens' slots change."""
    compare(
        "rotary_append", **rotary(any_place, [37, 1, 5, 0], q_len=2, block_size=block_size, layout=layout)
    )


def test_prefill(any_place):
    """Left-padded prompts with more new tokens than decode_attention takes."""
    compare("rotary_append", **rotary(any_place, [200, 3, 77], q_len=200))


def test_append_without_rotation(any_place):
    arguments = rotary(any_place, [37, 5], q_len=2) | {"cos_sin": None}
    q = arguments["q"].clone()
    compare("rotary_append", **arguments)
    assert_same(arguments["q"], q)


@pytest.mark.parametrize("block_size", [None, 16])
def test_append_to_fp8(any_place, block_size):
    arguments = rotary(any_place, [37, 1, 5], q_len=2, fp8=True, block_size=block_size)
    compare("rotary_append", **arguments)
    compare("rotary_append", **arguments | {"k_scale": None, "v_scale": None})


def test_fp8_saturates(any_place):
    values = torch.tensor([0.0, 1, -1, 104, 500, -60000, torch.inf, -torch.inf])
    values = values.to(any_place.device, any_place.dtype).view(1, 1, 1, 8)
    cache = torch.zeros(1, 1, 1, 8, device=any_place.device).to(E4M3)
    scale = torch.tensor([0.5], device=any_place.device)
    arguments = values.clone(), values.clone(), values, cache, cache.clone(), int32(any_place, [1])
    ops.rotary_append(*arguments, k_scale=scale, v_scale=scale)
    for written in arguments[3:5]:
        assert written.float().flatten().tolist() == [0, 2, -2, 208, 448, -448, 448, -448]


@pytest.mark.parametrize("block_size", [None, 16])
def test_out_of_range_positions_are_not_written(any_place, block_size):
    """Positions beyond the rotary table and beyond the cache, and blocks that don't exist."""
    arguments = rotary(any_place, [40, 40, 40, 40], q_len=2, max_len=48, block_size=block_size)
    arguments["cos_sin"] = cos_sin(any_place, 39, 64)  # covers position 38, but not 39
    compare("rotary_append", **arguments)
    arguments["seq_lens"] += int32(any_place, [0, 10**6, -(10**6), 0])
    if block_size is not None:
        arguments["block_table"][3, 2] = -5
    caches = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    ops.rotary_append(**arguments)
    for cache, before in zip((arguments["k_cache"], arguments["v_cache"]), caches, strict=True):
        changed = (cache != before) & ~(cache.isnan() & before.isnan())
        own = arguments["block_table"][0, 2] if block_size else 0
        others = [i for i in range(cache.size(0)) if i != own and (block_size or i != 3)]
        assert not changed[others].any()


@settings(max_examples=15)
@given(data=st.data())
def test_any_rotation(any_place, data):
    draw = data.draw
    kv_heads, head_dim = draw(st.integers(1, 4)), 8 * draw(st.integers(1, 32))
    arguments = rotary(
        any_place,
        draw(st.lists(st.integers(0, 60), min_size=1, max_size=4)),
        q_len=draw(st.integers(1, 20)),
        q_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        fp8=draw(st.booleans()),
        block_size=draw(st.sampled_from([None, 1, 8, 16, 40])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
    compare("rotary_append", **arguments, interleaved=draw(st.booleans()))


def test_append_then_attend(place):
    """Two prefill chunks and one decode step through the cache match one dense attention."""
    lengths, q_len = [21, 9], 5
    arguments = rotary(place, lengths, q_len=q_len, block_size=8)
    ops.rotary_append(**arguments)
    shared = ("k_cache", "v_cache", "seq_lens", "block_table")
    compare("decode_attention", q=arguments["q"], **{name: arguments[name] for name in shared})
    fresh = attention(place, lengths, block_size=8)
    assert not torch.equal(fresh["k_cache"].nan_to_num(), arguments["k_cache"].nan_to_num())


# ------------------------------------------------------------------------------------------ gated activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 3, 3072), (5, 130), (0, 8)], ids=str)
def test_gated_activation(any_place, activation, shape):
    compare("gated_activation", gate_up=randn(any_place, *shape) * 4, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_saturates(any_place, activation):
    """Where exp and tanh saturate, the activation is 0 or the gate itself, never NaN."""
    gate = torch.tensor([-1e4, -100.0, -88.8, -20.0, 0.0, 20.0, 88.8, 100.0, 1e4])
    gate_up = torch.cat((gate, torch.ones(9))).to(any_place.device, any_place.dtype)[None]
    out = compare("gated_activation", gate_up=gate_up, activation=activation)
    assert_same(out[0, 5:], gate_up[0, 5:9])
