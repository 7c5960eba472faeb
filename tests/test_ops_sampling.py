"""sample: which tokens may be drawn, and that only the counter decides among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import int32, randn, sampling

from flashdecpp import ops, reference

FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen")


def assert_drawn(arguments: dict) -> torch.Tensor:
    """Draws, and checks the tokens against the inverse CDF at the counter's random number u.

    Implementations sum in float32, so a draw may land one token off if u is that close to the edge.
    """
    seen = arguments.get("seen")
    before = None if seen is None else seen.clone()
    kept = {name: arguments[name] for name in FILTERS if name in arguments} | {"seen": before}
    weights = reference.kept_weights(arguments["logits"], **kept, compute_dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    u = reference.uniform(arguments["seed"], arguments["position"]).double()
    token = ops.sample(**arguments)

    above = weights.cumsum(-1).gather(1, token[:, None])[:, 0]
    own = weights.gather(1, token[:, None])[:, 0]
    assert (own > 0).all(), "a token that a filter removed"
    assert ((above - own - 1e-5 <= u) & (u <= above + 1e-5)).all(), "not the token of this random number"
    if seen is not None:
        assert torch.equal(seen, before.scatter(1, token[:, None], True))
    return token


@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 49152, 151936])
def test_greedy(any_place, vocab):
    logits = randn(any_place, 3, vocab)
    expected = logits.float().argmax(-1)
    assert torch.equal(ops.sample(logits), expected)
    zero = torch.zeros(3, device=any_place.device)
    assert torch.equal(
        ops.sample(**sampling(any_place, 3, vocab) | {"logits": logits, "temperature": zero}), expected
    )


def test_greedy_breaks_ties_by_index(any_place):
    logits = torch.zeros(3, 5000, device=any_place.device, dtype=any_place.dtype)
    logits[0, [17, 18, 4999]] = 1
    logits[1, [4097, 4999]] = 1
    assert ops.sample(logits).tolist() == [17, 4097, 0]


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_nan_is_never_chosen(any_place, temperature):
    """NaN counts as -inf; if every logit is -inf, there is no token."""
    inf, nan = torch.inf, torch.nan
    rows = [[nan, -inf, 2.0, nan, -inf], [-inf] * 5, [nan] * 5, [nan, nan, -inf, nan, -1e4]]
    logits = torch.tensor(rows).to(any_place.device, any_place.dtype)
    if temperature is not None:
        temperature = torch.full((4,), temperature, device=any_place.device)
    assert ops.sample(logits, temperature=temperature).tolist() == [2, -1, -1, 4]
    seen = torch.zeros(4, 5, dtype=torch.bool, device=any_place.device)
    assert ops.sample(logits, temperature=temperature, seen=seen).tolist() == [2, -1, -1, 4]
    assert seen.nonzero().tolist() == [[0, 2], [3, 4]]


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0.7},
        {"temperature": 1e-3},
        {"temperature": 50.0},
        {"top_k": 1},
        {"top_k": 10},
        {"top_k": 10**6},
        {"top_p": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [50, 3001])
def test_filters(any_place, vocab, parameters):
    assert_drawn(sampling(any_place, 64, vocab, **{"temperature": 1.0} | parameters))


def test_large_vocabulary(any_place):
    for parameters in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}):
        assert_drawn(sampling(any_place, 4, 151936, temperature=1.0, **parameters))


def test_ties_at_a_threshold_are_kept(any_place):
    """Four tokens tie for second; top-k 2 and a top-p that needs one of them keep all four."""
    batch = 400
    arguments = sampling(any_place, batch, 20, temperature=1.0)
    arguments["logits"] = torch.full((batch, 20), -5.0, device=any_place.device, dtype=any_place.dtype)
    arguments["logits"][:, 3] = 1.0
    arguments["logits"][:, [5, 6, 11, 19]] = 0.5
    top_p = torch.full((batch,), 0.4, device=any_place.device)
    for filtered in ({"top_k": int32(any_place, [2] * batch)}, {"top_p": top_p}):
        assert assert_drawn(arguments | filtered).unique().tolist() == [3, 5, 6, 11, 19]


def test_every_row_has_its_own_parameters(any_place):
    rows = [
        sampling(any_place, 1, 300, seed=i, temperature=t, top_k=k, top_p=p)
        for i, (t, k, p) in enumerate([(0.0, 5, 0.1), (1.0, 0, 1.0), (2.0, 3, 0.5), (0.5, -1, 0.9)])
    ]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    alone = [ops.sample(**row).item() for row in rows]
    assert ops.sample(**batch).tolist() == alone


def test_independent_of_the_batch(any_place):
    arguments = sampling(any_place, 16, 3001, temperature=1.0, top_k=500, top_p=0.99)
    token = ops.sample(**arguments)
    order = torch.randperm(16).to(any_place.device)
    assert torch.equal(ops.sample(**{name: x[order] for name, x in arguments.items()}), token[order])
    for row in (0, 7):
        assert ops.sample(**{name: x[row : row + 1] for name, x in arguments.items()}) == token[row]


def test_spaced_rows(any_place):
    """The last position of [batch, tokens, vocab] logits, as a view."""
    arguments = sampling(any_place, 5, 100, temperature=1.0)
    wide = randn(any_place, 5, 3, 100)
    packed = ops.sample(**arguments | {"logits": wide[:, -1].contiguous()})
    assert torch.equal(ops.sample(**arguments | {"logits": wide[:, -1]}), packed)


def test_repetition_penalty(any_place):
    """Divides positive and multiplies negative logits of seen tokens; the chosen token is marked as seen."""
    logits = torch.tensor([[3.0, 2.0, -1.0], [-1.0, -1.5, -9.0]]).to(any_place.device, any_place.dtype)
    seen = torch.zeros(2, 3, dtype=torch.bool, device=any_place.device)
    penalty = torch.full((2,), 2.0, device=any_place.device)
    chosen = [ops.sample(logits, repetition_penalty=penalty, seen=seen).tolist() for _ in range(3)]
    assert chosen == [[0, 0], [1, 1], [0, 0]]
    assert seen.int().tolist() == [[1, 1, 0], [1, 1, 0]]

    arguments = sampling(any_place, 64, 200, temperature=0.9, top_p=0.9, repetition_penalty=1.4)
    assert_drawn(arguments | {"seen": randn(any_place, 64, 200, seed=5) > 0})


def test_seen_is_marked_without_a_penalty(any_place):
    arguments = sampling(any_place, 8, 200, temperature=1.0)
    assert_drawn(arguments | {"seen": torch.zeros(8, 200, dtype=torch.bool, device=any_place.device)})


def test_philox_known_answers(any_place):
    """With 2^16 equally likely tokens, the counter's top 16 bits pick the token."""
    logits = torch.zeros(6, 2**16, device=any_place.device, dtype=any_place.dtype)
    seed = torch.tensor([0, 0, 1, -1, 2**40 + 5, -(2**63)], device=any_place.device)
    position = torch.tensor([0, 1, 0, 2**31, 2**33 + 1, 2**63 - 1], device=any_place.device)
    temperature = torch.ones(6, device=any_place.device)
    token = ops.sample(logits, temperature=temperature, seed=seed, position=position)
    assert token[0] == 0x6627  # from Random123's vector for a zero key and counter
    assert torch.equal(token, (reference.uniform(seed, position).double() * 2**16).long())
    unseeded = ops.sample(logits[:1], temperature=temperature[:1])
    assert unseeded == token[0]


