"""The runner on a GPU: replayed steps are the steps, whoever joins, leaves, shares blocks or gives way."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from runner_models import FAMILIES, random_tokens, save_chatglm, save_model

from flashdecpp.runner import LLM, SamplingParams
from flashdecpp.runner.cache import BLOCK_SIZE, blocks_for

pytestmark = pytest.mark.gpu
KINDS = [*FAMILIES, "chatglm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a random model of each kind, made when it's first asked for."""
    made = {}

    def folder(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_chatglm(made[kind]) if kind == "chatglm" else save_model(made[kind], kind)
        return made[kind]

    return folder


def load(folder, **settings) -> LLM:
    return LLM(folder, device="cuda", **({"dtype": "bfloat16"} | settings))


def workload(count: int, seed: int = 0, longest: int = 60) -> tuple[list[list[int]], list[SamplingParams]]:
    """Random lengths, beginnings in common, greedy and sampled, several samples a prompt."""
    rng = random.Random(seed)
    common = random_tokens(40, seed=1)
    prompts, params = [], []
    for number in range(count):
        own = random_tokens(rng.randint(1, longest), seed=100 + number)
        prompts.append(common[: rng.choice([0, 0, 16, 33, 40])] + own)
        params.append(
            SamplingParams(
                max_tokens=rng.randint(1, 50),
                temperature=rng.choice([0.0, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                seed=number,
                repetition_penalty=rng.choice([1.0, 1.2]),
                ignore_eos=rng.random() < 0.5,
                n=rng.choice([1, 1, 1, 3]),
            )
        )
    return prompts, params


def answers(llm: LLM, prompts, params) -> list[tuple[list[int], str]]:
    return [(answer.token_ids, answer.finish_reason) for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_choose_the_tokens_of_launched_ones(folders, kind):
    prompts, params = workload(30)
    longest = max(blocks_for(len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True))
    settings = {"max_batch": 6, "cache_tokens": BLOCK_SIZE * (longest + 6), "prefill_chunk": 32}
    launched = load(folders(kind), cuda_graphs=False, **settings)
    expected = answers(launched, prompts, params)
    assert launched.stats.preemptions > 0 and launched.stats.found_tokens > 0
    replayed = load(folders(kind), **settings)
    assert answers(replayed, prompts, params) == expected
    assert replayed.stats.preemptions == launched.stats.preemptions
    rows = {rows for rows, _ in replayed._engine._batch._graphs}
    assert rows <= {1, 2, 4, 6} and 6 in rows
    assert replayed._engine.pool.used_blocks == 0


@pytest.mark.parametrize("phi", ["carry", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
def test_an_answer_is_what_its_prompt_gets_alone(folders, kind, dtype, phi):
    prompts, params = workload(40, seed=7)
    settings = {"dtype": dtype, "phi": phi, "prefix_cache": False, "prefill_chunk": 32, "max_batch": 8}
    longest = max(blocks_for(len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True))
    small = {"cache_tokens": BLOCK_SIZE * (longest + 1)}
    llm = load(folders(kind), batch_invariant=True, **settings, **small)
    together = answers(llm, prompts, params)
    assert llm.stats.preemptions > 0 and llm.stats.peak_blocks == longest + 1
    assert llm._engine.pool.used_blocks == 0
    alone = [answer for p, s in zip(prompts, params, strict=True) for answer in answers(llm, [p], s)]
    assert together == alone


def test_nothing_is_allocated_and_nothing_waits_between_steps(folders, monkeypatch):
    llm = load(folders("llama"), max_batch=4)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [random_tokens(20, seed=i) for i in range(4)]
    answers(llm, prompts, params)  # computes the prompts
    expected = answers(llm, prompts, params)  # finds them in the cache, as the third time
    engine, step = llm._engine, llm._engine._step
    allocations = []

    def strict_step():
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grown = any(_is_at_block_end(request) for request in engine._running)
        allocations.append((grown, torch.cuda.memory_stats()["allocation.all.allocated"]))

    monkeypatch.setattr(engine, "_step", strict_step)
    assert answers(llm, prompts, params) == expected  # joins and leaves wait for nothing
    calm = [after - before for (_, before), (grown, after) in itertools.pairwise(allocations) if not grown]
    assert sum(change == 0 for change in calm) > 60


def _is_at_block_end(request) -> bool:
    return request.chosen_length % BLOCK_SIZE < 3


def test_features_of_sampling_have_graphs_of_their_own(folders):
    """A step without draws, penalties or unending answers pays for none of them."""
    llm = load(folders("llama"), max_batch=2)
    plain = SamplingParams(max_tokens=5)
    for params in (plain, SamplingParams(max_tokens=5, temperature=0.5), plain):
        llm.generate([random_tokens(5)], params)
    graphs = llm._engine._batch._graphs
    assert {(rows, features.drawn, features.penalized) for rows, features in graphs} == {
        (1, False, False),
        (1, True, False),
    }


def test_a_prompt_in_chunks_is_the_prompt(folders):
    """Later chunks see the earlier ones through the cache; logits as of one chunk, in float32's tolerance."""
    tokens = random_tokens(200)
    whole, cut = (load(folders("llama"), prefill_chunk=chunk, prefix_cache=False) for chunk in (256, 48))
    params = SamplingParams(max_tokens=1)
    logits = []
    for llm in (whole, cut):
        seen, decoder = [], llm.decoder
        prefill = decoder.prefill
        decoder.prefill = lambda *a, seen=seen, prefill=prefill, **k: (
            seen.append(prefill(*a, **k)) or seen[-1]
        )
        llm.generate([tokens], params)
        logits.append(seen[-1].float().cpu())
    assert len(seen) == 5
    error = (logits[0] - logits[1]).abs().max()
    assert error < 0.05 * logits[0].abs().max()


def test_memory_stays_flat(folders):
    llm = load(folders("llama"), max_batch=8, cache_tokens=BLOCK_SIZE * 40, prefix_cache=False)
    prompts, params = workload(60, seed=3)
    held = []
    for _ in range(3):
        llm.generate(prompts, params)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]
    assert llm._engine.pool.used_blocks == 0


def test_the_pool_leaves_600_megabytes(folders):
    llm = load(folders("llama"), max_batch=4)
    llm.generate([random_tokens(10)], SamplingParams(max_tokens=3))
    assert llm.stats.cache_blocks == 4 * blocks_for(llm.max_len)
    assert torch.cuda.mem_get_info()[0] > 500_000_000
