"""Sequences that join, leave, share blocks and get preempted give the same answers as when run alone."""

from __future__ import annotations

import itertools
import random
import re
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from runner_models import load, random_tokens, save_model

from flashdecpp import LLM, ModelError, OutOfMemory, SamplingParams
from flashdecpp.engine.decode_batch import DecodeBatch
from flashdecpp.models.kv_cache import BLOCK_SIZE, blocks_for

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(folder) -> LLM:
    """The baseline for every answer: one sequence at a time, no sharing, no chunking."""
    return LLM(folder, device="cpu", dtype="float32", max_batch=1, prefix_cache=False)


def token_ids(llm: LLM, prompts, params) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(prompts, params)]


def spy_on(llm: LLM, monkeypatch) -> list[tuple[str, int, int]]:
    """The decoder's calls: ("prefill", start, stop) and ("decode", batch, longest sequence)."""
    calls, prefill, decode = [], llm.decoder.prefill, llm.decoder.decode

    def spied_prefill(tokens, *args, start, **kwargs):
        calls.append(("prefill", start, start + tokens.numel()))
        return prefill(tokens, *args, start=start, **kwargs)

    def spied_decode(tokens, cache, seq_lens, *args):
        calls.append(("decode", tokens.numel(), seq_lens.max().item()))
        return decode(tokens, cache, seq_lens, *args)

    monkeypatch.setattr(llm.decoder, "prefill", spied_prefill)
    monkeypatch.setattr(llm.decoder, "decode", spied_decode)
    return calls


@pytest.mark.parametrize(("phi", "behind"), [("carry", 1), ("none", 0)])
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["found-again", "computed-again"])
def test_a_tiny_pool_preempts_and_changes_no_answer(folder, alone, prefix_cache, phi, behind):
    """Random lengths, shared prefixes, greedy and sampled, up to three samples per prompt."""
    rng = random.Random(5)
    common = random_tokens(40, seed=1)
    prompts, params = [], []
    for number in range(60):
        own = random_tokens(rng.randint(1, 60), seed=100 + number)
        prompts.append(common[: rng.choice([0, 0, 16, 33, 40])] + own)
        params.append(
            SamplingParams(
                max_tokens=rng.randint(1, 50),
                temperature=rng.choice([0.0, 1.0]),
                seed=number,
                repetition_penalty=rng.choice([1.0, 1.2]),
                ignore_eos=rng.random() < 0.7,
                n=rng.choice([1, 1, 1, 3]),
            )
        )
    expected = token_ids(alone, prompts, params)
    assert alone.stats.preemptions == alone.stats.cached_prompt_tokens == 0
    longest = max(blocks_for(len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True))
    llm = load(
        folder,
        max_batch=8,
        cache_tokens=BLOCK_SIZE * (longest + 4),
        prefill_chunk=32,
        prefix_cache=prefix_cache,
        phi=phi,
    )
    llm._engine.behind = behind
    for _ in range(2):
        assert token_ids(llm, prompts, params) == expected
        assert llm.stats.preemptions > 10
        assert (llm.stats.cached_prompt_tokens > 0) == prefix_cache
        assert llm.stats.peak_blocks == llm.stats.cache_blocks == longest + 4
        assert llm._engine.pool.used_blocks == 0


