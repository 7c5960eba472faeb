"""Random calls of every op: each must give the right result or an error that names an argument.

A call starts from valid arguments with random shapes, dtypes, layouts and options, and must succeed. Half the
calls then have one argument spoiled: another dtype, device, rank, shape or stride, memory shared with another
argument, gradients, NaN, a non-tensor, or an edge-case number. Results are compared with the reference, and a
refused call must have written nothing. A worker process makes the calls, so a crash is also a finding.

    python tests/fuzz_ops.py [--device cuda] [--count 10000] [--seed 0] [--only linear,sample]
    python tests/fuzz_ops.py --seed 0 --call 4711        # one call again, with its arguments
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from strategies import NAN, Place, attention, int32, quantized, randn, rotary, sampling, wrapper
from tolerance import assert_same, compare, overload_for
from torch import Tensor
from tqdm import tqdm

from flashdecpp import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (
    *DTYPES,
    *(torch.float64, torch.complex64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
    torch.float8_e4m3fn,
)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
HEAD_DIMS = (8, 40, 64, 80, 96, 128, 136, 192, 256)
EDGE_FLOATS = (NAN, torch.inf, -torch.inf, -1.0, 0.0, 1e-46, 1e-38, 1e39, 1e308, 5, None, "1", True)
EDGE_INTS = (-5, 0, 1, 3, 2**31, 2**40, 2**63 - 1, -(2**63), 1.5, None, "1")
EDGE_STRINGS = ("", "nope", "AUTO", "silu\0", None, 5)
NO_TENSORS = (None, 3, 1.5, "x", [1.0], ())

Arguments = dict[str, Any]


class Finding(Exception):
    """Something a call must not do."""


@dataclass
class Call:
    """One call: an op, its arguments, and the changes made to them. A `valid` call must succeed."""

    op: str
    arguments: Arguments
    valid: bool = True
    undefined: bool = False  # the result is unspecified, but the process must survive the call
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        parts = []
        for name, x in self.arguments.items():
            if isinstance(x, Tensor):
                dtype = str(x.dtype).removeprefix("torch.")
                strides = list(x.stride()) if x.layout == torch.strided else x.layout
                parts.append(f"{name}={dtype}{list(x.shape)} strides {strides} on {x.device}")
            else:
                parts.append(f"{name}={x!r}")
        return f"{self.op}({', '.join(parts)}) [{'; '.join(self.notes) or 'valid'}]"


# ------------------------------------------------------------------------------------------ valid arguments


def decode_attention(rng: random.Random, place: Place) -> Arguments:
    batch, kv_heads, group = rng.randint(0, 4), rng.randint(1, 3), rng.choice((1, 2, 3, 4, 5, 7, 8, 16))
    q_heads = kv_heads * group
    lengths = [rng.choice((0, 1, rng.randint(1, 40), rng.randint(1, 300))) for _ in range(batch)]
    arguments = attention(
        place,
        lengths,
        q_len=rng.choice((1, 1, 1, 2, 5, 16)),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=rng.choice(HEAD_DIMS),
        fp8=rng.random() < 0.2,
        seed=rng.randrange(1000),
        **_layout(rng),
    )

    def heads(scale: float = 1.0) -> Tensor:
        return torch.tensor([rng.gauss(0, scale) for _ in range(q_heads)], device=place.device)

    options: dict[str, Callable[[], Any]] = {
        "scale": lambda: rng.uniform(0.01, 0.5),
        "softcap": lambda: rng.choice((0.0, 5.0, 30.0)),
        "window": lambda: rng.choice((-1, 1, 17, 100, 2**40)),
        "alibi_slopes": lambda: heads(0.05),
        "sinks": heads,
        "num_splits": lambda: rng.choice((0, 1, 3, 64)),
        "fallback_count": lambda: int32(place, [0]),
    }
    arguments |= {name: make() for name, make in options.items() if rng.random() < 0.3}
    phi = rng.choice(("none", "phi", "rows", "carried_phi"))
    if phi == "phi":
        arguments["phi"] = heads(rng.choice((1.0, 300.0)))
    elif phi == "rows":
        arguments["phi"] = torch.stack([heads(3.0) for _ in range(batch)]) if batch else heads()
    elif phi == "carried_phi":
        carried = torch.full((batch, q_heads), rng.choice((0.0, NAN, 1000.0)), device=place.device)
        arguments["carried_phi"] = carried
    return arguments


def rotary_append(rng: random.Random, place: Place) -> Arguments:
    head_dim = rng.choice(HEAD_DIMS)
    lengths = [rng.choice((0, 1, rng.randint(1, 60))) for _ in range(rng.randint(0, 4))]
    arguments = rotary(
        place,
        lengths,
        q_len=rng.choice((1, 1, 2, 7)),
        q_heads=rng.choice((1, 4, 6)),
        kv_heads=rng.choice((1, 2)),
        head_dim=head_dim,
        rotary_dim=rng.choice((head_dim, head_dim // 2 // 2 * 2)),
        max_positions=rng.choice((8, 64)),
        fp8=rng.random() < 0.2,
        seed=rng.randrange(1000),
        **_layout(rng),
    )
    arguments["interleaved"] = rng.random() < 0.5
    if rng.random() < 0.2:
        arguments["cos_sin"] = None
    return arguments


def _layout(rng: random.Random) -> dict[str, Any]:
    return {
        "block_size": rng.choice((None, 1, 8, 16, 24, 64)),
        "layout": rng.choice(("NHD", "HND", "two_planes", "halves")),
    }


def _rows(rng: random.Random, place: Place, k: int) -> Tensor:
    """x of [..., k] in one of the layouts that activations come in."""
    m = rng.choice((0, 1, 1, 2, 3, 8, 17, 33, 70, 130))
    seed = rng.randrange(1000)
    shape = rng.choice(((k,), (m, k), (m, k), (1, m, k), (2, max(1, m // 4), k)))
    x = randn(place, *shape, seed=seed)
    return rng.choice((lambda: x, lambda: randn(place, *shape[:-1], 2 * k, seed=seed)[..., k:]))()


def _sizes(rng: random.Random, place: Place) -> tuple[int, int]:
    odd = place.device == "cpu" or rng.random() < 0.2
    k = rng.choice((1, 7, 33, 100) if odd and rng.random() < 0.4 else (8, 64, 136, 256, 520))
    return rng.choice((0, 1, 5, 16, 24, 64, 130)), k


def linear(rng: random.Random, place: Place, op: str = "linear", fused: bool = False) -> Arguments:
    n, k = _sizes(rng, place)
    arguments: Arguments = {"x": _rows(rng, place, k), "weight": randn(place, n, k, seed=1)}
    if rng.random() < 0.5:
        arguments["bias"] = randn(place, n, seed=2)
    if op == "linear" and rng.random() < 0.7:
        arguments["impl"] = rng.choice(("auto", "gemv", "flat_gemm", "blas"))
    if fused:
        _fuse(rng, place, arguments, k)
    return arguments


def quantized_linear(rng: random.Random, place: Place, fused: bool = False) -> Arguments:
    bits = rng.choice((4, 8))
    group = rng.choice((32, 64, 128) if bits == 4 else (None, 32, 64))
    k = (group or 8) * rng.randint(1, 4)
    arguments = quantized(
        place,
        rng.choice((1, 2, 8, 17, 50, 70)),
        rng.choice((1, 5, 16, 24, 64)),
        k,
        bits=bits,
        group=group,
        offsets=rng.random() < 0.5,
        bias=rng.random() < 0.5,
    )
    if fused:
        _fuse(rng, place, arguments, k)
    return arguments


def _fuse(rng: random.Random, place: Place, arguments: Arguments, k: int) -> None:
    """Adds fusions to a linear: a norm before it, and a gate, activation or residual after."""
    x, rows = arguments["x"], arguments["weight"].size(0)
    if rng.random() < 0.5:
        norm_dtype = rng.choice((place.dtype, torch.float32))
        arguments |= {"norm_weight": randn(Place(place.device, norm_dtype), k, seed=4), "norm_eps": 1e-5}
    after = rng.choice(("none", "gate", "activation", "residual"))
    if after == "activation" or (after == "gate" and rows % 2 == 0):
        arguments[after] = rng.choice(ACTIVATIONS)
    elif after == "residual":
        arguments["residual"] = randn(place, *x.shape[:-1], rows, seed=5)


def norm(rng: random.Random, place: Place, op: str) -> Arguments:
    cols = rng.choice((1, 8, 33, 64, 576, 1000))
    x = _rows(rng, place, cols)
    arguments: Arguments = {"x": x, "weight": randn(place, cols, seed=1)}
    if op == "layer_norm":
        arguments["bias"] = rng.choice((None, randn(place, cols, seed=2)))
        arguments["weight"] = rng.choice((None, arguments["weight"]))
    if rng.random() < 0.5:
        arguments["residual"] = randn(place, *x.shape, seed=3)
    if rng.random() < 0.5:
        arguments["eps"] = rng.choice((0.0, 1e-6, 1e-5, 0.1))
    return arguments


def gated_activation(rng: random.Random, place: Place) -> Arguments:
    shape = rng.choice(((64,), (3, 64), (2, 5, 66), (0, 8), (4, 0)))
    return {"gate_up": randn(place, *shape), "activation": rng.choice(ACTIVATIONS)}


def sample(rng: random.Random, place: Place) -> Arguments:
    batch, vocab = rng.randint(1, 5), rng.choice((1, 2, 50, 272, 5000))
    choices: dict[str, tuple] = {
        "temperature": (0.0, 0.7, 1.0, 3.0, 1e-38),
        "top_k": (0, 1, 20, 10**6, -3),
        "top_p": (0.0, 0.3, 0.95, 1.0, 2.0),
        "min_p": (0.0, 0.05, 1.0, -1.0),
        "repetition_penalty": (0.5, 1.0, 1.3),
    }
    picked = {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.6}
    arguments = sampling(place, batch, vocab, seed=rng.randrange(1000), **picked)
    if "repetition_penalty" in arguments or rng.random() < 0.2:
        seen = torch.rand(batch, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
        arguments["seen"] = seen.to(place.device)
    if rng.random() < 0.3:  # a mask that leaves a few tokens, or none
        arguments["logits"][:, rng.randint(0, 3) :] = rng.choice((-torch.inf, NAN))
    if rng.random() < 0.1:
        arguments["logits"] *= 1e4
    return arguments


BUILDERS: dict[str, Callable[[random.Random, Place], Arguments]] = {
    "decode_attention": decode_attention,
    "rotary_append": rotary_append,
    "gemv": lambda rng, place: linear(rng, place, "gemv"),
    "flat_gemm": lambda rng, place: linear(rng, place, "flat_gemm"),
    "linear": linear,
    "linear.fused": lambda rng, place: linear(rng, place, fused=True),
    "quantized_linear": quantized_linear,
    "quantized_linear.fused": lambda rng, place: quantized_linear(rng, place, fused=True),
    "rms_norm": lambda rng, place: norm(rng, place, "rms_norm"),
    "layer_norm": lambda rng, place: norm(rng, place, "layer_norm"),
    "gated_activation": gated_activation,
    "sample": sample,
}


# ------------------------------------------------------------------------------------------ spoiled arguments


def _other_device(rng: random.Random, call: Call, name: str) -> Tensor:
    """On a different device from the rest; an only tensor stays, since moving it gives a valid call."""
    x = call.arguments[name]
    alone = sum(isinstance(other, Tensor) for other in call.arguments.values()) == 1
    return x if alone else x.to(rng.choice(("meta", "cpu") if x.is_cuda else ("meta",)))


def _other_rank(rng: random.Random, call: Call, name: str) -> Tensor:
    x = call.arguments[name]
    return rng.choice((lambda: x[None], lambda: x.reshape(-1), lambda: x[..., None]))()


def _other_shape(rng: random.Random, call: Call, name: str) -> Tensor:
    x = call.arguments[name]
    if x.dim() == 0 or 0 in x.shape:
        return x.new_zeros(3)
    dim, size = (d := rng.randrange(x.dim())), x.size(d)
    return rng.choice(
        (
            lambda: x.narrow(dim, 0, size - 1),
            lambda: x.narrow(dim, 0, 0),
            lambda: torch.cat((_bytes(x), _bytes(x)), dim).view(x.dtype) if dim < x.dim() - 1 else x[..., :1],
        )
    )()


def _bytes(x: Tensor) -> Tensor:
    """Not every torch function supports float8."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _other_strides(rng: random.Random, call: Call, name: str) -> Tensor:
    """The same values, in a different layout."""
    x = call.arguments[name]
    if x.dim() == 0:
        return x
    wide = torch.empty((*x.shape[:-1], 2 * x.size(-1)), dtype=x.dtype, device=x.device)[..., ::2]
    tall = torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device).permute(*reversed(range(x.dim())))
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    target = rng.choice((wide, tall, shifted))
    return target.copy_(x)


