"""Log-probabilities of answers and prompts: the model's own distribution, whatever the other options."""

from __future__ import annotations

import pytest
import torch
from runner_models import load, random_tokens, transformers_logits

from flashdecpp import SamplingParams

PROMPT = random_tokens(70, seed=3)


def check(found, tokens: list[int], expected: torch.Tensor, count: int) -> None:
    """Checks that `found` matches these tokens and the log-probabilities [tokens, vocab]."""
    assert [entry.token_id for entry in found] == tokens
    for entry, row in zip(found, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-4)
        best = row.topk(count)
        assert len(entry.top) == count
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)
        for token, value in entry.top:
            assert value == pytest.approx(row[token].item(), abs=2e-4)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"temperature": 1.3, "top_k": 5, "seed": 2},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {3: 9.0}},
        {"bad_words": ["a", "bc"], "min_tokens": 5, "temperature": 1.0, "seed": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_come_from_the_models_distribution(llm, theirs, count, others):
    params = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=count, **others)
    (answer,) = llm.generate(PROMPT, params)
    logits = transformers_logits(theirs, PROMPT, answer.token_ids[:-1])
    check(answer.logprobs, answer.token_ids, logits.log_softmax(-1), count)
    assert answer.prompt_logprobs is None
    pieces = list(llm.stream(PROMPT, params))
    assert [piece.logprob for piece in pieces[:-1]] == answer.logprobs and pieces[-1].logprob is None
    # Asking for them does not change the answer.
    plain = SamplingParams(max_tokens=10, ignore_eos=True, **others)
    assert llm.generate(PROMPT, plain)[0].token_ids == answer.token_ids


def test_rows_of_a_batch_may_ask_for_different_counts(llm):
    counts = [None, 0, 5, 2, None]
    params = [SamplingParams(max_tokens=6, ignore_eos=True, logprobs=count) for count in counts]
    answers = llm.generate([PROMPT[: 10 + i] for i in range(5)], params)
    for answer, count in zip(answers, counts, strict=True):
        if count is None:
            assert answer.logprobs is None
        else:
            assert [len(entry.top) for entry in answer.logprobs] == [count] * 6
            best = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=count)
            (alone,) = llm.generate(answer.prompt_token_ids, best)
            assert [e.token_id for e in alone.logprobs] == answer.token_ids
            assert [e.logprob for e in alone.logprobs] == pytest.approx(
                [e.logprob for e in answer.logprobs], abs=1e-4
            )
            if count:
                assert all(entry.top[0][0] == entry.token_id for entry in answer.logprobs)  # greedy


@pytest.mark.parametrize("chunk", [1024, 32])
@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_cover_every_token_but_the_first(folder, theirs, chunk, count):
    llm = load(folder, prefill_chunk=chunk)
    llm.generate(PROMPT, SamplingParams(max_tokens=2))  # now cached, so it would not be recomputed
    params = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=count, n=2, temperature=1.0)
    first, second = llm.generate(PROMPT, params)
    assert first.prompt_logprobs[0] is None and first.logprobs is None
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0, :-1].float().log_softmax(-1)
    check(first.prompt_logprobs[1:], PROMPT[1:], expected, count)
    assert second.prompt_logprobs == first.prompt_logprobs
    assert llm.stats.prompt_tokens == 70 and llm.stats.cached_prompt_tokens == 0
    (single,) = llm.generate([5], SamplingParams(max_tokens=1, prompt_logprobs=count))
    assert single.prompt_logprobs == [None]


@pytest.mark.parametrize("behind", [0, 1])
def test_logprobs_survive_preemption(folder, llm, behind):
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, logprobs=i % 3, prompt_logprobs=1 if i % 2 else None)
        for i in range(6)
    ]
    prompts = [random_tokens(20 + 7 * i, seed=i) for i in range(6)]
    expected = [llm.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    small = load(folder, max_batch=4, cache_tokens=16 * 11, prefill_chunk=16, prefix_cache=False)
    small._engine.behind = behind

    answers = small.generate(prompts, params)
    assert small.stats.preemptions > 0
    for answer, alone in zip(answers, expected, strict=True):
        assert answer.token_ids == alone.token_ids
        for found, right in (
            (answer.logprobs, alone.logprobs),
            (answer.prompt_logprobs, alone.prompt_logprobs),
        ):
            assert (found is None) == (right is None)
            for entry, wanted in zip(found or (), right or (), strict=True):
                assert (entry is None) == (wanted is None)
                if entry is not None:
                    assert entry.token_id == wanted.token_id
                    assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