def test_a_preempted_sequence_resumes_where_it_stopped(folder, monkeypatch):
    """Nothing is recomputed, which could change its bits, not even when a prompt was only half done."""
    llm = load(folder, max_batch=6, cache_tokens=BLOCK_SIZE * 12, prefill_chunk=4, prefix_cache=False)
    calls, victims, preempt = spy_on(llm, monkeypatch), [], llm._engine.scheduler.preempt

    def spied_preempt(victim):
        scheduler = llm._engine.scheduler
        assert victim is (scheduler.prefilling or scheduler.running[-1])
        victims.append(victim.token_ids != [])
        preempt(victim)

    monkeypatch.setattr(llm._engine.scheduler, "preempt", spied_preempt)
    prompts = [random_tokens(length, seed=length) for length in (3, 5, 120, 7, 11, 13, 9, 125, 4)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    llm.generate(prompts, params)
    assert {True, False} == set(victims) and llm.stats.preemptions == len(victims)
    assert sum(stop - start for name, start, stop in calls if name == "prefill") == sum(map(len, prompts))
    assert sum(tokens for name, tokens, _ in calls if name == "decode") == 59 * len(prompts)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_blocks_are_not_shared_across_rope_scalings(tmp_path, kind):
    """If the rotation depends on the prompt's length, a shared prefix has different keys, in answers too."""
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        save_model(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    else:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
        }
        lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
        save_model(tmp_path, "phi3", rope_parameters=rope, **lengths)
    tokens = random_tokens(120, seed=1)
    prompts = [tokens[:length] for length in (90, 90, 75, 120, 82, 50, 40, 68, 100, 63, 71)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = token_ids(load(tmp_path, max_batch=1, prefix_cache=False), prompts, params)
    llm = load(tmp_path, max_batch=4, cache_tokens=13 * 16, prefill_chunk=32)
    assert {rope.unscaled_positions for rope in llm.config.ropes} == {64}
    assert token_ids(llm, prompts, params) == expected
    assert llm.stats.preemptions > 0 and llm.stats.cached_prompt_tokens > 0


def test_a_long_prompt_does_not_stall_others(folder, alone, monkeypatch):
    llm = load(folder, prefill_chunk=32)
    short, long = random_tokens(5, seed=1), random_tokens(200, seed=2)
    expected = token_ids(alone, [short, long], GREEDY)
    calls = spy_on(llm, monkeypatch)
    assert token_ids(llm, [short, long], GREEDY) == expected
    chunks = [call for call in calls if call[0] == "prefill"]
    pieces = [("prefill", start, min(start + 32, 200)) for start in range(0, 200, 32)]
    assert chunks == [("prefill", 0, 5), *pieces]
    for before, after in itertools.pairwise(calls):  # a decode step after each chunk
        assert after[0] == "decode" or before == ("prefill", 0, 5) or before[0] == "decode"
    assert sum(tokens for name, tokens, _ in calls if name == "decode") == 2 * 19


def test_short_prompts_share_a_chunk(folder, monkeypatch):
    llm = load(folder, prefill_chunk=32)
    calls = spy_on(llm, monkeypatch)
    llm.generate([random_tokens(10, seed=i) for i in range(6)], GREEDY)
    assert [call[0] for call in calls[:9]] == (["prefill"] * 3 + ["decode"]) * 2 + ["decode"]


def test_a_prompt_is_chunked_the_same_whatever_else_runs(folder, monkeypatch):
    """So its result cannot depend on the other requests."""
    long = random_tokens(100, seed=3)
    llm = load(folder, prefill_chunk=32, prefix_cache=False)
    calls = spy_on(llm, monkeypatch)
    llm.generate([long], GREEDY)
    apart = [call for call in calls if call[0] == "prefill"]
    calls.clear()
    llm.generate([random_tokens(13, seed=4), long, random_tokens(7, seed=5)], GREEDY)
    together = [call for call in calls if call[0] == "prefill"]
    assert together == [("prefill", 0, 13), *apart, ("prefill", 0, 7)]


def test_a_sequence_joins_as_soon_as_another_leaves(folder, monkeypatch):
    llm = load(folder, max_batch=2)
    calls = spy_on(llm, monkeypatch)
    lengths = [4, 20, 9, 8]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in lengths]
    llm.generate([random_tokens(5, seed=i) for i in range(4)], params)
    steps = [batch for name, batch, _ in calls if name == "decode"]
    assert steps == [2] * (3 + 8 + 7) + [1]  # the longest needs 19 steps


def test_samples_share_the_blocks_of_their_prompt(folder, alone, monkeypatch):
    prompt = random_tokens(100, seed=6)  # 6 full blocks and 4 tokens in a seventh
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=10, ignore_eos=True, n=5)
    llm = load(folder)
    calls = spy_on(llm, monkeypatch)
    answers = llm.generate([prompt], params)
    assert [answer.sample for answer in answers] == [0, 1, 2, 3, 4]
    assert [call for call in calls if call[0] == "prefill"] == [("prefill", 0, 100)]
    assert llm.stats.peak_blocks == 6 + 5  # full blocks are shared; each sample has its own last block
    assert llm.stats.prompt_tokens == 100 and llm.stats.generated_tokens == 50
    for answer in answers:
        single = SamplingParams(temperature=1.0, seed=3 + answer.sample, max_tokens=10, ignore_eos=True)
        assert [answer.token_ids] == token_ids(alone, [prompt], single)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    assert llm._engine.pool.used_blocks == 0