def _expanded(rng: random.Random, call: Call, name: str) -> Tensor:
    """One index expanded over a whole dimension."""
    x = call.arguments[name]
    if x.dim() == 0 or 0 in x.shape:
        return x
    dim = rng.randrange(x.dim())
    return x.narrow(dim, 0, 1).expand(x.shape)


def _shared(rng: random.Random, call: Call, name: str) -> Tensor:
    """Memory shared with another argument."""
    x = call.arguments[name]
    others = [
        y
        for other, y in call.arguments.items()
        if isinstance(y, Tensor) and other != name and y.dtype == x.dtype and y.device == x.device
        if y.is_contiguous() and y.numel() >= x.numel() > 0
    ]
    return rng.choice(others).view(-1)[-x.numel() :].view(x.shape) if others else x


def _with_nan(rng: random.Random, call: Call, name: str) -> Tensor:
    x = call.arguments[name]
    if x.dtype not in DTYPES or x.numel() == 0:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[rng.randrange(x.numel())] = NAN
    return x


def _negated(rng: random.Random, call: Call, name: str) -> Tensor:
    """A view that negates what is in memory. Only for inputs, since torch can't write through such a view."""
    x = call.arguments[name]
    schema = overload_for(call.op, call.arguments)._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return x if name in written or x.dtype not in DTYPES else torch._neg_view(x.neg())


