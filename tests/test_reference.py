"""The references against torch, transformers and published vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import E4M3, Place, attention, cos_sin, randn, rotary
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from flashdecpp import reference

PLACE = Place("cpu", torch.float32)


@pytest.mark.parametrize("block_size", [None, 1, 16])
@pytest.mark.parametrize("window", [-1, 5])
def test_attention_matches_torch(block_size, window):
    arguments = attention(PLACE, [40], q_len=3, block_size=None)
    keys, values = arguments["k_cache"][0, :40], arguments["v_cache"][0, :40]
    distance = torch.arange(37, 40)[:, None] - torch.arange(40)
    visible = (distance >= 0) & (distance < (window if window > 0 else 40))
    expected = F.scaled_dot_product_attention(
        arguments["q"][0].transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=visible,
        enable_gqa=True,
    )
    paged = attention(PLACE, [40], q_len=3, block_size=block_size)
    out, _ = reference.decode_attention(**paged, window=window)
    torch.testing.assert_close(out[0].transpose(0, 1), expected)


def test_attention_logits_and_sinks():
    """Softcap, then ALiBi; a sink takes a share of the softmax but contributes no value."""
    arguments = attention(PLACE, [9], q_heads=2, kv_heads=1, block_size=None)
    slopes, sinks = torch.tensor([0.5, 0.25]), torch.tensor([1.0, -2.0])
    out, lse = reference.decode_attention(
        **arguments, scale=0.3, softcap=2.0, alibi_slopes=slopes, sinks=sinks
    )
    keys, values = arguments["k_cache"][0, :9, 0], arguments["v_cache"][0, :9, 0]
    for head in range(2):
        x = 2 * torch.tanh(0.3 * keys @ arguments["q"][0, 0, head] / 2) - slopes[head] * torch.arange(
            8, -1, -1
        )
        denominator = x.exp().sum() + sinks[head].exp()
        torch.testing.assert_close(out[0, 0, head], x.exp() @ values / denominator)
        torch.testing.assert_close(lse[0, head, 0], denominator.log())


def test_attention_rows_that_see_nothing():
    """No keys, and left padding: the 1-key sequence has only the last of 3 new tokens."""
    arguments = attention(PLACE, [0, 1], q_len=3)
    out, lse = reference.decode_attention(**arguments)
    sees = torch.tensor([[False, False, False], [False, False, True]])
    assert torch.equal((out != 0).any(-1), sees[:, :, None].expand(-1, -1, 4))
    assert torch.equal(lse.isfinite(), sees[:, None, :].expand(-1, 4, -1))
    assert (lse[~lse.isfinite()] == -torch.inf).all()

    _, lse = reference.decode_attention(**arguments, sinks=torch.arange(4.0))
    assert torch.equal(lse[0], torch.arange(4.0)[:, None].expand(4, 3))


def test_attention_carries_the_row_maximum():
    """The last token's largest visible logit; NaN rows and rows without keys keep the old phi."""
    arguments = attention(PLACE, [12, 9, 0], q_len=2, q_heads=2, kv_heads=1, block_size=None)
    arguments["q"][1, 1, 0, 0] = torch.nan
    carried = torch.full((3, 2), 5.0)
    reference.decode_attention(**arguments, scale=0.3, window=4, carried_phi=carried)
    logits = 0.3 * arguments["q"][:, 1] @ arguments["k_cache"][:, :, 0].transpose(1, 2)
    expected = torch.stack([logits[0, :, 8:12].amax(-1), logits[1, :, 5:9].amax(-1), torch.full((2,), 5.0)])
    expected[1, 0] = 5
    torch.testing.assert_close(carried, expected)


def test_attention_fp8_cache():
    arguments = attention(PLACE, [20, 7], fp8=True)
    k_scale, v_scale = arguments.pop("k_scale"), arguments.pop("v_scale")
    wide = arguments | {
        "k_cache": arguments["k_cache"].float() * k_scale[:, None],
        "v_cache": arguments["v_cache"].float() * v_scale[:, None],
    }
    out, _ = reference.decode_attention(**arguments, k_scale=k_scale, v_scale=v_scale)
    expected, _ = reference.decode_attention(**wide)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("op", [reference.linear, reference.gemv, reference.flat_gemm])
def test_linear(op):
    x, weight, bias = randn(PLACE, 2, 3, 16), randn(PLACE, 5, 16), randn(PLACE, 5)
    torch.testing.assert_close(op(x, weight, bias), F.linear(x, weight, bias))


def test_norms():
    x, weight, bias = randn(PLACE, 3, 16), randn(PLACE, 16, seed=1), randn(PLACE, 16, seed=2)
    residual = randn(PLACE, 3, 16, seed=3)
    total = x + residual
    torch.testing.assert_close(reference.rms_norm(x, weight, eps=0.1), F.rms_norm(x, [16], weight, 0.1))
    torch.testing.assert_close(
        reference.layer_norm(x, weight, bias, eps=0.1), F.layer_norm(x, [16], weight, bias, 0.1)
    )
    torch.testing.assert_close(reference.rms_norm(x, weight, residual), F.rms_norm(total, [16], weight, 1e-6))
    assert torch.equal(residual, total)