def test_samples_of_a_prompt_that_ends_on_a_block_boundary(folder):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=10, ignore_eos=True, n=4)
    llm = load(folder)
    llm.generate([random_tokens(96, seed=6)], params)
    assert llm.stats.peak_blocks == 6 + 4


def test_more_samples_than_places_take_turns(folder, alone):
    prompts = [random_tokens(50, seed=7), random_tokens(30, seed=8)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, n=7)
    expected = token_ids(alone, prompts, params)
    llm = load(folder, max_batch=3)
    assert token_ids(llm, prompts, params) == expected
    # 4 samples of the first prompt came later and found its 3 full blocks; the second leads 3 batches.
    assert llm.stats.cached_prompt_tokens >= 4 * 48
    assert len(expected) == 14 and llm.stats.prompt_tokens == 80


def test_stream_and_chat_refuse_several_samples(folder):
    llm, params = load(folder), SamplingParams(n=2)
    for call in (
        lambda: llm.stream("hello", params),
        lambda: llm.chat([{"role": "user", "content": "hi"}], params),
    ):
        with pytest.raises(ModelError, match="stream and chat give one answer, got n=2"):
            call()


def test_a_repeated_prompt_is_found_in_the_cache(folder, monkeypatch):
    llm = load(folder)
    tokens = random_tokens(200, seed=9)
    first = llm.generate([tokens[:100]], GREEDY)[0].token_ids
    assert llm.stats.cached_prompt_tokens == 0
    calls = spy_on(llm, monkeypatch)
    assert llm.generate([tokens[:100]], GREEDY)[0].token_ids == first
    assert llm.stats.cached_prompt_tokens == 96 and calls[0] == ("prefill", 96, 100)
    # The answer is found as well, as in a conversation: 100 + 19 tokens are in the cache.
    calls.clear()
    llm.generate([tokens[:100] + first + tokens[100:140]], GREEDY)
    assert llm.stats.cached_prompt_tokens == 112 and calls[0] == ("prefill", 112, 160)
    # One token remains to be computed for its logits.
    llm.generate([tokens[:96]], GREEDY)
    assert llm.stats.cached_prompt_tokens == 80
    llm.generate([tokens[1:100]], GREEDY)
    assert llm.stats.cached_prompt_tokens == 0


def test_prompts_in_one_call_share_their_prefix(folder, alone):
    common = random_tokens(70, seed=10)
    prompts = [common + random_tokens(9, seed=i) for i in range(5)]
    expected = token_ids(alone, prompts, SAMPLED)
    llm = load(folder)
    assert token_ids(llm, prompts, SAMPLED) == expected
    assert llm.stats.cached_prompt_tokens == 4 * 64
    assert llm.stats.peak_blocks == 4 + 5 * (blocks_for(79 + 19) - 4)