def _sparse(rng: random.Random, call: Call, name: str) -> Tensor:
    x = call.arguments[name]
    return x.to_sparse() if x.dtype in DTYPES and x.dim() > 0 else x


TENSOR_CHANGES: dict[str, Callable[[random.Random, Call, str], Any]] = {
    "dtype": lambda rng, call, name: call.arguments[name].to(rng.choice(OTHER_DTYPES)),
    "device": _other_device,
    "rank": _other_rank,
    "shape": _other_shape,
    "strides": _other_strides,
    "expanded": _expanded,
    "shared": _shared,
    "NaN": _with_nan,
    "negated": _negated,
    "sparse": _sparse,
    "no tensor": lambda rng, call, name: rng.choice(NO_TENSORS),
}


def spoil(rng: random.Random, call: Call) -> None:
    """Changes one argument, after which the op may refuse the call."""
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    call.valid = False
    if isinstance(value, Tensor):
        if name in ("seq_lens", "block_table") and rng.random() < 0.3:
            edge = rng.choice((-1, -(2**31), 2**31 - 1, 10**6))
            call.arguments[name] = torch.full_like(value, edge)
            call.undefined = call.arguments.get("block_table") is not None
            call.notes.append(f"{name} filled with {edge}")
            return
        kind = rng.choice([*TENSOR_CHANGES, "grad"])
        call.notes.append(f"{name}: {kind}")
        # Arbitrary lengths and ids may point to cache blocks that were never written.
        call.undefined = name in ("seq_lens", "block_table") and kind in ("expanded", "shared")
        if kind == "grad":
            call.arguments[name] = value.detach().clone().requires_grad_(value.dtype in DTYPES)
        else:
            call.arguments[name] = TENSOR_CHANGES[kind](rng, call, name)
        return
    edges = {float: EDGE_FLOATS, int: EDGE_INTS, str: EDGE_STRINGS, bool: (0, 1, None, "x")}
    call.arguments[name] = rng.choice(edges.get(type(value), NO_TENSORS))
    call.notes.append(f"{name} = {call.arguments[name]!r}")


