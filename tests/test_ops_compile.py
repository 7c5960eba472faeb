"""The ops under torch.compile, in CUDA graphs, on another stream, and under torch.library.opcheck."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import NAN, Place, attention, every_op, int32, randn, rotary, sampling, wrapper
from tolerance import assert_same, compare, overload_for
from torch import Tensor

from flashdecpp import ops

OPS = tuple(every_op(Place("cpu", torch.float32)))


def clean(arguments: dict) -> dict:
    """The arguments without NaN, since opcheck compares tensors by value."""
    return {name: x.nan_to_num() if is_float(x) else x for name, x in arguments.items()}


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def copy(arguments: dict) -> dict:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def outcome(function, arguments: dict) -> list[Tensor]:
    """Everything an op returns, then all its arguments as the op leaves them."""
    result = function(**arguments)
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    return returned + [x for x in arguments.values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(place, op):
    arguments = clean(every_op(place)[op])
    overload = overload_for(op, arguments)
    positional = [a.name for a in overload._schema.arguments if not a.kwarg_only and a.name in arguments]
    torch.library.opcheck(overload, tuple(arguments.pop(name) for name in positional), arguments)


@pytest.mark.parametrize("op", OPS)
def test_opcheck_without_options(one_place, op):
    """Only the required arguments."""
    arguments = clean(every_op(one_place)[op])
    name, _, overload = op.partition(".")
    packet = getattr(torch.ops.flashdecpp, name)
    overload = getattr(packet, overload if overload in packet.overloads() else "default")
    if name in ("decode_attention", "rotary_append"):
        contiguous = attention if name == "decode_attention" else rotary
        arguments |= clean(contiguous(one_place, [5, 33], q_len=2, block_size=None))
    needed = [a for a in overload._schema.arguments if not a.has_default_value()]
    torch.library.opcheck(
        overload,
        tuple(arguments[a.name] for a in needed if not a.kwarg_only),
        {a.name: arguments[a.name] for a in needed if a.kwarg_only},
    )


@pytest.mark.parametrize("op", OPS)
def test_compiled_whole(one_place, op):
    function = wrapper(op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = every_op(one_place)[op]
    for actual, expected in zip(
        outcome(compiled, copy(arguments)), outcome(function, copy(arguments)), strict=True
    ):
        assert_same(actual, expected, op)


def test_compiled_once_for_any_batch(one_place):
    torch._dynamo.reset()
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 6, 9):
        arguments = attention(one_place, [20 + i for i in range(batch)], q_len=2, max_len=64)
        expected = ops.decode_attention(**arguments)
        with torch.compiler.set_stance("default" if batch == 5 else "fail_on_recompile"):
            actual = compiled(**arguments)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)


def layer(weights: dict[str, Tensor], hidden: Tensor, cache: dict, sampled: dict) -> Tensor:
    """One decoder layer plus sampling, with every kind of op."""
    batch = hidden.size(0)
    residual = hidden.clone()
    x = ops.rms_norm(hidden, weights["norm"])
    qkv = ops.linear(x, weights["qkv"]).view(batch, 1, 8, 64)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    ops.rotary_append(q, k, v, **cache)
    places = {name: cache[name] for name in ("k_cache", "v_cache", "seq_lens", "block_table")}
    out, _ = ops.decode_attention(q, **places, phi=weights["phi"])
    x = ops.flat_gemm(out.reshape(batch, 256), weights["out"])
    x = ops.layer_norm(x, weights["norm"], residual=residual)
    x = ops.gated_activation(ops.gemv(x, weights["up"]))
    return ops.sample(ops.linear(residual + x, weights["head"]), **sampled)


def step(place: Place, lengths: list[int]) -> tuple[dict, Tensor, dict, dict]:
    """The arguments of `layer`."""
    shapes = {"qkv": (512, 64), "out": (64, 256), "up": (128, 64), "head": (300, 64), "norm": (64,)}
    weights = {name: randn(place, *shape, seed=i) / 8 for i, (name, shape) in enumerate(shapes.items())}
    weights["phi"] = torch.zeros(4, device=place.device)
    cache = {
        name: x for name, x in rotary(place, lengths, block_size=8).items() if name not in ("q", "k", "v")
    }
    sampled = sampling(place, len(lengths), 300, temperature=1.0, top_p=0.9)
    del sampled["logits"]
    return weights, randn(place, len(lengths), 64, seed=9), cache, sampled


def test_inductor(one_place):
    """In-place arguments and views survive functionalization by the default compiler."""
    weights, hidden, cache, sampled = step(one_place, [5, 33, 17])
    theirs = copy(cache)
    expected = layer(weights, hidden, theirs, sampled)
    mine = copy(cache)
    actual = torch.compile(layer, fullgraph=True)(weights, hidden, mine, sampled)
    assert torch.equal(actual, expected)
    for name in ("k_cache", "v_cache"):
        assert_same(mine[name], theirs[name], name)


WITHOUT_IN_PLACE = {
    "rms_norm": lambda x: ops.rms_norm(x, x[0]),
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[1]),
    "sample": lambda x: ops.sample(x),
}


@pytest.mark.parametrize("op", WITHOUT_IN_PLACE)
def test_inductor_without_the_in_place_argument(one_place, op):
    """Without its optional in-place argument, a compiled op takes a different path."""
    function, x = WITHOUT_IN_PLACE[op], randn(one_place, 3, 64)
    assert_same(torch.compile(function, fullgraph=True)(x), function(x))


@pytest.mark.parametrize("counted", [False, True])
def test_inductor_of_carried_phi(one_place, counted):
    """Two in-place arguments, one optional, through the default compiler for two steps."""
    arguments = every_op(one_place)["decode_attention.carry"]
    if not counted:
        del arguments["fallback_count"]
    mine = copy(arguments)
    compiled = torch.compile(ops.decode_attention, fullgraph=True)
    for _ in range(2):
        expected, actual = outcome(ops.decode_attention, arguments), outcome(compiled, mine)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("unified", [False, True])
def test_cuda_graph_of_attention(unified):
    """Captured once; between replays the query, lengths, block table, phi and fallbacks change."""
    place = Place("cuda", torch.bfloat16)
    arguments = attention(place, [600, 600, 600], q_len=2, q_heads=8)
    phi, count = torch.zeros(8, device="cuda"), int32(place, [0])
    arguments["phi"] = phi if unified else None
    graph, (out, lse) = capture(partial(ops.decode_attention, **arguments, fallback_count=count))
    for turn, (lengths, value) in enumerate([([1, 600, 0], 0), ([64, 63, 65], -1000), ([300, 5, 599], 2)]):
        arguments["q"].copy_(randn(place, 3, 2, 8, 64, seed=turn))
        arguments["seq_lens"].copy_(int32(place, lengths))
        arguments["block_table"].copy_(arguments["block_table"].roll(1, dims=0))
        phi.fill_(value)
        count.zero_()
        graph.replay()
        now = compare("decode_attention", **arguments)
        assert_same(out, now[0])
        assert_same(lse, now[1])
        assert count.item() == (8 * 6 if unified and value == -1000 else 0)


@pytest.mark.gpu
def test_cuda_graph_carries_phi():
    """Every replay is a step: rows fall back in the first, and find their maximum in later ones."""
    place = Place("cuda", torch.bfloat16)
    arguments = attention(place, [600, 0, 64], q_len=2, q_heads=8)
    carried, count = torch.zeros(3, 8, device="cuda"), int32(place, [0])
    graph, (out, lse) = capture(
        partial(ops.decode_attention, **arguments, carried_phi=carried, fallback_count=count)
    )
    carried.fill_(NAN)
    count.zero_()
    now = compare("decode_attention", **arguments, carried_phi=carried.clone())
    for _ in range(3):
        graph.replay()
        assert count.item() == 2 * 2 * 8
        # Relative to another phi, weights round differently.
        torch.testing.assert_close(out, now[0], rtol=0.016, atol=5e-3)
        torch.testing.assert_close(lse, now[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(carried.isnan().all(1).cpu(), torch.tensor([False, True, False]))


@pytest.mark.gpu
def test_cuda_graph_of_a_layer():
    place = Place("cuda", torch.bfloat16)
    weights, hidden, cache, sampled = step(place, [5, 33, 17])
    before = copy(cache)
    graph, token = capture(partial(layer, weights, hidden, cache, sampled))
    for turn in range(3):
        for name, x in before.items():
            cache[name].copy_(x)
        cache["seq_lens"].sub_(turn)
        sampled["position"].add_(1)
        hidden.copy_(randn(place, 3, 64, seed=20 + turn))
        graph.replay()
        replayed = token.clone()
        for name in ("k_cache", "v_cache"):
            cache[name].copy_(before[name])
        assert torch.equal(replayed, layer(weights, hidden, cache, sampled))


def capture(function) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of one call, after a warm-up on a side stream, and the outputs that a replay fills."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_current_stream(op):
    """The op waits only for its own stream's work on its input."""
    arguments = every_op(Place("cuda", torch.bfloat16))[op]
    expected = outcome(wrapper(op), copy(arguments))
    late, first = copy(arguments), next(iter(arguments))
    late[first] = torch.zeros_like(arguments[first])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late[first].copy_(arguments[first])
        actual = outcome(wrapper(op), late)
    torch.cuda.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b, op)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_second_gpu(op):
    """The op runs on its tensors' device, not the current one."""
    expected = outcome(wrapper(op), every_op(Place("cuda:0", torch.bfloat16))[op])
    actual = outcome(wrapper(op), every_op(Place("cuda:1", torch.bfloat16))[op])
    for a, b in zip(actual, expected, strict=True):
        assert str(a.device) == "cuda:1"
        assert_same(a, b, op)
