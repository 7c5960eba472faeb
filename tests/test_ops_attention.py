"""decode_attention against its reference, over its whole contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, attention, int32, randn
from tolerance import assert_same, compare

from flashdecpp import ops

LENGTHS = [37, 1, 0, 100, 16]  # full, partial and single-key blocks, and an empty sequence
INF = float("inf")
NAN = float("nan")


# ----------------------------------------------------------------------------------------- shapes and layouts


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 136, 192, 248, 256])
def test_head_dim(place, head_dim):
    compare("decode_attention", **attention(place, LENGTHS, head_dim=head_dim))


@pytest.mark.parametrize("group", range(1, 17))
def test_query_heads_per_kv_head(place, group):
    compare(
        "decode_attention", **attention(place, [37, 70], q_heads=2 * group, kv_heads=2, q_len=group % 3 + 1)
    )


@pytest.mark.parametrize("q_len", range(1, 17))
def test_new_tokens_and_left_padding(place, q_len):
    """Sequences shorter than q_len are left-padded; the padding rows see nothing."""
    compare("decode_attention", **attention(place, [0, 1, q_len, 90], q_len=q_len, q_heads=6))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 1, 8, 16, 24, 64])
def test_cache_layout(place, block_size, layout):
    compare("decode_attention", **attention(place, LENGTHS, block_size=block_size, layout=layout, q_len=2))


def test_packed_query(place):
    """q may be a view of a packed projection."""
    arguments = attention(place, LENGTHS, q_len=2)
    packed = randn(place, len(LENGTHS), 2, 8, 64)
    compare("decode_attention", **arguments | {"q": packed[:, :, 2:6]})


def test_sequences_share_blocks(place):
    """Prefix sharing: the same blocks in several rows of the table."""
    arguments = attention(place, [64, 64, 64], block_size=16)
    table = arguments["block_table"]
    table[1, :3] = table[0, :3]
    table[2] = table[0].flip(0)
    table[2, 0] = table[0, 0]
    compare("decode_attention", **arguments)


def test_empty_batch(one_place):
    arguments = attention(one_place, [3])
    for name in ("q", "seq_lens", "block_table"):
        arguments[name] = arguments[name][:0]
    out, lse = ops.decode_attention(**arguments)
    assert out.shape == (0, 1, 4, 64)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("length", [1000, 4111])
def test_long_context(place, length):
    compare("decode_attention", **attention(place, [length, 5], block_size=64, q_heads=2, kv_heads=1))


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(place, data):
    draw = data.draw
    q_len, kv_heads = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    arguments = attention(
        place,
        draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        q_len=q_len,
        q_heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 32)),
        block_size=draw(st.sampled_from([None, 1, 8, 16, 24, 40, 64])),
        layout=draw(st.sampled_from(LAYOUTS)),
        fp8=draw(st.booleans()),
    )
    compare(
        "decode_attention",
        **arguments,
        window=draw(st.sampled_from([-1, 1, 7, 64, 1000])),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        num_splits=draw(st.integers(0, 5)),
        **draw(
            st.sampled_from(
                [
                    {},
                    {"phi": _per_head(arguments, 2.0)},
                    {"phi": _per_head(arguments, -300.0)},
                    {"carried_phi": _carried(arguments, 2.0)},
                    {"carried_phi": _carried(arguments, NAN)},
                ]
            )
        ),
    )


# ----------------------------------------------------------------------------------------- logits and masks


def _per_head(arguments: dict, value: float) -> torch.Tensor:
    return torch.full((arguments["q"].size(2),), value, device=arguments["q"].device)


def _carried(arguments: dict, value: float) -> torch.Tensor:
    """[batch, q_heads], with gaps between rows."""
    batch, _, heads, _ = arguments["q"].shape
    return torch.full((batch, heads + 3), value, device=arguments["q"].device)[:, :heads]


@pytest.mark.parametrize("phi", [None, 3.0, "carried"])
@pytest.mark.parametrize(
    "features",
    [
        {"scale": 0.7},
        {"softcap": 3.0, "scale": 2.0},
        {"window": 1},
        {"window": 20},
        {"alibi_slopes": True},
        {"sinks": True},
        {"window": 20, "sinks": True, "alibi_slopes": True, "softcap": 3.0},
    ],
    ids=lambda features: "-".join(features),
)
def test_logit_features(place, features, phi):
    arguments = attention(place, LENGTHS, q_len=3) | features
    for name, values in {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625], "sinks": [2.0, -3.0, 0.0, 9.0]}.items():
        if name in features:
            arguments[name] = torch.tensor(values, device=place.device)
    if phi == "carried":
        arguments["carried_phi"] = _carried(arguments, NAN)
    elif phi is not None:
        arguments["phi"] = _per_head(arguments, phi)
    compare("decode_attention", **arguments)


@pytest.mark.parametrize("phi", [None, 0.0])
def test_rows_that_see_no_key(place, phi):
    """With no keys or left padding, out is 0 and lse is -inf, or the sink if there is one."""
    arguments = attention(place, [0, 2], q_len=4)
    arguments["phi"] = None if phi is None else _per_head(arguments, phi)
    unseen = torch.tensor([[True] * 4, [True, True, False, False]], device=place.device)
    sinks = torch.arange(4.0, device=place.device)
    out, lse = ops.decode_attention(**arguments)
    assert torch.equal((out == 0).flatten(2).all(-1), unseen)
    assert torch.equal((lse == -INF).all(1), unseen)
    out, lse = ops.decode_attention(**arguments, sinks=sinks)
    assert torch.equal((out == 0).flatten(2).all(-1), unseen)
    assert_same(lse[0], sinks[:, None].expand(4, 4))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_hidden_keys_never_count(place, poison):
    """Keys and values outside the window are poisoned, as those beyond seq_lens always are."""
    arguments = attention(place, [100], block_size=None, q_len=2)
    arguments["k_cache"][:, :89] = poison
    arguments["v_cache"][:, :89] = poison
    compare("decode_attention", **arguments, window=10)


@pytest.mark.parametrize("phi", [None, 0.0])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_bad_key_spoils_only_the_rows_that_see_it(place, poison, phi):
    """A bad last key in one sequence and KV head makes its last query token NaN; the rest is exact."""
    arguments = attention(place, [50, 50, 50], block_size=None, q_len=3)
    arguments["k_cache"][1, 49, 0, 5] = poison
    arguments["phi"] = None if phi is None else _per_head(arguments, phi)
    out, lse = compare("decode_attention", **arguments)
    spoilt = torch.zeros(3, 3, 4, dtype=torch.bool, device=place.device)
    spoilt[1, 2, :2] = True
    assert torch.equal(out.isnan().all(-1), spoilt)
    assert torch.equal(lse.isnan().transpose(1, 2), spoilt)


@pytest.mark.parametrize("name", ["q", "v_cache"])
def test_bad_query_or_value_spoils_only_its_row(place, name):
    arguments = attention(place, [50, 50], block_size=None, q_len=2)
    where = (1, 0, 2, 5) if name == "q" else (1, 49, 1, 5)
    arguments[name][where] = NAN
    out, _ = compare("decode_attention", **arguments)
    assert out.isnan().any()


@pytest.mark.parametrize("block_size", [None, 16])
def test_fp8_cache(place, block_size):
    arguments = attention(place, LENGTHS, fp8=True, block_size=block_size, q_len=2)
    compare("decode_attention", **arguments)
    compare("decode_attention", **arguments | {"k_scale": None, "v_scale": None})


# --------------------------------------------------------------------------------------- the unified maximum


def _row_maxima(arguments: dict) -> torch.Tensor:
    """The largest logit of one-token rows: [batch, q_heads]."""
    keys = arguments["k_cache"].float().repeat_interleave(2, dim=2)
    x = torch.einsum("bhd,bkhd->bhk", arguments["q"][:, 0].float(), keys) * arguments["q"].size(-1) ** -0.5
    return x.nan_to_num(-INF).amax(-1)


@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("offset", [0.0, 8.0, -8.0, 40.0, -40.0, 1000.0, -1000.0, INF, -INF, NAN])
def test_any_phi_is_exact(place, offset, per_row, num_splits):
    arguments = attention(place, [300, 41, 1, 0], block_size=None)
    phi = torch.full((4, 4) if per_row else (4,), offset, device=place.device)
    if per_row:
        phi = phi + _row_maxima(arguments).nan_to_num(neginf=0)
    compare("decode_attention", **arguments, phi=phi, num_splits=num_splits)


@pytest.mark.parametrize("phi", [None, 0.0, 500.0, -500.0, 1000.0])
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)], ids=["high", "low", "mixed"])
def test_opt_scale_logits(place, signs, phi):
    """Logits of +-500 with a spread of tens, where exp overflows and underflows float32."""
    arguments = attention(place, [200, 33], q_heads=4, kv_heads=2, q_len=2)
    arguments["q"][..., 0] = 1.0
    for slot, sign in enumerate(signs):  # even and odd keys; the rest of the cache stays NaN
        keys = arguments["k_cache"][:, slot::2, :, 0]
        keys.copy_(torch.where(keys.isfinite(), 500.0 * sign, NAN))
    arguments["phi"] = None if phi is None else _per_head(arguments, phi)
    _, lse = compare("decode_attention", **arguments, scale=1.0)
    assert (lse.abs() > 400).all()


@pytest.mark.parametrize("phi", [None, 0.0, 60.0, -1000.0])
@pytest.mark.parametrize("where", [0, 150, 299])
def test_maximum_in_one_split_only(place, where, phi):
    arguments = attention(place, [300], q_heads=2, kv_heads=1, block_size=None, head_dim=64)
    arguments["k_cache"][:, where, 0] = arguments["q"][0, 0, 0] * 8
    arguments["phi"] = None if phi is None else _per_head(arguments, phi)
    for num_splits in (1, 2, 7):
        compare("decode_attention", **arguments, num_splits=num_splits)


def test_fallback_count(one_place):
    """Adds nothing at a good phi, and every row that sees a key at a hopeless one."""
    arguments = attention(one_place, [300, 64, 7, 0], q_len=2)
    count = int32(one_place, [0])
    for phi, rows in ((2.0, 0), (1000.0, 24), (-1000.0, 24)):
        for num_splits in (0, 1, 4):
            count.fill_(5)
            ops.decode_attention(
                **arguments, phi=_per_head(arguments, phi), fallback_count=count, num_splits=num_splits
            )
            assert count.item() == 5 + rows, (phi, num_splits)

    phi = _per_head(arguments, 2.0).repeat(4, 1)
    phi[0, 1] = phi[2, 3] = -500.0  # two query heads of two tokens each
    count.zero_()
    ops.decode_attention(**arguments, phi=phi, fallback_count=count)
    assert count.item() == 4
    ops.decode_attention(**arguments, fallback_count=count)
    assert count.item() == 4


def test_only_the_row_maximum_falls_back(one_place):
    """Logits far below phi, or huge ones that a row doesn't see, don't trigger a recomputation."""
    arguments = attention(one_place, [200], q_heads=2, kv_heads=1, block_size=None)
    q, k_cache = arguments["q"], arguments["k_cache"]
    q[..., 0] = 1.0
    k_cache[:, :100, :, 0] = 3000.0  # outside the window
    k_cache[:, 100:199, :, 0] = -3000.0
    count = int32(one_place, [0])
    ops.decode_attention(
        **arguments, window=100, scale=1 / 8, phi=_per_head(arguments, 0.0), fallback_count=count
    )
    assert count.item() == 0
    compare("decode_attention", **arguments, window=100, scale=1 / 8, phi=_per_head(arguments, 0.0))


# ----------------------------------------------------------------------------------------- carried phi


@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("start", [0.0, 1000.0, INF, NAN])
def test_carried_phi_becomes_the_row_maximum(place, start, q_len, num_splits):
    """The last token's maximum, only where there is a key; nothing is written between rows."""
    arguments = attention(place, [300, 41, 1, 0], q_len=q_len, q_heads=6)
    carried = _carried(arguments, start)
    between = torch.as_strided(carried, (3, 3), carried.stride(), 6)
    between.fill_(7.0)
    compare("decode_attention", **arguments, num_splits=num_splits, carried_phi=carried)
    assert carried[:3].isfinite().all() and (carried[:3].abs() < 100).all()
    assert_same(carried[3], torch.full((6,), start))
    assert (between == 7).all()