def test_rotary_halves():
    arguments = rotary(PLACE, [12], q_len=5, block_size=None)
    cos, sin = (half.repeat(1, 1, 2) for half in arguments["cos_sin"][None, 7:12].chunk(2, dim=-1))
    q, k = rotate_halves(arguments["q"], arguments["k"], cos, sin, unsqueeze_dim=2)
    reference.rotary_append(**arguments)
    torch.testing.assert_close(arguments["q"], q)
    torch.testing.assert_close(arguments["k"], k)
    assert torch.equal(arguments["k_cache"][0, 7:12], arguments["k"][0])
    assert torch.equal(arguments["v_cache"][0, 7:12], arguments["v"][0])


def test_rotary_interleaved_and_partial():
    arguments = rotary(PLACE, [12], q_len=5, rotary_dim=32, block_size=None)
    q = arguments["q"].clone()
    cos, sin = arguments["cos_sin"][None, 7:12].chunk(2, dim=-1)
    reference.rotary_append(**arguments, interleaved=True)
    torch.testing.assert_close(arguments["q"][..., :32], rotate_interleaved(q[..., :32], sin, cos))
    assert torch.equal(arguments["q"][..., 32:], q[..., 32:])


def test_rotary_skips_out_of_range_positions():
    """Left padding is neither rotated nor written; no rotation past the table, no write past the cache."""
    arguments = rotary(PLACE, [2], q_len=4, block_size=None, max_len=1) | {
        "cos_sin": cos_sin(PLACE, 1, 64),
        "k_cache": torch.zeros(1, 1, 2, 64),
        "v_cache": torch.zeros(1, 1, 2, 64),
    }
    arguments["cos_sin"][0] = 2.0  # so that position 0 rotates too
    k = arguments["k"].clone()
    reference.rotary_append(**arguments)
    changed = (arguments["k"] != k).flatten(2).any(-1)
    assert changed.tolist() == [[False, False, True, False]]
    assert torch.equal(arguments["k_cache"][0, 0], arguments["k"][0, 2])


def test_rotary_saturates_fp8():
    cache = torch.zeros(1, 1, 1, 8).to(E4M3)
    k = torch.tensor([0.0, 1.0, -1.0, 104.0, 500.0, -1e9, torch.inf, -torch.inf]).view(1, 1, 1, 8)
    scale = torch.tensor([0.5])
    lens = torch.ones(1, dtype=torch.int32)
    reference.rotary_append(k.clone(), k, k, cache, cache.clone(), lens, k_scale=scale, v_scale=scale)
    assert cache.float().flatten().tolist() == [0, 2, -2, 208, 448, -448, 448, -448]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_gated_activation(name, function):
    gate, up = randn(PLACE, 3, 16), randn(PLACE, 3, 16, seed=1)
    actual = reference.gated_activation(torch.cat((gate, up), dim=-1), activation=name)
    torch.testing.assert_close(actual, function(gate) * up)


@pytest.mark.parametrize(
    ("parameters", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 10}, [TopKLogitsWarper(10)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.0}, [TopPLogitsWarper(0.0)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
            [
                TemperatureLogitsWarper(1.7),
                TopKLogitsWarper(40),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, []),
    ],
)
def test_filters_match_transformers(parameters, processors):
    logits = randn(PLACE, 20, 300) * 2
    expected = logits
    for processor in processors:
        expected = processor(torch.zeros(20, 1, dtype=torch.long), expected)
    dtypes = {"top_k": torch.int32}
    weights = reference.kept_weights(
        logits,
        **{name: torch.full((20,), x, dtype=dtypes.get(name)) for name, x in parameters.items()},
    )
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected.softmax(-1))


def test_repetition_penalty_matches_transformers():
    logits = randn(PLACE, 4, 50)
    history = torch.randint(50, (4, 20))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(history, logits)
    weights = reference.kept_weights(logits, repetition_penalty=torch.full((4,), 1.5), seen=seen)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected.softmax(-1))


def test_ties_at_a_threshold_are_kept():
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, -1.0, 0.0]])
    one = torch.ones(1)
    assert (reference.kept_weights(logits, top_k=torch.tensor([3])) > 0).tolist() == [[1, 1, 1, 1, 0, 1]]
    assert (reference.kept_weights(logits, top_p=0.1 * one) > 0).tolist() == [[0, 1, 0, 1, 0, 0]]


def test_sample_without_a_choice():
    """NaN never wins, all -inf gives -1, greedy or not, and the chosen token is marked."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan, -1.0, 2.0, 2.0], [-inf] * 4, [nan] * 4])
    seen = torch.zeros(3, 4, dtype=torch.bool)
    assert reference.sample(logits, seen=seen).tolist() == [2, -1, -1]
    assert seen.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert reference.sample(logits, temperature=torch.ones(3)).tolist()[1:] == [-1, -1]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Random123's known-answer vectors."""
    actual = reference.philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert actual.flatten().tolist() == words