@pytest.mark.parametrize("behind", [0, 1])
def test_blocks_grow_with_the_answer(folder, behind):
    llm = load(folder)
    llm._engine.behind = behind
    stream = llm.stream(random_tokens(10), SamplingParams(max_tokens=100, ignore_eos=True))
    used = []
    for piece in stream:
        if piece.token_id is not None:
            used.append(llm._engine.pool.used_blocks)
    # On a GPU, when token i is read, the step that caches it is already in flight. In the end, every block is
    # freed.
    assert used == [blocks_for(10 + behind + i) for i in range(99)] + [0]


@pytest.mark.parametrize("behind", [0, 1])
def test_tokens_are_read_one_step_behind_on_a_gpu_and_at_once_on_the_cpu(folder, monkeypatch, behind):
    llm = load(folder, max_batch=2)
    assert llm._engine.behind == 0
    llm._engine.behind = behind
    calls, append = spy_on(llm, monkeypatch), llm._engine._append_token

    def spied_append(request, token, logprob):
        calls.append(("read", request.length, token))
        append(request, token, logprob)

    monkeypatch.setattr(llm._engine, "_append_token", spied_append)
    llm.generate([random_tokens(10)], SamplingParams(max_tokens=5, ignore_eos=True))
    steps = ["decode", "read"] * 4
    assert [name for name, *_ in calls] == ["prefill", *([*steps, "read"] if behind else ["read", *steps])]
    assert [length for name, length, _ in calls if name == "read"] == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("rows", [5, 8])
def test_padding_rows_change_nothing(folder, alone, rows, monkeypatch):
    """As when a CUDA graph has more rows than there are sequences."""
    llm = load(folder, max_batch=8, cache_tokens=BLOCK_SIZE * 30)
    prompts = [random_tokens(10 + 7 * i, seed=i) for i in range(12)]
    params = [
        SamplingParams(
            max_tokens=5 + 3 * i,
            temperature=float(i % 2),
            seed=i,
            repetition_penalty=1.0 + i % 3 / 4,
            ignore_eos=i % 5 > 0,
        )
        for i in range(12)
    ]
    expected = token_ids(alone, prompts, params)
    llm.generate(prompts[0], GREEDY)
    llm._engine.executor.batch.buckets = [rows, 8]
    calls = spy_on(llm, monkeypatch)
    assert token_ids(llm, prompts, params) == expected
    assert {batch for name, batch, _ in calls if name == "decode"} == {rows, 8}
    assert llm._engine.pool.used_blocks == 0


def test_batch_invariant_answers_in_half_precision(folder, monkeypatch):
    settings = {"device": "cpu", "dtype": "bfloat16", "prefix_cache": False, "prefill_chunk": 32}
    llm = LLM(folder, max_batch=6, cache_tokens=BLOCK_SIZE * 14, batch_invariant=True, **settings)
    prompts = [random_tokens(4 + 9 * i % 70, seed=i) for i in range(14)]
    params = [
        SamplingParams(temperature=float(i % 2), seed=i, max_tokens=20 + 2 * i, ignore_eos=True)
        for i in range(14)
    ]
    calls = spy_on(llm, monkeypatch)
    together = token_ids(llm, prompts, params)
    assert llm.stats.preemptions > 0
    assert {rows for name, rows, _ in calls if name == "decode"} == {6}
    assert together == [token_ids(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)]


def test_a_sequence_that_ends_early_costs_no_further_rows(folder, monkeypatch):
    """The device ends it, so the step in flight when the host finds out computes no row for it."""
    prompts = [random_tokens(9, seed=1), random_tokens(30, seed=2), random_tokens(5, seed=3)]
    params = SamplingParams(max_tokens=30)
    llm = load(folder)
    endless = SamplingParams(max_tokens=30, ignore_eos=True)
    first = token_ids(llm, prompts, endless)
    ending = first[1][12]
    stops = load(folder)
    stops._engine.executor.eos_ids = frozenset([ending])
    answers = token_ids(stops, prompts, params)
    assert answers == [a[: a.index(ending)] if ending in a else a for a in first]
    steps = sum(min(len(answer) + 1, 30) - 1 for answer in answers)
    assert stops.stats.softmax_rows == steps * 3 * 4
    assert stops._engine.pool.used_blocks == 0