def test_carried_phi_serves_every_token(one_place):
    """All tokens of a head use its phi. Rows with a bad phi are counted, and have a good one next step."""
    arguments = attention(one_place, [300, 64, 2, 0], q_len=3)
    carried, count = _carried(arguments, NAN), int32(one_place, [0])
    carried[1, 2] = 2.0
    compare("decode_attention", **arguments, carried_phi=carried, fallback_count=count)
    assert count.item() == 4 * (3 + 3 + 2) - 3
    compare("decode_attention", **arguments, carried_phi=carried, fallback_count=count)
    assert count.item() == 4 * (3 + 3 + 2) - 3


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_carried_phi_outlives_a_bad_row(place, poison):
    """NaN rows leave phi unchanged; a NaN that only an earlier token sees doesn't matter."""
    arguments = attention(place, [50, 50], block_size=None, q_len=2)
    arguments["k_cache"][0, 49, 0, 5] = poison
    arguments["q"][1, 0, 3] = NAN
    carried = _carried(arguments, 1.5)
    compare("decode_attention", **arguments, carried_phi=carried)
    assert ((carried == 1.5).cpu() == torch.tensor([[True, True, False, False], [False] * 4])).all()


@pytest.mark.parametrize("level", [0.0, -400.0, 300.0])
def test_carried_from_step_to_step(place, level):
    """With slowly moving logits far from 0, no row falls back after a sequence's first step."""
    steps, first = 12, 90
    arguments = attention(place, [first + steps, first // 2 + steps], max_len=200)
    full, drift = arguments.pop("seq_lens"), randn(place, steps, 1, 1, 4, 64, seed=3) / 4
    q = arguments.pop("q")
    for cache in (arguments["k_cache"], arguments["v_cache"]):
        cache[..., 0] = torch.where(cache[..., 0].isnan(), NAN, 1.0)
    carried, count = torch.full((2, 4), NAN, device=place.device), int32(place, [0])
    for step in range(steps):
        q = q + drift[step]
        q[..., 0] = 8 * (level + 2 * step)
        now = dict(q=q, seq_lens=full - steps + step, **arguments)
        compare("decode_attention", **now, carried_phi=carried, fallback_count=count)
        assert count.item() == 8
        assert (carried - level - 2 * step).abs().max() < 10


# ----------------------------------------------------------------------------------------- splits and batches


@pytest.mark.parametrize("num_splits", [1, 2, 3, 16, 200])
def test_number_of_splits(place, num_splits):
    """Including more splits than keys."""
    compare("decode_attention", **attention(place, LENGTHS, q_len=2), num_splits=num_splits)


@pytest.mark.parametrize("phi", [None, 2.0, -1000.0, "carried"])
@pytest.mark.parametrize("num_splits", [1, 3, 8])
def test_fixed_splits_ignore_the_batch(place, num_splits, phi):
    """A sequence in any batch gives bit for bit what it gives alone, in a table of its own length."""
    lengths = [130, 1, 700, 64, 0, 7]
    arguments = attention(place, lengths, q_len=2, block_size=16)
    keep = ("k_cache", "v_cache")
    carried = _carried(arguments, NAN) if phi == "carried" else None
    before = None if carried is None else carried.clone()
    phi = None if phi in (None, "carried") else _per_head(arguments, phi)
    out, lse = ops.decode_attention(**arguments, num_splits=num_splits, phi=phi, carried_phi=carried)
    for row, length in enumerate(lengths):
        alone = {name: x if name in keep else x[row : row + 1] for name, x in arguments.items()}
        alone["block_table"] = alone["block_table"][:, : length // 16 + 1]
        own = None if before is None else before[row : row + 1]
        out_alone, lse_alone = ops.decode_attention(**alone, num_splits=num_splits, phi=phi, carried_phi=own)
        if own is not None:
            assert_same(carried[row : row + 1], own)
        assert_same(out[row : row + 1], out_alone)
        assert_same(lse[row : row + 1], lse_alone)


# ----------------------------------------------------------------------------------------- bad values


def test_lengths_and_blocks_out_of_range_stay_in_the_cache(one_place):
    """A device can't report them: their own rows are meaningless, other rows unaffected."""
    arguments = attention(one_place, [40, 40, 40, 40], block_size=16)
    good, _ = ops.decode_attention(**arguments)
    bad = {name: x.clone() for name, x in arguments.items()}
    bad["seq_lens"] += int32(one_place, [0, 10**9, -(10**9), 0])
    bad["block_table"][3, :2] = int32(one_place, [-(10**9), 10**9])
    out, _ = ops.decode_attention(**bad)
    assert_same(out[0], good[0])
    assert (out[2] == 0).all()


@pytest.mark.parametrize("block_size", [None, 16])
def test_check_reports_lengths(one_place, block_size):
    arguments = attention(one_place, [40, 3], block_size=block_size, max_len=48)
    ops.check(**arguments)
    for wrong in (49, -1):
        arguments["seq_lens"][1] = wrong
        with pytest.raises(
            ValueError, match=rf"seq_lens must be from 0 .* 48 .*, got {wrong} for sequence 1"
        ):
            ops.check(**arguments)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_check_reports_used_blocks(one_place, wrong):
    arguments = attention(one_place, [40, 3], block_size=16)
    ops.check(**arguments)  # unused entries are already invalid
    arguments["block_table"][0, 2] = wrong
    with pytest.raises(ValueError, match=rf"block_table must hold .*, got {wrong} at \[0, 2\]"):
        ops.check(**arguments)


def test_lengths_and_tables_that_the_preceding_kernel_writes(place):
    """The ops start before that kernel ends, and must not read what it has yet to write."""
    if place.device == "cpu":
        pytest.skip("kernels overlap on GPUs alone")
    batch, heads, dim, block, steps = 4, 2, 64, 16, 200
    k_cache, v_cache = torch.zeros(2, batch * 64, block, heads, dim, dtype=place.dtype, device=place.device)
    tables = torch.arange(batch * 64, dtype=torch.int32, device=place.device).view(batch, 64)
    lengths = torch.zeros(batch, dtype=torch.int32, device=place.device)
    table = torch.full_like(tables, -1)
    new = torch.randn(steps, 3, batch, 1, heads, dim, dtype=place.dtype, device=place.device)
    wanted = torch.arange(1, steps + 1, dtype=torch.int32, device=place.device)[:, None].repeat(1, batch)
    queries = torch.randn(batch, 1, heads, dim, dtype=place.dtype, device=place.device)
    outs = []
    for step in range(steps):
        q, k, v = new[step].clone()
        torch.add(tables, 0, out=table)
        torch.add(wanted[step], 0, out=lengths)
        ops.rotary_append(q, k, v, k_cache, v_cache, lengths, table)
        lengths.zero_()
        table.fill_(-1)
        torch.add(tables, 0, out=table)
        torch.add(wanted[step], 0, out=lengths)
        outs.append(ops.decode_attention(queries, k_cache, v_cache, lengths, table)[0])
        lengths.zero_()
        table.fill_(-1)
    keys, values = (cache.view(batch, -1, heads, dim)[:, :steps] for cache in (k_cache, v_cache))
    assert torch.equal(keys, new[:, 1, :, 0].transpose(0, 1))
    assert torch.equal(values, new[:, 2, :, 0].transpose(0, 1))
    for step in range(0, steps, 7):
        again = ops.decode_attention(queries, k_cache, v_cache, wanted[step].clone(), tables)[0]
        assert torch.equal(outs[step], again)