def make_call(seed: int, number: int, device: str, ops: list[str]) -> Call:
    rng = random.Random(f"{seed}/{number}")
    op, place = rng.choice(ops), Place(device, rng.choice(DTYPES))
    arguments = BUILDERS[op](rng, place)
    call = Call(op, arguments)
    k = arguments["x"].size(-1) if "x" in arguments else 8
    if device == "cuda" and (
        place.dtype == torch.float32 or k % 8 or ("x" in arguments and _odd(arguments["x"]))
    ):
        call.valid = False
        call.notes.append("a GPU may refuse it")
    if rng.random() < 0.5:
        spoil(rng, call)
    return call


def _odd(x: Tensor) -> bool:
    return x.data_ptr() % 16 != 0 or (x.dim() > 1 and x.stride(-2) % 8 != 0)


# ------------------------------------------------------------------------------------------------- one call


def run(call: Call) -> str:
    """ "right" or "refused"; anything else raises a Finding."""
    before = {name: _copy(x) for name, x in call.arguments.items()}
    try:
        if call.undefined:
            wrapper(call.op)(**call.arguments)
            return "right"
        result = check(call)
    except (ValueError, TypeError, RuntimeError, MemoryError, NotImplementedError) as error:
        if call.valid:
            raise Finding(f"refused: {error}") from error
        if not names_argument(call, str(error).partition("\n")[0]):
            raise Finding(f"the error names no argument: {type(error).__name__}: {error}") from error
        for name, x in call.arguments.items():
            if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta:
                try:
                    assert_same(_bytes(x.detach()), _bytes(before[name]), name)
                except AssertionError as changed:
                    raise Finding(f"refused ({error}), but {changed}") from error
        return "refused"
    return result


