"""What a type checker sees of the public API. mypy reads this file (`make lint`); nothing runs it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from flashdecpp import (
    LLM,
    BlockPool,
    Completion,
    Guide,
    KVCache,
    ModelError,
    OutOfMemory,
    Piece,
    SamplingParams,
    Stats,
    TokenLogprob,
    check,
    ops,
    quantize_,
)


def generating(llm: LLM, stream: bool) -> None:
    assert_type(llm.generate("hello"), list[Completion])
    assert_type(llm.generate(["hello", "world"], [SamplingParams(), SamplingParams(n=2)]), list[Completion])
    assert_type(llm.completions("hello", progress=True), Generator[Completion, None, None])
    assert_type(llm.stream(torch.tensor([1, 2])), Generator[Piece, None, None])
    assert_type(llm.stats, Stats | None)


def chatting(llm: LLM, stream: bool) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert_type(llm.chat(messages), Completion)
    assert_type(llm.chat(messages, stream=False), Completion)
    assert_type(llm.chat(messages, stream=True), Generator[Piece, None, None])
    assert_type(llm.chat(messages, stream=stream), Completion | Generator[Piece, None, None])


def sampling() -> None:
    class OnlyEvenTokens:
        def fill(self, mask: Tensor) -> None:
            mask &= 0x55555555

        def accept(self, token: int) -> None: ...

    guide: Guide = OnlyEvenTokens()
    SamplingParams(guide=OnlyEvenTokens, stop="\n", stop_token_ids=[2], logit_bias={1: -1.0}, max_tokens=None)
    SamplingParams(guide=lambda: guide, stop=("a", "b"), logits_processor=lambda ids, logits: logits)


def reading(completion: Completion, piece: Piece) -> None:
    assert_type(completion.token_ids, list[int])
    assert_type(completion.logprobs, list[TokenLogprob] | None)
    assert_type(piece.token_id, int | None)


def caching() -> None:
    pool = BlockPool(8)
    assert_type(pool.allocate(2), list[int])
    cache = KVCache(
        layers=2, kv_heads=2, head_dim=64, num_blocks=8, dtype=torch.float16, device=torch.device("cpu")
    )
    assert_type(cache.layers[0], tuple[Tensor, Tensor])


def calling(q: Tensor, cache: Tensor, lengths: Tensor, x: Tensor, weight: Tensor) -> None:
    check(q, cache, cache, lengths)
    assert_type(ops.decode_attention(q, cache, cache, lengths), tuple[Tensor, Tensor])
    assert_type(ops.linear(x, weight), Tensor)
    assert_type(ops.linear(x, weight, impl="gemv"), Tensor)
    assert_type(ops.linear(x, weight, gate="silu"), Tensor)
    assert_type(ops.linear(x, weight, norm_weight=weight[0], activation="relu"), Tensor)
    ops.linear(x, weight, residual=x)  # returns None, so mypy would refuse a use of the result


def quantizing(model: nn.Linear) -> None:
    quantize_(model)


def failing(error: OutOfMemory) -> ModelError:
    return error
