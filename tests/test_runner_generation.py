"""Generation on a small random model: stopping, sampling, streaming, oversized batches."""

from __future__ import annotations

import pytest
import torch
from runner_models import random_tokens
from tqdm import tqdm

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.calibration.calibrate import SoftmaxObserver
from flashdecpp.loading.tokenizer import TextStream
from flashdecpp.models.kv_cache import KVCache, blocks_for

SAMPLED = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=7, max_tokens=24)


def test_results_carry_prompt_tokens_and_timings(llm):
    (answer,) = llm.generate("hello", SamplingParams(max_tokens=6, ignore_eos=True))
    assert answer.prompt == "hello"
    assert answer.prompt_token_ids == llm.tokenizer.encode("hello")
    assert answer.prompt_token_ids[0] == 256  # <s>, which the tokenizer prepends
    assert len(answer.token_ids) == 6
    assert answer.text == llm.tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "length"
    assert answer.time_to_first_token > 0 and answer.tokens_per_second > 0
    assert llm.stats.generated_tokens == 6 and llm.stats.prompt_tokens == 6
    assert llm.stats.peak_memory > 0
    assert llm.stats.softmax == "carried phi"  # there is no phi.json next to the model
    assert llm.stats.softmax_rows == 5 * 3 * 4  # decode steps, layers, heads
    assert llm.stats.softmax_fallbacks == 3 * 4  # only in the first step


def test_token_ids_are_prompts_too(llm):
    ids = llm.tokenizer.encode("hello")
    by_text = llm.generate("hello")[0]
    for prompts in (ids, [ids]):
        (by_ids,) = llm.generate(prompts)
        assert by_ids.token_ids == by_text.token_ids
        assert by_ids.prompt == "hello"
    assert llm.generate([]) == []


def test_end_of_sequence_stops_unless_ignored(folder, llm):
    greedy = llm.generate("hello", SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids
    for ending in (greedy[0], greedy[5]):  # one from prefill, one from a decode step
        stops = LLM(folder, device="cpu", dtype="float32")
        stops._engine.executor.eos_ids = frozenset([ending])
        (stopped,) = stops.generate("hello", SamplingParams(max_tokens=40))
        assert stopped.token_ids == greedy[: greedy.index(ending)]
        assert stopped.finish_reason == "stop"
        (endless,) = stops.generate("hello", SamplingParams(max_tokens=40, ignore_eos=True))
        assert len(endless.token_ids) == 40
        assert ending not in endless.token_ids


def test_stop_strings_end_the_text_before_them(llm):
    whole = llm.generate("hello", SamplingParams(max_tokens=40, ignore_eos=True))[0].text
    stop = whole[10:13]
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop=["never there", stop])
    (answer,) = llm.generate("hello", params)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(piece.text for piece in llm.stream("hello", params)) == answer.text


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=24, ignore_eos=True), SAMPLED])
def test_streaming_equals_generate(llm, params):
    pieces = list(llm.stream("hello", params))
    (answer,) = llm.generate("hello", params)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.token_id for piece in pieces[:-1] if piece.token_id is not None] == answer.token_ids
    assert pieces[-1].finish_reason == answer.finish_reason
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_a_stream_closed_early_frees_its_blocks(llm):
    for _ in range(3):
        stream = llm.stream("hello", SamplingParams(max_tokens=24, ignore_eos=True))
        next(stream)
        stream.close()
        assert llm._engine.pool.used_blocks == 0


def test_two_streams_at_once(llm):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [answer.token_ids for answer in llm.generate(["hello", "other words"], params)]
    streams = [llm.stream(prompt, params) for prompt in ("hello", "other words")]
    pieces = list(zip(*streams, strict=True))
    for tokens, column in zip(expected, zip(*pieces, strict=True), strict=True):
        assert [piece.token_id for piece in column[:-1]] == tokens


def test_seeds_repeat_and_differ(llm):
    def tokens(prompt: str, seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=16, ignore_eos=True)
        return llm.generate(prompt, params)[0].token_ids

    assert tokens("hello", 1) == tokens("hello", 1)
    assert tokens("hello", 1) != tokens("hello", 2)
    assert tokens("hello", None) != tokens("hello", None)


def test_a_seeded_answer_does_not_depend_on_its_batch(llm):
    (alone,) = llm.generate("hello", SAMPLED)
    others = [
        SamplingParams(max_tokens=9),
        SAMPLED,
        SamplingParams(temperature=2.0, seed=3, repetition_penalty=1.3),
    ]
    together = llm.generate(["one", "hello", "and a third prompt"], others)
    assert together[1].token_ids == alone.token_ids


def test_repetition_penalty_counts_prompt_and_answer(llm):
    params = SamplingParams(repetition_penalty=1e6, max_tokens=30, ignore_eos=True)
    (answer,) = llm.generate("hello", params)
    # With such a penalty, no token repeats while some unused one has a positive logit.
    assert len(set(answer.token_ids)) == len(answer.token_ids)
    assert not set(answer.token_ids) & set(answer.prompt_token_ids)