def names_argument(call: Call, message: str) -> bool:
    """Or the layout, if torch itself refuses a tensor that isn't strided."""
    schema = overload_for(call.op, call.arguments)._schema
    names = {argument.name for argument in schema.arguments} | set(call.arguments)
    return re.search(rf"\b({'|'.join(names)})\b|'Sparse\w+' backend", message) is not None


def check(call: Call) -> str:
    """Runs the op and compares it with its reference. Failed assertions and references are findings."""
    tracked = [x for x in call.arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    if tracked:
        result = wrapper(call.op)(**call.arguments)
        outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
        if any(x.dtype.is_floating_point for x in outputs):
            must_have_no_backward(outputs)
        call.arguments = {n: x.detach() if isinstance(x, Tensor) else x for n, x in call.arguments.items()}
    try:
        check_sample(call.arguments) if call.op == "sample" else compare_or_refuse(call)
    except AssertionError as error:
        raise Finding(str(error)) from error
    return "right"


def must_have_no_backward(outputs: list[Tensor]) -> None:
    total = sum(x.float().sum() for x in outputs if x.dtype.is_floating_point)
    try:
        total.backward()
    except RuntimeError as error:
        if "flashdecpp" not in str(error):
            raise Finding(f"backward fails without a word of the op: {error}") from error
        return
    raise Finding("backward went through in silence")


def compare_or_refuse(call: Call) -> None:
    """`compare`, after a trial call if the op may refuse, so the reference never sees refused arguments."""
    if not call.valid:
        wrapper(call.op)(**call.arguments)
    try:
        compare(call.op, **call.arguments)
    except AssertionError:
        raise
    except Exception as error:
        raise Finding(f"accepted what the reference refuses: {error}") from error


def check_sample(arguments: Arguments) -> None:
    """Every token must be one that the filters keep, give or take rounding at their thresholds."""
    slack = dict(arguments)
    tokens = wrapper("sample")(**arguments)
    for name, factor, shift in (("top_p", 1 + 1e-4, 1e-6), ("min_p", 1 - 1e-4, -1e-6)):
        if slack.get(name) is not None:
            slack[name] = slack[name] * factor + shift
    names = ("logits", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    filters = {name: slack[name] for name in names if slack.get(name) is not None}
    if arguments.get("seen") is not None:
        seen = arguments["seen"].clone()
        rows = torch.arange(seen.size(0), device=seen.device)[tokens >= 0]
        assert seen[rows, tokens[tokens >= 0]].all(), "a chosen token was not marked"
        return  # the filters depend on the old `seen`, which is overwritten
    weights = reference.kept_weights(**filters, compute_dtype=torch.float64)
    none = (weights > 0).any(-1).logical_not()
    assert tokens.shape == none.shape and tokens.dtype == torch.int64, "shape or dtype"
    assert torch.equal(tokens < 0, none), f"{tokens.tolist()} where no token is left in rows {none.tolist()}"
    kept = weights.gather(1, tokens.clamp(min=0)[:, None])[:, 0] > 0
    assert (kept | none).all(), f"{tokens.tolist()} holds a token that the filters remove"


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


# ------------------------------------------------------------------------------------------------- many calls


def work(options: argparse.Namespace) -> None:
    """The worker prints one line of JSON when it begins a call, and one when the call ends."""
    torch.set_num_threads(1)
    for number in range(options.first, options.count):
        call = make_call(options.seed, number, options.device, options.ops)
        print(json.dumps({"begin": number}), flush=True)
        try:
            outcome, finding = run(call), None
            if options.device == "cuda":
                torch.cuda.synchronize()
        except Finding as error:
            outcome, finding = "finding", f"{call.describe()}: {error}"
        print(json.dumps({"end": number, "outcome": outcome, "op": call.op, "finding": finding}), flush=True)


def outcomes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The worker's report of each call. After a crash, a new worker resumes at the next call."""
    first = options.first
    while first < options.count:
        command = [sys.executable, __file__, "--work", "--first", str(first), "--count", str(options.count)]
        command += ["--seed", str(options.seed), "--device", options.device, "--only", ",".join(options.ops)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            for line in worker.stdout:
                said = json.loads(line)
                first = said.get("end", said.get("begin", first))
                if "end" in said:
                    yield said
                    first += 1
        if worker.returncode == 0:
            return
        call = make_call(options.seed, first, "cpu", options.ops)
        yield {
            "end": first,
            "op": call.op,
            "outcome": "finding",
            "finding": f"the process died with status {worker.returncode}: {call.describe()}",
        }
        first += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(BUILDERS), help="which ops")
    parser.add_argument("--call", type=int, help="make this one call, here, and show it")
    parser.add_argument("--first", type=int, default=0, help="the first call")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ops = options.only.split(",")
    if unknown := set(options.ops) - set(BUILDERS):
        parser.error(f"--only must be among {', '.join(BUILDERS)}; got {', '.join(sorted(unknown))}")
    if options.call is not None:
        call = make_call(options.seed, options.call, options.device, options.ops)
        print(call.describe())
        print(run(call))
        return
    if options.work:
        work(options)
        return

    begin, findings, counts = time.perf_counter(), [], Counter()
    with tqdm(total=options.count, initial=options.first, unit=" calls", disable=None) as bar:
        for said in outcomes(options):
            bar.update()
            counts[said["outcome"]] += 1
            if said["outcome"] == "finding":
                findings.append(said["finding"])
                bar.write(f"call {said['end']}: {said['finding']}")
    seconds = time.perf_counter() - begin
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(
        f"{sum(counts.values())} calls on {options.device}, seed {options.seed}, {seconds:.0f} s: {summary}"
    )
    sys.exit(f"{len(findings)} findings" if findings else 0)


if __name__ == "__main__":
    main()
