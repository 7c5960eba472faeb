"""Errors name the bad argument, what it must be and what it was; nothing is written or launched."""

from __future__ import annotations

import pytest
import torch
from strategies import Place, attention, every_op, quantized, randn, rotary, wrapper
from tolerance import assert_same
from torch import Tensor

from flashdecpp import ops


def uneven(x: Tensor) -> Tensor:
    """The same values with a last dimension that isn't contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def spaced(x: Tensor) -> Tensor:
    """The same values, with a gap after each last dimension."""
    return torch.cat((x, x), dim=-1)[..., : x.size(-1)]


def reblocked(a: dict, block_size: int) -> dict:
    """Both caches with another block size."""
    return {
        name: a[name][:, :1].expand(-1, block_size, -1, -1).contiguous() for name in ("k_cache", "v_cache")
    }


# The argument at fault, and the change to pass. First, cases shared by decode_attention and rotary_append.
CACHE = [
    ("k_cache", lambda a: {"k_cache": a["k_cache"].double()}),
    ("k_cache", lambda a: {"k_cache": a["k_cache"][0]}),
    ("k_cache", lambda a: {"k_cache": a["k_cache"][..., :32]}),
    ("k_cache", lambda a: {"k_cache": uneven(a["k_cache"])}),
    ("k_cache", lambda a: reblocked(a, 12)),
    ("k_cache", lambda a: {"block_table": None}),
    ("v_cache", lambda a: {"v_cache": a["v_cache"].to(torch.float8_e4m3fn)}),
    ("v_cache", lambda a: {"v_cache": a["v_cache"][:, :8]}),
    ("v_cache", lambda a: {"v_cache": uneven(a["v_cache"])}),
    ("seq_lens", lambda a: {"seq_lens": a["seq_lens"].long()}),
    ("seq_lens", lambda a: {"seq_lens": a["seq_lens"][:1]}),
    ("seq_lens", lambda a: {"seq_lens": a["seq_lens"][None]}),
    ("seq_lens", lambda a: {"seq_lens": a["seq_lens"].repeat_interleave(2)[::2]}),
    ("block_table", lambda a: {"block_table": a["block_table"].long()}),
    ("block_table", lambda a: {"block_table": a["block_table"][0]}),
    ("block_table", lambda a: {"block_table": a["block_table"][:1]}),
    ("block_table", lambda a: {"block_table": uneven(a["block_table"])}),
    ("k_scale", lambda a: {"k_scale": torch.ones(2, device=a["q"].device)}),
]
# Every linear, then the quantized ones, then the extra arguments of the fused ones.
LINEAR = [
    ("x", lambda a: {"x": a["x"].double()}),
    ("x", lambda a: {"x": a["x"][:, :0], "weight": a["weight"][:, :0]}),
    ("x", lambda a: {"x": a["x"][0, 0]}),
    ("weight", lambda a: {"weight": a["weight"].double()}),
    ("weight", lambda a: {"weight": a["weight"][0]}),
    ("weight", lambda a: {"weight": a["weight"][:, :32]}),
    ("weight", lambda a: {"weight": uneven(a["weight"])}),
    ("bias", lambda a: {"bias": a["bias"].double()}),
    ("bias", lambda a: {"bias": a["bias"][:5]}),
    ("bias", lambda a: {"bias": a["bias"][None]}),
]
QUANTIZED = [
    ("x", lambda a: {"x": a["x"].double()}),
    ("x", lambda a: {"x": a["x"][:, :0], "weight": a["weight"][:, :0]}),
    ("x", lambda a: {"x": a["x"][0, 0]}),
    ("weight", lambda a: {"weight": a["weight"].int()}),
    ("weight", lambda a: {"weight": a["weight"].view(torch.int8)}),
    ("weight", lambda a: {"weight": a["weight"][0]}),
    ("weight", lambda a: {"weight": a["weight"][:, :16]}),
    ("weight", lambda a: {"weight": a["weight"].repeat(1, 2)}),
    ("weight", lambda a: {"weight": uneven(a["weight"])}),
    ("scales", lambda a: {"scales": a["scales"].double()}),
    ("scales", lambda a: {"scales": a["scales"][:5]}),
    ("scales", lambda a: {"scales": a["scales"][:, 0].contiguous()}),
    ("scales", lambda a: {"scales": a["scales"].repeat(1, 2)}),
    ("scales", lambda a: {"scales": a["scales"][:, :0]}),
    ("scales", lambda a: {"scales": a["scales"].repeat(1, 2)[:, :3]}),
    ("scales", lambda a: {"scales": uneven(a["scales"])}),
    ("offsets", lambda a: {"offsets": a["offsets"].float()}),
    ("offsets", lambda a: {"offsets": a["offsets"][:, :1]}),
    ("offsets", lambda a: {"offsets": a["offsets"][:5]}),
    ("offsets", lambda a: {"offsets": uneven(a["offsets"])}),
    ("bias", lambda a: {"bias": a["bias"].double()}),
    ("bias", lambda a: {"bias": a["bias"][:5]}),
]
FUSED = [
    ("norm_weight", lambda a: {"norm_weight": a["norm_weight"].double()}),
    ("norm_weight", lambda a: {"norm_weight": a["norm_weight"][:32]}),
    ("norm_weight", lambda a: {"norm_weight": a["norm_weight"][None]}),
    ("norm_weight", lambda a: {"norm_weight": a["norm_weight"].repeat_interleave(2)[::2]}),
]
GATED = [
    ("gate", lambda a: {"gate": "swish"}),
    (
        "weight",
        lambda a: {name: a[name][:23] for name in ("weight", "scales", "offsets", "bias") if name in a},
    ),
]
ACTIVATED = [
    ("activation", lambda a: {"activation": "swish"}),
    ("activation", lambda a: {"gate": "silu"}),
]
ADDED = [
    ("residual", lambda a: {"residual": a["residual"].double()}),
    ("residual", lambda a: {"residual": a["residual"][:2]}),
    ("residual", lambda a: {"residual": a["residual"][:, :12].contiguous()}),
    ("residual", lambda a: {"residual": a["residual"][0]}),
    ("residual", lambda a: {"residual": spaced(a["residual"])}),
    ("residual", lambda a: {"residual": a["x"].view(-1)[8:80].view(3, 24)}),
]
BAD = {
    "decode_attention": [
        *CACHE,
        ("q", lambda a: {"q": a["q"].double()}),
        ("q", lambda a: {"q": a["q"][0]}),
        ("q", lambda a: {"q": uneven(a["q"])}),
        ("q", lambda a: {"q": a["q"][:, :0]}),
        ("q", lambda a: {"q": a["q"].repeat(1, 9, 1, 1)[:, :17]}),
        ("q", lambda a: {"q": a["q"][..., :60].contiguous()}),
        ("q", lambda a: {"q": a["q"].repeat(1, 1, 1, 5)[..., :264]}),
        ("q", lambda a: {"q": a["q"][:, :, :3]}),
        ("q", lambda a: {"q": a["q"].repeat(1, 1, 9, 1)[:, :, :34]}),
        ("q", lambda a: {"q": a["q"][:, :, :0]}),
        ("phi", lambda a: {"phi": a["phi"].double()}),
        ("phi", lambda a: {"phi": a["phi"][:3]}),
        ("phi", lambda a: {"phi": a["phi"].expand(3, 4).contiguous()}),
        ("phi", lambda a: {"phi": a["phi"].expand(2, 4)}),
        ("alibi_slopes", lambda a: {"alibi_slopes": a["alibi_slopes"].half()}),
        ("alibi_slopes", lambda a: {"alibi_slopes": a["alibi_slopes"][:2]}),
        ("sinks", lambda a: {"sinks": a["sinks"].half()}),
        ("sinks", lambda a: {"sinks": a["sinks"][:2]}),
        ("fallback_count", lambda a: {"fallback_count": a["fallback_count"].long()}),
        ("fallback_count", lambda a: {"fallback_count": a["fallback_count"].repeat(2)}),
        ("scale", lambda a: {"scale": float("nan")}),
        ("softcap", lambda a: {"softcap": -1.0}),
        ("num_splits", lambda a: {"num_splits": -1}),
    ],
    "decode_attention.carry": [
        ("carried_phi", lambda a: {"carried_phi": a["carried_phi"].double()}),
        ("carried_phi", lambda a: {"carried_phi": a["carried_phi"][:1]}),
        ("carried_phi", lambda a: {"carried_phi": a["carried_phi"][:, :3]}),
        ("carried_phi", lambda a: {"carried_phi": a["carried_phi"][0]}),
        ("carried_phi", lambda a: {"carried_phi": uneven(a["carried_phi"])}),
        ("carried_phi", lambda a: {"carried_phi": a["carried_phi"][:1].expand(2, 4)}),
        ("q", lambda a: {"q": a["q"][0]}),
        ("fallback_count", lambda a: {"fallback_count": a["fallback_count"].long()}),
    ],
    "gemv": LINEAR,
    "flat_gemm": LINEAR,
    "linear.plain": LINEAR,
    "linear": [*LINEAR, ("impl", lambda a: {"impl": "fastest"})],
    "linear.gated": [*LINEAR, *FUSED, *GATED, ("impl", lambda a: {"impl": "fastest"})],
    "linear.activated": [*LINEAR, *ACTIVATED],
    "linear.residual": [*LINEAR, *FUSED, *ADDED, ("impl", lambda a: {"impl": "fastest"})],
    "quantized_linear.gated": [*QUANTIZED, *FUSED, *GATED],
    "quantized_linear.activated": ACTIVATED,
    "quantized_linear.residual": [*FUSED, *ADDED],
    "quantized_linear.plain": QUANTIZED,
    "rms_norm": (
        NORM := [
            ("x", lambda a: {"x": a["x"].double()}),
            ("x", lambda a: {"x": uneven(a["x"])}),
            ("x", lambda a: {"x": a["x"][0, 0]}),
            ("weight", lambda a: {"weight": a["weight"].double()}),
            ("weight", lambda a: {"weight": a["weight"][:32]}),
            ("weight", lambda a: {"weight": a["weight"][None]}),
            ("residual", lambda a: {"residual": a["residual"].double()}),
            ("residual", lambda a: {"residual": a["residual"][:2]}),
            ("residual", lambda a: {"residual": spaced(a["residual"])}),
        ]
    ),
    "layer_norm": [
        *NORM,
        ("bias", lambda a: {"bias": a["bias"].double()}),
        ("bias", lambda a: {"bias": a["bias"][:32]}),
        ("bias", lambda a: {"bias": a["bias"].float()}),
    ],
    "rotary_append": [
        *CACHE,
        ("q", lambda a: {"q": a["q"].double()}),
        ("q", lambda a: {"q": a["q"][0]}),
        ("q", lambda a: {"q": uneven(a["q"])}),
        ("k", lambda a: {"k": a["k"].double()}),
        ("k", lambda a: {"k": a["k"][:, :1]}),
        ("k", lambda a: {"k": a["q"]}),
        ("k", lambda a: {"k": uneven(a["k"])}),
        ("v", lambda a: {"v": a["v"].double()}),
        ("v", lambda a: {"v": a["v"][..., :32]}),
        ("v", lambda a: {"v": uneven(a["v"])}),
        ("cos_sin", lambda a: {"cos_sin": a["cos_sin"].half()}),
        ("cos_sin", lambda a: {"cos_sin": a["cos_sin"][0]}),
        ("cos_sin", lambda a: {"cos_sin": a["cos_sin"][:, :33].contiguous()}),
        ("cos_sin", lambda a: {"cos_sin": a["cos_sin"].repeat(1, 2)}),
        ("cos_sin", lambda a: {"cos_sin": uneven(a["cos_sin"])}),
    ],
    "gated_activation": [
        ("gate_up", lambda a: {"gate_up": a["gate_up"].double()}),
        ("gate_up", lambda a: {"gate_up": a["gate_up"][:, :7].contiguous()}),
        ("gate_up", lambda a: {"gate_up": spaced(a["gate_up"])}),
        ("gate_up", lambda a: {"gate_up": a["gate_up"][0, 0]}),
        ("activation", lambda a: {"activation": "swish"}),
    ],
    "sample": [
        ("logits", lambda a: {"logits": a["logits"].double()}),
        ("logits", lambda a: {"logits": a["logits"][0]}),
        ("logits", lambda a: {"logits": uneven(a["logits"])}),
        ("logits", lambda a: {"logits": a["logits"][:, :0], "seen": a["seen"][:, :0]}),
        ("temperature", lambda a: {"temperature": a["temperature"].half()}),
        ("temperature", lambda a: {"temperature": a["temperature"][:2]}),
        ("top_k", lambda a: {"top_k": a["top_k"].long()}),
        ("top_p", lambda a: {"top_p": a["top_p"].double()}),
        ("min_p", lambda a: {"min_p": a["min_p"][:, None]}),
        ("seed", lambda a: {"seed": a["seed"].int()}),
        ("position", lambda a: {"position": a["position"][:1]}),
        ("repetition_penalty", lambda a: {"repetition_penalty": a["repetition_penalty"].half()}),
        ("seen", lambda a: {"seen": a["seen"].int()}),
        ("seen", lambda a: {"seen": a["seen"][:, :10]}),
        ("seen", lambda a: {"seen": spaced(a["seen"])}),
    ],
}


def test_repetition_penalty_needs_seen() -> None:
    logits, penalty = torch.zeros(2, 5), torch.ones(2)
    with pytest.raises(ValueError, match=r"^flashdecpp::sample: seen must be given with repetition_penalty"):
        ops.sample(logits, repetition_penalty=penalty)


def test_scales_of_8_bits(one_place):
    """With one scale per row, any K is valid; with groups, it isn't."""
    arguments = quantized(one_place, 3, 24, 96, bits=8, group=None, offsets=True)
    wide = {"scales": arguments["scales"][:, None].expand(24, 2).contiguous(), "offsets": None}
    assert_refused("quantized_linear", "scales", arguments | wide)  # groups of 48
    assert_refused("quantized_linear", "scales", arguments | {"scales": wide["scales"][None]})
    assert_refused("quantized_linear", "offsets", arguments | {"offsets": arguments["offsets"][:, None]})
    assert_refused("quantized_linear", "scales", arguments | {"scales": arguments["scales"][:5]})