@pytest.mark.parametrize("top_k", [1, 3, 50, 600])
@pytest.mark.parametrize("vocab", [60, 272, 3001, 32000])
def test_top_k_larger_than_a_mask_leaves(any_place, vocab, top_k):
    """Like a grammar's mask, which leaves three tokens anywhere."""
    arguments = sampling(any_place, 32, vocab, temperature=1.0, top_k=top_k)
    allowed = torch.tensor([0, vocab // 2, vocab - 1], device=any_place.device)
    masked = torch.full_like(arguments["logits"], -torch.inf)
    masked[:, allowed] = arguments["logits"][:, allowed]
    for nothing in (-torch.inf, torch.nan):
        logits = masked.where(masked > -torch.inf, nothing)
        token = assert_drawn(arguments | {"logits": logits})
        assert set(token.tolist()) <= set(allowed.tolist())


SMALLEST, LARGEST = 1e-45, 3.4e38


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [SMALLEST, 1e-40, 1e-38, 1e-30])
def test_the_smallest_temperatures_are_greedy(any_place, temperature, filters):
    arguments = sampling(any_place, 32, 300, temperature=temperature, **filters)
    for factor in (1, -1, 1000):
        logits = arguments["logits"] * factor
        assert torch.equal(ops.sample(**arguments | {"logits": logits}), logits.float().argmax(-1))


@pytest.mark.parametrize("temperature", [1e36, LARGEST, torch.inf])
def test_the_largest_temperatures_are_uniform(any_place, temperature):
    """But -inf is still never chosen."""
    arguments = sampling(any_place, 2000, 8, temperature=temperature)
    arguments["logits"][:, 3] = -torch.inf
    counts = ops.sample(**arguments).bincount(minlength=8).tolist()
    assert counts.pop(3) == 0
    assert min(counts) > 2000 / 7 * 0.7


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}], ids=str)
def test_the_largest_logits(any_place, temperature, filters):
    """Their difference overflows float32."""
    most = torch.finfo(any_place.dtype).max
    rows = torch.tensor([[-0.9, -0.5, -0.9, -0.8], [0.1, 0.9, -0.9, 0.8]], device=any_place.device) * most
    logits = rows.to(any_place.dtype).repeat(10, 1)
    arguments = sampling(any_place, 20, 4, temperature=temperature, **filters) | {"logits": logits}
    if temperature < 1:
        assert ops.sample(**arguments).tolist() == [1] * 20
    assert_drawn(arguments)