def test_more_prompts_than_fit_take_turns(folder, llm):
    prompts = [random_tokens(length, seed=length) for length in (3, 40, 17, 9, 64, 1, 28)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (5, 9, 1, 30, 12, 20, 7)]
    expected = [llm.generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
    for small in (
        LLM(folder, device="cpu", dtype="float32", max_batch=2),
        LLM(folder, device="cpu", dtype="float32", cache_tokens=128),
        LLM(folder, device="cpu", dtype="float32"),
    ):
        answers = small.generate(prompts, params)
        assert [answer.token_ids for answer in answers] == expected
        assert [len(answer.token_ids) for answer in answers] == [p.max_tokens for p in params]


def test_the_context_ends_an_answer(folder):
    llm = LLM(folder, device="cpu", dtype="float32", max_len=32)
    for limit in (None, 1000):
        (answer,) = llm.generate([random_tokens(20)], SamplingParams(max_tokens=limit, ignore_eos=True))
        assert len(answer.token_ids) == 12
        assert answer.finish_reason == "length"


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    answer = llm.chat(messages, SamplingParams(max_tokens=8, ignore_eos=True))
    assert answer.prompt == "<user>hi\n<assistant>"
    streamed = llm.chat(messages, SamplingParams(max_tokens=8, ignore_eos=True), stream=True)
    assert "".join(piece.text for piece in streamed) == answer.text


def test_phi_is_handed_to_attention_and_fallbacks_are_counted(folder, llm):
    """A phi that is far off costs time, never accuracy."""
    phi = [torch.full((4,), 900.0)] * 3
    far = LLM(folder, device="cpu", dtype="float32", phi=phi)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    assert far.generate("hello", params)[0].token_ids == llm.generate("hello", params)[0].token_ids
    assert far.stats.softmax == "fixed phi"
    assert far.stats.softmax_fallbacks == far.stats.softmax_rows == 7 * 3 * 4  # decode steps, layers, heads


def test_every_sequence_carries_its_own_phi_from_batch_to_batch(folder, monkeypatch):
    """Only its first step falls back, no matter which sequences join or leave the batch."""
    online = LLM(folder, device="cpu", dtype="float32", max_batch=3, phi="none")
    carried = LLM(folder, device="cpu", dtype="float32", max_batch=3, phi="carry")
    decode, steps = carried.decoder.decode, []

    def spy(tokens, cache, seq_lens, block_table, carried_phi):
        before = carried_phi.clone()
        logits = decode(tokens, cache, seq_lens, block_table, carried_phi)
        steps.append((before, carried_phi.clone()))
        return logits

    monkeypatch.setattr(carried.decoder, "decode", spy)
    prompts = [random_tokens(length, seed=length) for length in (5, 40, 17, 30, 9)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (4, 20, 9, 13, 2)]
    expected = [answer.token_ids for answer in online.generate(prompts, params)]
    assert online.stats.softmax == "online softmax" and online.stats.softmax_fallbacks == 0
    for _ in range(2):  # a repeated prompt starts over
        assert [answer.token_ids for answer in carried.generate(prompts, params)] == expected
        assert carried.stats.softmax_fallbacks == 5 * 3 * 4  # sequences, layers, heads
        assert carried.stats.softmax_rows == (3 + 19 + 8 + 12 + 1) * 3 * 4
    assert all(after.isfinite().all() for _, after in steps)
    assert {before.size(1) for before, _ in steps} == {1, 2, 3}
    assert sum(before.isnan().sum().item() for before, _ in steps) == 2 * 5 * 3 * 4


def test_a_carried_phi_is_the_row_maximum_of_the_step_before(folder):
    """The same maximum as in one pass over the whole text."""
    llm = LLM(folder, device="cpu", dtype="float32", phi="carry")
    tokens, prompt = random_tokens(30), 20
    observer = SoftmaxObserver(llm.config, tqdm(disable=True))
    whole = KVCache.for_model(llm.config, blocks_for(len(tokens)), llm.device, llm.dtype)
    table = torch.arange(whole.num_blocks, dtype=torch.int32)[None]
    llm.decoder.prefill(torch.tensor(tokens), whole, table, observe=observer)
    expected = torch.stack([observer.row_maxima(layer) for layer in range(3)])

    cache = KVCache.for_model(llm.config, blocks_for(len(tokens)), llm.device, llm.dtype)
    llm.decoder.prefill(torch.tensor(tokens[:prompt]), cache, table)
    carried = torch.full((3, 1, 4), torch.nan)
    for position in range(prompt, len(tokens)):
        lengths = torch.tensor([position + 1], dtype=torch.int32)
        llm.decoder.decode(torch.tensor(tokens[position : position + 1]), cache, lengths, table, carried)
        torch.testing.assert_close(carried[:, 0], expected[:, :, position], rtol=1e-4, atol=1e-4)


def test_text_never_holds_broken_characters(llm):
    text = "naïve 🚀 日本語"
    stream = TextStream(llm.tokenizer)
    pieces = [stream.push(token) for token in llm.tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) == len(text)


def test_text_that_could_become_a_stop_string_is_held_back(llm):
    stream = TextStream(llm.tokenizer, ["stop!"])
    ids = llm.tokenizer.encode("a stop sto stop! more", add_special_tokens=False)
    pieces = [stream.push(token) for token in ids]
    assert pieces[2] == "" and pieces[6] == "stop "  # held back, then released once it is another word
    assert stream.stopped and stream.text == "a stop sto "
    held = TextStream(llm.tokenizer, ["stop!"])
    for token in llm.tokenizer.encode("a stop", add_special_tokens=False):
        held.push(token)
    assert held.text == "a " and held.finish() == "stop"


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 1.0},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": [""]},
        {"stop": [3]},
    ],
    ids=str,
)
def test_sampling_params_are_checked(bad):
    (name,) = bad
    with pytest.raises(ModelError, match=f"^{name} must be .*, got "):
        SamplingParams(**bad)


def test_stop_may_be_a_single_string():
    assert SamplingParams(stop="end").stop == ("end",)