def test_phi_excludes_carried_phi(one_place):
    arguments = every_op(one_place)["decode_attention.carry"]
    with pytest.raises(ValueError, match=r"^flashdecpp::decode_attention: phi must be None if"):
        ops.decode_attention(**arguments, phi=torch.zeros(4, device=one_place.device))


@pytest.mark.parametrize("name", ["gate", "activation"])
@pytest.mark.parametrize("op", ["linear", "quantized_linear"])
def test_residual_excludes_gate_and_activation(one_place, op, name):
    arguments = every_op(one_place)[f"{op}.residual"]
    before = arguments["residual"].clone()
    with pytest.raises(
        ValueError, match=rf"^flashdecpp::{op}: {name} must be None if residual is given, got"
    ):
        wrapper(op)(**arguments, **{name: "silu"})
    assert_same(arguments["residual"], before)


def tensors(arguments: dict) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def assert_refused(op: str, argument: str, arguments: dict) -> None:
    """The op raises a RuntimeError, its wrapper a ValueError with the same text; no tensor changes."""
    before = {name: x.clone() for name, x in tensors(arguments).items()}
    name = op.partition(".")[0]
    message = rf"^flashdecpp::{name}: {argument}\b.* must .+, got .+"
    with pytest.raises(RuntimeError, match=message) as from_op:
        getattr(torch.ops.flashdecpp, name)(**arguments)
    with pytest.raises(ValueError, match=message) as from_wrapper:
        wrapper(op)(**arguments)
    assert str(from_op.value).startswith(str(from_wrapper.value))
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("op", "argument", "change"),
    [(op, *case) for op, cases in BAD.items() for case in cases],
    ids=[f"{op}-{case[0]}-{i}" for op, cases in BAD.items() for i, case in enumerate(cases)],
)
def test_bad_argument(one_place, op, argument, change):
    arguments = every_op(one_place)[op]
    wrapper(op)(**arguments)  # valid until the change below
    assert_refused(op, argument, arguments | change(arguments))