def test_the_largest_logits_at_the_largest_temperature(any_place):
    """Neither weight vanishes: they are exp(-5.1) and 1."""
    logits = torch.tensor([[-1.7e38, 3.4e38]], device=any_place.device).repeat(20000, 1)
    arguments = sampling(any_place, 20000, 2, temperature=1e38) | {"logits": logits}
    share = (ops.sample(**arguments) == 0).float().mean().item()
    assert abs(share - 0.00606) < 0.0025


def test_infinite_logits(any_place):
    """All infinite logits are equally likely; no other token is possible."""
    logits = torch.zeros(200, 100, device=any_place.device, dtype=any_place.dtype)
    logits[:, [7, 70]] = torch.inf
    for filters in ({}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 1e-40}):
        arguments = sampling(any_place, 200, 1, **{"temperature": 1.0} | filters) | {"logits": logits}
        assert ops.sample(**arguments).unique().tolist() == [7, 70]


NAN, INF = torch.nan, torch.inf
OFF = {"temperature": 1.0}
GREEDY = {"temperature": 0.0}
MEANINGS = [
    ({"temperature": -1.0}, GREEDY),
    ({"temperature": NAN}, GREEDY),
    ({"temperature": -INF}, GREEDY),
    ({"top_k": -(2**31)}, OFF),
    ({"top_k": 2**31 - 1}, OFF),
    ({"top_p": -5.0}, {"top_p": 0.0}),
    ({"top_p": -INF}, {"top_p": 0.0}),
    ({"top_p": NAN}, OFF),
    ({"top_p": INF}, OFF),
    ({"min_p": -1.0}, OFF),
    ({"min_p": NAN}, OFF),
    ({"min_p": 5.0}, {"min_p": 1.0}),
    ({"min_p": INF}, {"min_p": 1.0}),
    ({"top_p": -1.0, "min_p": INF, "top_k": 7}, {"top_p": 0.0, "min_p": 1.0, "top_k": 1}),
    ({"repetition_penalty": 0.0}, {"repetition_penalty": 1.0}),
    ({"repetition_penalty": -2.0}, {"repetition_penalty": 1.0}),
    ({"repetition_penalty": NAN}, {"repetition_penalty": 1.0}),
    ({"repetition_penalty": INF}, {"repetition_penalty": 1.0}),
    ({"repetition_penalty": INF, "temperature": 0.0}, {"repetition_penalty": 1.0, "temperature": 0.0}),
]