def test_concurrent_streams_form_one_batch(folder, alone, monkeypatch):
    llm = load(folder)
    prompts = [random_tokens(9, seed=1), random_tokens(30, seed=2)]
    expected = token_ids(alone, prompts, SAMPLED)
    calls = spy_on(llm, monkeypatch)
    streams = [llm.stream(prompt, SAMPLED) for prompt in prompts]
    pieces = list(zip(*streams, strict=True))
    for column, tokens in zip(zip(*pieces, strict=True), expected, strict=True):
        assert [piece.token_id for piece in column[:-1]] == tokens
    assert ("decode", 2, 31) in calls


def test_an_abandoned_stream_does_not_disturb_others(folder, alone):
    llm = load(folder, prefill_chunk=16)
    (expected,) = token_ids(alone, [random_tokens(9, seed=1)], SAMPLED)
    kept, left = llm.stream(random_tokens(9, seed=1), SAMPLED), llm.stream(random_tokens(30, seed=2), SAMPLED)
    tokens = [next(kept).token_id]
    next(left)
    tokens.append(next(kept).token_id)
    left.close()
    tokens += [piece.token_id for piece in kept]
    assert tokens[:-1] == expected
    assert llm._engine.pool.used_blocks == 0


def test_a_stop_string_ends_a_stream_even_if_another_caller_ran_its_steps(folder):
    """The caller's thread decodes the text, and by then the engine may have passed the stop string."""
    llm = load(folder)
    prompt, other = random_tokens(9, seed=1), random_tokens(30, seed=2)
    whole = llm.generate([prompt], replace(GREEDY, max_tokens=40))[0]
    params = replace(GREEDY, max_tokens=40, stop=whole.text[6:9], logprobs=1)
    expected = list(llm.stream(prompt, params))
    assert expected[-1].finish_reason == "stop" and 2 < len(expected) < 20
    (answer,) = llm.generate([prompt], params)
    stream = llm.stream(prompt, params)
    pieces = [next(stream)]
    llm.generate([other], replace(GREEDY, max_tokens=25))
    (running,) = llm._engine.scheduler.running
    assert len(running.token_ids) > len(expected)
    pieces += stream
    assert pieces == expected and llm.stats.generated_tokens == len(answer.token_ids) == len(pieces) - 1
    assert llm._engine.pool.used_blocks == 0


def test_text_is_decoded_outside_the_engines_lock(folder, monkeypatch):
    llm = load(folder)
    decode, calls = llm.tokenizer.decode, []

    def spied_decode(*args, **kwargs):
        calls.append(llm._engine._lock.locked())
        return decode(*args, **kwargs)

    monkeypatch.setattr(llm.tokenizer, "decode", spied_decode)
    llm.generate([random_tokens(9, seed=1)], replace(GREEDY, stop="never said"))
    assert len(calls) >= 20 and not any(calls)