def test_fp8_scales(one_place):
    arguments = attention(one_place, [5, 33], fp8=True)
    for name in ("k_scale", "v_scale"):
        assert_refused("decode_attention", name, arguments | {name: arguments[name].half()})
        assert_refused("decode_attention", name, arguments | {name: arguments[name].repeat(2)})


def test_more_sequences_than_a_contiguous_cache_holds(one_place):
    for op, make in (("decode_attention", attention), ("rotary_append", rotary)):
        arguments = make(one_place, [5, 33], block_size=None)
        arguments |= {name: arguments[name][:1] for name in ("k_cache", "v_cache")}
        assert_refused(op, "k_cache", arguments)


def test_other_errors_keep_their_type():
    """Only an op's complaint about an argument becomes a ValueError."""
    with pytest.raises((RuntimeError, TypeError)) as caught:
        ops.gemv(None, None)
    assert not isinstance(caught.value, ValueError)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in BAD if op != "gated_activation"])  # it has only one tensor
def test_mixed_devices(op):
    arguments = every_op(Place("cuda", torch.bfloat16))[op]
    first, *others = tensors(arguments)
    for name in others:
        assert_refused(op, name, arguments | {name: arguments[name].cpu()})
    assert_refused(op, r"\w+", arguments | {first: arguments[first].cpu()})


@pytest.mark.gpu
def test_refused_only_on_gpu():
    """float32, a K that isn't a multiple of 8, and addresses that vector loads can't start on."""
    place = Place("cuda", torch.float16)
    x, weight = randn(place, 2, 24), randn(place, 8, 24)
    for op in ("gemv", "flat_gemm"):
        assert_refused(op, "x", {"x": x.float(), "weight": weight.float()})
        assert_refused(op, "x", {"x": x[:, :20], "weight": weight[:, :20]})
        assert_refused(op, "weight", {"x": x[:, :16], "weight": weight[:, 1:17]})
    arguments = attention(place, [5, 33])
    shifted = randn(place, 2, 1, 4, 65)[..., 1:]
    assert_refused("decode_attention", "q", arguments | {"q": shifted})
    wide = Place("cuda", torch.float32)
    assert_refused("decode_attention", "q", attention(wide, [5, 33]))