@pytest.mark.parametrize(("given", "meant"), MEANINGS, ids=str)
def test_parameters_beyond_their_range(any_place, given, meant):
    """Each has a defined meaning, shared by the reference."""
    tokens = []
    for parameters in (given, meant):
        arguments = sampling(any_place, 64, 200, **{"temperature": 1.0} | parameters)
        if "repetition_penalty" in parameters:
            arguments["seen"] = randn(any_place, 64, 200, seed=5) > 0
        if parameters.get("temperature", 1.0) > 0:
            tokens.append(assert_drawn(arguments).tolist())
        else:
            tokens.append(ops.sample(**copy(arguments)).tolist())
            assert tokens[-1] == reference.sample(**copy(arguments)).tolist()
    assert tokens[0] == tokens[1]


def copy(arguments: dict) -> dict:
    return {name: x.clone() for name, x in arguments.items()}


@settings(max_examples=60)
@given(data=st.data())
def test_any_float(any_place, data):
    """For any logits and parameters, the token is one that the reference could draw."""
    draw = data.draw
    batch, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    special = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0, -1.0])
    number = st.one_of(special, st.floats(width=32))
    logits = torch.full((batch, vocab), draw(number), device=any_place.device)
    for _ in range(draw(st.integers(0, 8))):
        logits[draw(st.integers(0, batch - 1)), draw(st.integers(0, vocab - 1))] = draw(number)
    arguments = sampling(any_place, batch, 1) | {"logits": logits.to(any_place.dtype)}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if draw(st.booleans()):
            values = [draw(number) for _ in range(batch)]
            arguments[name] = torch.tensor(values, dtype=torch.float32, device=any_place.device)
    if draw(st.booleans()):
        arguments["top_k"] = int32(any_place, [draw(st.integers(-2, 400)) for _ in range(batch)])
    if "repetition_penalty" in arguments:
        arguments["seen"] = randn(any_place, batch, vocab) > 0
    kept = {name: arguments[name] for name in FILTERS if name in arguments}
    before = copy(kept)
    token = ops.sample(**arguments)
    # One rounding more or less may push a weight across a threshold, so either side is right.
    possible = [
        reference.kept_weights(arguments["logits"], **before, compute_dtype=dtype) > 0
        for dtype in (torch.float64, torch.float32)
    ]
    for row, chosen in enumerate(token.tolist()):
        if chosen == -1:  # a penalty may exceed float32's largest number, but not float64's
            assert any(not weights[row].any() for weights in possible)
        else:
            assert any(weights[row, chosen] for weights in possible)


@pytest.mark.parametrize("counter", ["seed", "position"])
def test_distribution(any_place, counter):
    """Chi-squared test of 20000 draws with consecutive seeds, and with consecutive positions."""
    draws, vocab = 20000, 24
    logits = randn(any_place, 1, vocab).expand(draws, vocab).contiguous()
    arguments = sampling(any_place, draws, 1, temperature=1.3) | {"logits": logits}
    arguments |= {
        "seed": torch.full_like(arguments["seed"], 7),
        "position": torch.zeros_like(arguments["position"]),
    }
    arguments[counter] = torch.arange(draws, device=any_place.device)
    expected = (logits[0].double() / 1.3).softmax(-1) * draws
    observed = ops.sample(**arguments).bincount(minlength=vocab)
    chi_squared = ((observed - expected).square() / expected).sum()
    assert chi_squared < (vocab - 1) + 4 * (2 * (vocab - 1)) ** 0.5


@settings(max_examples=20)
@given(data=st.data())
def test_any_parameters(any_place, data):
    draw = data.draw
    parameters = {
        "temperature": draw(st.floats(0.1, 3)),
        "top_k": draw(st.integers(-1, 60)),
        "top_p": draw(st.floats(0, 1.1)),
        "min_p": draw(st.floats(0, 0.3)),
    }
    chosen = draw(st.sets(st.sampled_from(["top_k", "top_p", "min_p"])))
    kept = {name: value for name, value in parameters.items() if name == "temperature" or name in chosen}
    assert_drawn(sampling(any_place, draw(st.integers(1, 9)), draw(st.integers(1, 400)), **kept))