def test_an_error_in_a_step_leaves_nothing_behind(folder, alone, monkeypatch):
    llm = load(folder)
    prompts = [random_tokens(9, seed=1), random_tokens(30, seed=2)]
    expected = token_ids(alone, prompts, SAMPLED)

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    long = SamplingParams(temperature=1.0, seed=4, max_tokens=200, ignore_eos=True)
    other = llm.stream(prompts[0], long)
    tokens = [next(other).token_id for _ in range(5)]
    parts = [(llm.decoder, name) for name in ("decode", "prefill", "_logits")]
    parts += [(DecodeBatch, name) for name in ("step", "sample_first", "join", "keep_only", "read")]
    for owner, part in parts:
        with monkeypatch.context() as patched:
            patched.setattr(owner, part, fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                llm.generate(prompts, SAMPLED)
        (running,) = llm._engine.scheduler.running
        assert llm._engine.pool.used_blocks == len(running.blocks)
        assert token_ids(llm, prompts, SAMPLED) == expected
        tokens.append(next(other).token_id)
    tokens += [piece.token_id for piece in other]
    assert [tokens[:-1]] == token_ids(alone, prompts[:1], long)  # the stream that was running continues
    assert llm._engine.pool.used_blocks == 0


def test_threads_share_the_batch(folder, alone):
    llm = load(folder, cache_tokens=256)
    prompts = [random_tokens(20 + i, seed=i) for i in range(6)]
    expected = token_ids(alone, prompts, SAMPLED)
    found: list = [None] * len(prompts)

    def answer(index: int) -> None:
        found[index] = llm.generate([prompts[index]], SAMPLED)[0].token_ids

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert llm._engine.pool.used_blocks == 0


def test_the_pool_fits_the_memory(folder, monkeypatch):
    """At least one full context if there is room, and never more than a fraction of free memory."""
    from flashdecpp.engine import engine
    from flashdecpp.models import kv_cache

    llm = load(folder)
    llm.generate(["hello"], GREEDY)
    assert llm.stats.cache_blocks == blocks_for(llm.max_len)
    llm.generate([random_tokens(100, seed=i) for i in range(4)], SamplingParams(max_tokens=60))
    assert llm.stats.cache_blocks == 4 * blocks_for(160)
    small = load(folder)
    room = 7.5 * engine.block_bytes(llm.config, torch.float32) / (1 - engine.CPU_FRACTION_LEFT)
    for module in (kv_cache, engine):
        monkeypatch.setattr(module, "available_bytes", lambda device: room)
    small.generate([random_tokens(50, seed=i) for i in range(4)], SamplingParams(max_tokens=60))
    assert small.stats.cache_blocks == small.stats.peak_blocks == 7
    with pytest.raises(OutOfMemory, match=r"a KV cache of \d+ tokens needs .* on cpu, where .* are free"):
        small.generate([random_tokens(100)], SamplingParams(max_tokens=150))


def test_settings_are_checked(folder):
    with pytest.raises(ModelError, match="prefill_chunk must be 1 or more, got 0"):
        load(folder, prefill_chunk=0)
    with pytest.raises(ModelError, match=r"^n must be 1 or more, got 0"):
        SamplingParams(n=0)


def test_progress_is_shown_only_on_a_terminal(folder, capsys, monkeypatch):
    llm = load(folder)
    llm.generate(["hello", "other words"], GREEDY, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    decode = llm.decoder.decode

    def slow(*args):  # the bar is drawn ten times a second
        time.sleep(0.03)
        return decode(*args)

    monkeypatch.setattr(llm.decoder, "decode", slow)
    llm.generate(["hello", "other words"], [SamplingParams(max_tokens=8), GREEDY], progress=True)
    shown = capsys.readouterr().err
    assert "0/2" in shown and "1/2" in shown and re.search(r"[1-9]\d* tokens/s", shown)
    llm.generate(["hello", "other words"], GREEDY)
    assert capsys.readouterr().err == ""


def test_a_gpus_pool_is_allocated_once_and_leaves_room(folder, monkeypatch):
    from flashdecpp.engine import engine

    llm = load(folder, max_batch=3)
    made = []
    monkeypatch.setattr(llm._engine, "_new_cache", made.append)
    monkeypatch.setattr(llm.decoder, "device", torch.device("cuda"))
    block = engine.block_bytes(llm.config, torch.float32)
    for room in (10**12, 600_000_000 + 20.5 * block):
        monkeypatch.setattr(engine, "available_bytes", lambda device, room=room: room)
        llm._engine._provide_cache(llm._requests(["hello"], GREEDY))
    assert made == [3 * blocks_for(llm.max_len), 20]
