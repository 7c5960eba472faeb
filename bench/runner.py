"""The model runner on one GPU, with random weights of real shapes, generated on the device.

A decode step is the one that LLM runs, including its CUDA graph, sampling, and the copy of the tokens to the
host: steps are launched back to back and timed by CUDA events. They are compared with a floor: the bytes of
weights, keys and values over the read bandwidth measured in the same run.

    python bench/runner.py                         # everything, into bench/results/runner_h100.json and .png
    python bench/runner.py --models llama-2-7b --parts decode,breakdown
    python bench/runner.py --dry-run               # tiny shapes on the CPU, to test the script itself
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import measure
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flashdecpp import ops
from flashdecpp.engine.config import EngineConfig
from flashdecpp.engine.decode_batch import DecodeBatch
from flashdecpp.engine.engine import Engine
from flashdecpp.engine.request import Request
from flashdecpp.engine.sampling import SamplingParams
from flashdecpp.loading.generation_config import GenerationDefaults
from flashdecpp.models.architectures import ARCHITECTURES
from flashdecpp.models.attention import MAX_Q_LEN
from flashdecpp.models.config import ModelConfig
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import BLOCK_SIZE, KVCache, blocks_for
from flashdecpp.models.phi import PhiSource
from flashdecpp.models.rope import Rope
from flashdecpp.models.weights import Layer, Matrix, Weights
from flashdecpp.quantization import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS, ROUNDS, WARM_UP = 16, 5, 4  # times are medians over ROUNDS of STEPS steps
GENERATED = 64  # tokens per call of transformers' generate
# Random logits might end a sequence.
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True).resolved(GenerationDefaults())
PARTS = (
    "decode",
    "prefill",
    "prefill attention",
    "engine",
    "breakdown",
    "ablations",
    "quantized",
    "transformers",
)


def model(
    architecture: str,
    hidden: int,
    heads: tuple[int, int],
    ffn: int,
    vocab: int,
    layers: int = 32,
    rotary: float | None = 1.0,
    **settings,
) -> ModelConfig:
    q_heads, kv_heads = heads
    head_dim = hidden // q_heads
    rope = None if rotary is None else Rope(int(head_dim * rotary), 10000.0, 16384)
    return ModelConfig(
        architecture=next(known for known in ARCHITECTURES if known.name == architecture),
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        embed_dim=hidden,
        norm_eps=1e-5,
        context=16384 if rope else 2048,
        ropes=(rope,) * layers,
        tied_embeddings=settings.pop("tied_embeddings", False),
        windows=(-1,) * layers,
        **settings,
    )


LLAMA, ALL_BIASES = "LlamaForCausalLM", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
MODELS = {
    "llama-2-7b": model(LLAMA, 4096, (32, 32), 11008, 32000),
    "llama-3-8b": model(LLAMA, 4096, (32, 8), 14336, 128256),
    "qwen2.5-7b": model("Qwen2ForCausalLM", 3584, (28, 4), 18944, 152064, layers=28, qkv_bias=True),
    "opt-6.7b": model(
        "OPTForCausalLM",
        4096,
        (32, 32),
        16384,
        50272,
        rotary=None,
        activation="relu",
        tied_embeddings=True,
        **ALL_BIASES,
    ),
    "chatglm2-6b": model("ChatGLMModel", 4096, (32, 2), 13696, 65024, layers=28, rotary=0.5, qkv_bias=True),
    "llama-2-13b": model(LLAMA, 5120, (40, 40), 13824, 32000, layers=40),
}
# (batch, context) of decode steps; (prompts, length) of prefills
DECODE = {"llama-2-7b": [(1, 128), (1, 1024), (1, 8192), (8, 1024), (32, 1024)]}
PREFILL = {"llama-2-7b": [(1, 128), (1, 1024), (1, 8192), (8, 1024)]}
PREFILL_ATTENTION = [128, 512, 1024, 2048, 8192]
OTHER_DECODE, OTHER_PREFILL = [(1, 1024), (8, 1024)], [(1, 1024)]
BREAKDOWN = [(1, 1024), (8, 1024), (32, 1024)]
ABLATED = [(1, 1024), (8, 1024), (1, 8192)]
FORMATS = {
    "int8": {"bits": 8},
    "int4 g32": {"bits": 4, "group_size": 32},
    "int4 g128": {"bits": 4, "group_size": 128},
}

# A kernel's kind is the first with a part of its name
KINDS = {
    "linear": ("gemv", "flat_ring", "flat_gemm", "gemm", "quantized", "cutlass", "nvjet", "splitK", "cublas"),
    "attention": ("decode_attention", "flash_fwd", "fmha"),
    "rotary": ("rotary",),
    "norm": ("norm_kernel",),
    "activation": ("gated", "relu", "clamp"),
    "sampling": ("sample",),
}


class Words:
    """Replaces the tokenizer: every token is one letter."""

    special_tokens: ClassVar[dict[int, str]] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "x" * len(ids)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> Weights:
    def tensor(*shape: int, std: float = 0.02) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    def norm(field: str) -> dict[str, torch.Tensor]:
        found = {field: torch.ones(config.hidden, dtype=dtype, device=device)}
        if config.architecture.norm == "layer":
            found[field + "_bias"] = torch.zeros(config.hidden, dtype=dtype, device=device)
        return found

    def linear(field: str, rows: int, columns: int, bias: bool) -> dict[str, torch.Tensor]:
        return {field: tensor(rows, columns)} | ({field + "_bias": tensor(rows)} if bias else {})

    up = config.ffn * (2 if config.architecture.gated else 1)
    layers = tuple(
        Layer(
            **norm("attn_norm"),
            **linear("qkv", sum(config.qkv_rows), config.hidden, config.qkv_bias),
            **linear("o", config.hidden, config.qkv_rows[0], config.o_bias),
            **norm("ffn_norm"),
            **linear("gate_up", up, config.hidden, config.mlp_bias),
            **linear("down", config.hidden, config.ffn, config.mlp_bias),
        )
        for _ in range(config.layers)
    )
    embed = tensor(config.vocab, config.hidden)
    learned = config.context + config.architecture.position_offset
    return Weights(
        embed=embed,
        lm_head=embed if config.tied_embeddings else tensor(config.vocab, config.hidden),
        layers=layers,
        dtype=dtype,
        positions=None if config.ropes[0] else tensor(learned, config.hidden),
        **norm("norm"),
    )


def quantized(weights: Weights, form: dict[str, int]) -> Weights:
    """Quantizes everything but the embedding, like LLM(quantize=...)."""

    def rounded(weight: Matrix) -> Matrix:
        return quantize(weight, **form, scales_dtype=torch.float16)

    def layer(one: Layer) -> Layer:
        return replace(one, **{name: rounded(getattr(one, name)) for name in ("qkv", "o", "gate_up", "down")})

    return replace(weights, layers=tuple(map(layer, weights.layers)), lm_head=rounded(weights.lm_head))


@dataclass
class Subject:
    """A model and the ways to time it."""

    decoder: Decoder
    max_len: int
    ceiling: float  # bytes per second

    @property
    def on_gpu(self) -> bool:
        return self.decoder.device.type == "cuda"

    def batch(self, rows: int, context: int) -> DecodeBatch:
        """Sequences of `context` tokens, with their blocks scattered over the cache."""
        each = blocks_for(context + 1 + ROUNDS * STEPS + WARM_UP + PROFILED)
        cache = KVCache.for_model(self.decoder.config, rows * each, self.decoder.device, self.decoder.dtype)
        for pair in cache.layers:
            for part in pair:
                part.normal_()
        engine = EngineConfig(max_len=max(self.max_len, each * BLOCK_SIZE), max_batch=rows)
        batch = DecodeBatch(self.decoder, cache, frozenset([2]), engine)
        order = torch.randperm(rows * each).view(rows, each).tolist()
        requests = [
            Request("", [5] * context, ENDLESS, Words(), token_ids=[7], seed=0, blocks=blocks)
            for blocks in order
        ]
        batch.join(requests)
        return batch

    def step_ms(self, rows: int, context: int) -> dict[str, float]:
        batch = self.batch(rows, context)

        def steps() -> None:
            for _ in range(STEPS):
                batch.read(batch.step())

        def launched() -> None:
            launches = [batch.step() for _ in range(STEPS)]
            for sampled in launches:
                batch.read(sampled)

        for _ in range(WARM_UP):
            batch.read(batch.step())
        rounds = [self.elapsed_ms(launched) / STEPS for _ in range(ROUNDS - 1)]
        waited = self.elapsed_ms(steps) / STEPS
        floor = self.floor_ms(rows, context)
        ms = statistics.median(rounds)
        return {
            "batch": rows,
            "context": context,
            "ms": round(ms, 3),
            "floor_ms": round(floor, 3),
            "of_floor": round(floor / ms, 3),
            "ms_when_each_is_waited_for": round(waited, 3),
        }

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights that a step reads, by kind of kernel."""
        weights = self.decoder.weights
        norms = sum(layer.attn_norm.nbytes + layer.ffn_norm.nbytes for layer in weights.layers)
        matrices = sum(
            m.nbytes for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        return {"linear": matrices + weights.lm_head.nbytes, "norm": norms}

    def floor_ms(self, rows: int, context: int) -> float:
        return sum(self.floors_ms(rows, context).values())

    def floors_ms(self, rows: int, context: int) -> dict[str, float]:
        keys = self.decoder.config.cache_bytes_per_token(self.decoder.dtype) * rows * (context + 1)
        amounts = self.weight_bytes() | {"attention": keys}
        return {kind: amount / self.ceiling * 1e3 for kind, amount in amounts.items()}

    def prefill_ms(self, prompts: int, length: int) -> dict[str, float]:
        """Time for `prompts` prompts of `length` tokens, processed one after another like in the engine."""
        config, device = self.decoder.config, self.decoder.device
        cache = KVCache.for_model(config, blocks_for(length), device, self.decoder.dtype)
        tokens = torch.randint(0, config.vocab, (length,), device=device)
        table = torch.arange(cache.num_blocks, dtype=torch.int32, device=device)[None]

        def run() -> None:
            for _ in range(prompts):
                self.decoder.prefill(tokens, cache, table)

        run()
        ms = statistics.median(self.elapsed_ms(run) for _ in range(3))
        matrices = sum(
            m.shape[0] * m.shape[1]
            for layer in self.decoder.weights.layers
            for m in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        flops = (
            prompts * length * (2 * matrices + 2 * config.layers * length * config.q_heads * config.head_dim)
        )
        return {
            "prompts": prompts,
            "length": length,
            "ms": round(ms, 2),
            "tflops": round(flops / ms / 1e9),
        }

    def prefill_attention_us(self, length: int) -> dict[str, object]:
        """One layer's attention over a prompt: torch's SDPA, as in the runner, and the decode op.

        The op processes pieces of MAX_Q_LEN tokens, with and without the unified maximum.
        """
        config, device, dtype = self.decoder.config, self.decoder.device, self.decoder.dtype
        cache = KVCache.for_model(config, blocks_for(length), device, dtype)
        k_cache, v_cache = cache.layers[0]
        q = torch.randn(length, config.q_heads, config.head_dim, dtype=dtype, device=device)
        k, v = (part.normal_().flatten(0, 1)[None, :length].transpose(1, 2) for part in (k_cache, v_cache))
        pieces = q.unflatten(0, (-1, MAX_Q_LEN))
        ends = torch.arange(MAX_Q_LEN, length + 1, MAX_Q_LEN, dtype=torch.int32, device=device)
        table = torch.arange(cache.num_blocks, dtype=torch.int32, device=device).repeat(len(pieces), 1)
        gqa = config.q_heads != config.kv_heads

        def sdpa() -> None:
            F.scaled_dot_product_attention(q[None].transpose(1, 2), k, v, is_causal=True, enable_gqa=gqa)

        def by_pieces(phi: torch.Tensor | None) -> None:
            ops.decode_attention(pieces, k_cache, v_cache, ends, table, phi=phi)

        phi = torch.full((config.q_heads,), 4.0, device=device)
        ways = {"sdpa": sdpa, "pieces": partial(by_pieces, None), "pieces, unified": partial(by_pieces, phi)}
        times = {}
        for way, run in ways.items():
            run()
            times[way] = round(
                1e3
                * statistics.median(
                    self.elapsed_ms(lambda run=run: [run() for _ in range(5)]) / 5 for _ in range(3)
                ),
                1,
            )
        return {"length": length, "us": times}

    def engine_ms(self, rows: int, context: int, tokens: int) -> dict[str, float]:
        """The whole engine, from requests to tokens: (time of many tokens - time of one) / steps."""

        def run(count: int) -> float:
            config = EngineConfig(
                max_len=self.max_len,
                max_batch=rows,
                cache_tokens=rows * (context + 2 * BLOCK_SIZE + tokens),
                prefix_cache=False,
            )
            engine = Engine(self.decoder, frozenset([2]), config)
            params = replace(ENDLESS, max_tokens=count)
            times = []
            for turn in range(3):
                requests = [
                    Request("", torch.randint(3, 1000, (context,)).tolist(), params, Words())
                    for _ in range(rows)
                ]
                begin = time.perf_counter()
                for _ in engine.run(requests):
                    pass
                if turn:
                    times.append(time.perf_counter() - begin)
            return min(times) * 1e3

        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        one, many = run(1), run(tokens + 1)
        cache = (
            rows
            * (context + 2 * BLOCK_SIZE + tokens)
            * self.decoder.config.cache_bytes_per_token(self.decoder.dtype)
        )
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        return {
            "batch": rows,
            "context": context,
            "first_tokens_ms": round(one, 2),
            "ms_per_step": round((many - one) / tokens, 3),
            "peak_mb_beside_weights_and_cache": round((peak - self.decoder.weights.nbytes - cache) / 1e6),
        }

    def breakdown(self, rows: int, context: int) -> dict[str, object]:
        """Where a step's time goes.

        A kernel's time excludes any overlap with the kernels before it, so that kernels and gaps add up to
        the step's time.
        """
        batch = self.batch(rows, context)
        for _ in range(WARM_UP):
            batch.read(batch.step())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                batch.step()
            torch.cuda.synchronize()
        events = [
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in profiler.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
        ]
        events.sort()
        spent: dict[str, float] = {}
        counts: dict[str, int] = {}
        names: dict[str, str] = {}
        gaps = idle = 0.0
        end_before = None
        for start, end, name in events:
            kind = kind_of(name)
            counts[kind] = counts.get(kind, 0) + 1
            names.setdefault(name[:90], kind)
            if end_before is not None:
                gap = max(0, start - end_before)
                gaps += gap > 0
                idle += gap
                spent[kind] = spent.get(kind, 0.0) + max(0, end - max(start, end_before))
            end_before = end if end_before is None else max(end, end_before)
        per_step = {kind: round(ns / PROFILED / 1e6, 4) for kind, ns in spent.items()}
        return {
            "batch": rows,
            "context": context,
            "launches": round(len(events) / PROFILED, 1),
            "launches_by_kind": {kind: round(count / PROFILED, 1) for kind, count in counts.items()},
            "ms": per_step,
            "gaps": round(gaps / PROFILED, 1),
            "gaps_ms": round(idle / PROFILED / 1e6, 4),
            "floor_ms": {kind: round(ms, 4) for kind, ms in self.floors_ms(rows, context).items()},
            "kernels": names,
        }

    def elapsed_ms(self, run: Callable[[], None]) -> float:
        if not self.on_gpu:
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


PROFILED = 8  # steps


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


@contextlib.contextmanager
def linear_by(impl: str) -> Iterator[None]:
    """Runs every linear layer with one implementation."""
    usual = ops.linear
    ops.linear = partial(usual, impl=impl)
    try:
        yield
    finally:
        ops.linear = usual


def ablations(subject: Subject, cases: list[tuple[int, int]]) -> list[dict]:
    """The paper's three ideas, removed one at a time."""
    rows = []
    for batch, context in cases:
        variants = {"all": subject.step_ms(batch, context)["ms"]}
        online = copy.copy(subject.decoder)
        online.phi = PhiSource.none()
        variants["online softmax"] = replace(subject, decoder=online).step_ms(batch, context)["ms"]
        for impl in ("blas", "gemv", "flat_gemm"):
            with linear_by(impl):
                variants[f"linear: {impl} alone"] = subject.step_ms(batch, context)["ms"]
        rows.append({"batch": batch, "context": context, "ms": variants})
    return rows


def measure_model(
    name: str,
    config: ModelConfig,
    parts: set[str],
    device: str,
    dtype: torch.dtype,
    ceiling: float,
    shrink: Callable,
) -> dict:
    weights = random_weights(config, dtype, device)
    max_len = min(config.context, 9216)
    subject = Subject(Decoder(config, weights, config.context, PhiSource.carry()), max_len, ceiling)
    results: dict[str, object] = {"weight_bytes": weights.nbytes, "dtype": str(dtype).removeprefix("torch.")}

    def cases(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [shrink(*case) for case in found]

    main_model = name == "llama-2-7b"
    if "decode" in parts:
        results["decode"] = [subject.step_ms(*case) for case in cases(DECODE.get(name, OTHER_DECODE))]
    if "prefill" in parts:
        results["prefill"] = [subject.prefill_ms(*case) for case in cases(PREFILL.get(name, OTHER_PREFILL))]
    if main_model and "prefill attention" in parts:
        lengths = PREFILL_ATTENTION if subject.on_gpu else PREFILL_ATTENTION[:1]
        results["prefill attention"] = [subject.prefill_attention_us(length) for length in lengths]
    if main_model and "engine" in parts:
        results["engine"] = [
            subject.engine_ms(*case, tokens=64 if subject.on_gpu else 4)
            for case in cases([(1, 1024), (8, 1024), (32, 1024)])
        ]
    if main_model and "breakdown" in parts and subject.on_gpu:
        results["breakdown"] = [subject.breakdown(*case) for case in cases(BREAKDOWN)]
    if main_model and "ablations" in parts:
        results["ablations"] = ablations(subject, cases(ABLATED))
    if main_model and "transformers" in parts:
        results["transformers"] = [transformers_ms(subject, *case) for case in cases([(1, 1024)])]
    if main_model and "quantized" in parts:
        results["quantized"] = {}
        for form, arguments in FORMATS.items():
            lighter = Decoder(config, quantized(weights, arguments), config.context, PhiSource.carry())
            results["quantized"][form] = [
                replace(subject, decoder=lighter).step_ms(*case) for case in cases([(1, 1024), (8, 1024)])
            ]
            del lighter
    return results


def transformers_ms(subject: Subject, rows: int, context: int) -> dict[str, object]:
    """Decoding with transformers' own Llama on the same weights, before and after `accelerate`.

    "eager" and "compiled" (torch.compile with CUDA graphs) are times per step of the loop here; "generate" is
    the time per token of transformers' own eager loop. Ratios are speedups of the drop-in. Compilation
    failures are in "errors".
    """
    from flashdecpp.integrations.transformers import accelerate, attention_calls, restore
    from flashdecpp.models.to_transformers import to_transformers

    config, device = subject.decoder.config, subject.decoder.device
    model = to_transformers(subject.decoder, subject.decoder.dtype)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None  # random logits might end the sequence
    prompt = torch.randint(0, config.vocab, (rows, context), device=device)
    ms: dict[str, float] = {}
    errors: dict[str, str] = {}
    compile_s: dict[str, float] = {}

    def measure_eager(kind: str) -> None:
        ms[f"{kind}eager"], _ = greedy_step_ms(model, prompt)
        ms[f"{kind}generate"] = generate_ms(model, prompt)

    def measure_compiled(kind: str) -> None:
        if not subject.on_gpu:
            return
        name = f"{kind}compiled"
        try:
            ms[name], compile_s[name] = greedy_step_ms(model, prompt, mode="reduce-overhead")
        except Exception as error:  # from any compiler; the other figures remain valid
            errors[name] = f"{type(error).__name__}: {error}"[:1000]
        finally:
            torch.compiler.reset()

    # Measure eager before compiling anything: compilers leave state behind that slows Python down.
    measure_eager("")
    accelerate(model)
    measure_eager("drop-in ")
    measure_compiled("drop-in ")
    restore(model)
    measure_compiled("")
    pairs = [(name, f"drop-in {name}") for name in ("eager", "generate", "compiled")]
    pairs.append(("eager", "drop-in compiled"))
    return {
        "batch": rows,
        "context": context,
        "ms": {name: round(value, 3) for name, value in ms.items()},
        "ratios": {
            f"{stock} / {ours}": round(ms[stock] / ms[ours], 2)
            for stock, ours in pairs
            if stock in ms and ours in ms
        },
        "drop_in_attention_calls": dict(attention_calls(model)),
        "compile_s": {name: round(value, 1) for name, value in compile_s.items()},
        "errors": errors,
    }


def greedy_step_ms(
    model: PreTrainedModel, prompt: torch.Tensor, mode: str | None = None
) -> tuple[float, float]:
    """Median ms of a greedy step on a static cache, and seconds of the first step, including compilation.

    The host waits for every token. mode: of torch.compile; None for eager.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.size(1) + WARM_UP + STEPS)

    def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    tokens = next_tokens(prompt)
    step = next_tokens if mode is None else torch.compile(next_tokens, mode=mode)
    times = []
    for _ in range(WARM_UP + STEPS):
        begin = time.perf_counter()
        tokens = step(tokens).clone()  # the graph's next replay overwrites its result
        tokens.tolist()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:]) * 1e3, times[0]


def generate_ms(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Time per token of `generate`: (time of many tokens - time of one) / steps."""

    def run(count: int) -> float:
        begin = time.perf_counter()
        mask = torch.ones_like(prompt)
        answer = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False).tolist()
        elapsed = time.perf_counter() - begin
        if len(answer[0]) != prompt.size(1) + count:
            raise RuntimeError(f"{count} tokens were wanted, got {len(answer[0]) - prompt.size(1)}")
        return elapsed * 1e3

    run(WARM_UP)
    one, many = run(1), run(GENERATED + 1)
    return (many - one) / GENERATED


def draw(results: dict, source: Path) -> None:
    """Draws a stacked bar per profiled step next to its floor, as a PNG next to the file of results."""
    path = source.with_suffix(".png")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [step for found in results["models"].values() for step in found.get("breakdown", [])]
    if not steps:
        return
    kinds = [*KINDS, "other", "gaps"]
    colors = dict(zip(kinds, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(steps), 4.5))
    for index, step in enumerate(steps):
        bars = [(2 * index, step["ms"] | {"gaps": step["gaps_ms"]}), (2 * index + 0.8, step["floor_ms"])]
        for place, parts in bars:
            bottom = 0.0
            for kind in kinds:
                if kind in parts:
                    axes.bar(place, parts[kind], 0.7, bottom, color=colors[kind], label=kind)
                    bottom += parts[kind]
            axes.text(place, bottom, f"{bottom:.2f}", ha="center", va="bottom", fontsize=8)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    axes.set_xticks(
        [place for index in range(len(steps)) for place in (2 * index, 2 * index + 0.8)],
        [label for step in steps for label in (f"{step['batch']} x {step['context']}", "floor")],
        fontsize=8,
    )
    axes.set_ylabel("ms per decode step")
    axes.set_title("Llama-2-7B, fp16: where a decode step's time goes")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--draw", help="only draw what a file of results holds")
    parser.add_argument("--output", help="default: bench/results/runner_h100.json; none of a dry run")
    options = parser.parse_args()
    if options.draw:
        return draw(json.loads(Path(options.draw).read_text())["results"], Path(options.draw))
    names, parts = options.models.split(","), set(options.parts.split(","))
    unknown = (set(names) - set(MODELS)) | (parts - set(PARTS))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    output = options.output or (None if options.dry_run else "bench/results/runner_h100.json")

    torch.manual_seed(0)
    device, dtype = ("cpu", torch.bfloat16) if options.dry_run else ("cuda", torch.float16)
    ceiling = 1e9 if options.dry_run else measure.read_ceiling_gbs() * 1e9
    print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    results: dict = {"read_ceiling_gbs": round(ceiling / 1e9), "models": {}}
    for name in tqdm(names, disable=None):
        config, shrink = MODELS[name], lambda *case: case
        if options.dry_run:
            config, shrink = tiny(config), lambda batch, context: (min(batch, 2), min(context, 40))
        with torch.inference_mode():
            found = measure_model(name, config, parts, device, dtype, ceiling, shrink)
        results["models"][name] = found
        for part, rows in found.items():
            for row in rows if isinstance(rows, list) else [rows]:
                print(
                    name,
                    part,
                    {key: value for key, value in row.items() if key != "kernels"}
                    if isinstance(row, dict)
                    else row,
                    flush=True,
                )
        gc.collect()
        if not options.dry_run:
            torch.cuda.empty_cache()
        if output:  # after every model, so that an interrupted run keeps its results
            measure.save(output, results)
    if output:
        draw(results, Path(output))


def tiny(config: ModelConfig) -> ModelConfig:
    """A similar model, small enough for a CPU."""
    kv_heads = max(1, 4 * config.kv_heads // config.q_heads)
    rope = config.ropes[0] and replace(config.ropes[0], dim=config.ropes[0].dim * 32 // config.head_dim)
    return replace(
        config,
        hidden=128,
        embed_dim=128,
        layers=2,
        q_heads=4,
        kv_heads=kv_heads,
        head_dim=32,
        ffn=256,
        vocab=1024,
        context=512,
        ropes=(rope,) * 2,
        windows=(-1,) * 2,
    )


if __name__ == "__main__":
    main()
