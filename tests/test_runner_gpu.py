"""The runner on a GPU: graph replays match launched steps under joins, leaves, sharing and preemption."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from runner_models import FAMILIES, default_dtype, random_tokens, save_chatglm, save_model

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.models.kv_cache import BLOCK_SIZE, blocks_for

pytestmark = pytest.mark.gpu
KINDS = [*FAMILIES, "chatglm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a random model of each kind, created on first use."""
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
    """Random lengths, shared prefixes, greedy and sampled, up to three samples per prompt."""
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
def test_replayed_steps_choose_the_same_tokens_as_launched_ones(folders, kind):
    prompts, params = workload(30)
    longest = max(blocks_for(len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True))
    settings = {"max_batch": 6, "cache_tokens": BLOCK_SIZE * (longest + 6), "prefill_chunk": 32}
    launched = load(folders(kind), cuda_graphs=False, **settings)
    expected = answers(launched, prompts, params)
    assert launched.stats.preemptions > 0 and launched.stats.cached_prompt_tokens > 0
    replayed = load(folders(kind), **settings)
    assert answers(replayed, prompts, params) == expected
    assert replayed.stats.preemptions == launched.stats.preemptions
    rows = {rows for rows, _ in replayed._engine.executor.batch._graphs}
    assert rows <= {1, 2, 4, 6} and 6 in rows
    assert replayed._engine.pool.used_blocks == 0


@pytest.mark.parametrize("phi", ["carry", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
def test_an_answer_is_the_same_as_alone(folders, kind, dtype, phi):
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


def test_steps_neither_allocate_nor_synchronize(folders, monkeypatch):
    llm = load(folders("llama"), max_batch=4)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [random_tokens(20, seed=i) for i in range(4)]
    answers(llm, prompts, params)  # computes the prompts
    expected = answers(llm, prompts, params)  # finds them in the cache, as the third run will
    engine, step = llm._engine, llm._engine._step
    allocations = []

    def strict_step():
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grown = any(_is_at_block_end(request) for request in engine.scheduler.running)
        allocations.append((grown, torch.cuda.memory_stats()["allocation.all.allocated"]))

    monkeypatch.setattr(engine, "_step", strict_step)
    assert answers(llm, prompts, params) == expected  # joins and leaves do not synchronize
    calm = [after - before for (_, before), (grown, after) in itertools.pairwise(allocations) if not grown]
    assert sum(change == 0 for change in calm) > 60


def _is_at_block_end(request) -> bool:
    return request.sampled_length % BLOCK_SIZE < 3


def test_sampling_features_have_their_own_graphs(folders):
    """A step does not pay for draws, penalties or ignored end tokens that it does not use."""
    llm = load(folders("llama"), max_batch=2)
    plain = SamplingParams(max_tokens=5)
    for params in (plain, SamplingParams(max_tokens=5, temperature=0.5), plain):
        llm.generate([random_tokens(5)], params)
    graphs = llm._engine.executor.batch._graphs
    assert {(rows, features.drawn, features.penalized) for rows, features in graphs} == {
        (1, False, False),
        (1, True, False),
    }


class EvenThenOdd:
    """A guide under which even and odd tokens alternate."""

    def __init__(self) -> None:
        self.accepted = 0

    def fill(self, mask: torch.Tensor) -> None:
        mask.fill_(0x2AAAAAAA if self.accepted % 2 else 0x55555555)

    def accept(self, token: int) -> None:
        assert token % 2 == self.accepted % 2
        self.accepted += 1


def halve_small_ids(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    assert logits.is_cuda and logits.dim() == 1 and token_ids
    return torch.where(torch.arange(len(logits), device=logits.device) < 100, logits / 2, logits)


OPTIONS = {
    "presence": {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {5: 100.0, 6: 100.0}, "temperature": 1.0},
    "minimum": {"min_tokens": 20, "stop_token_ids": list(range(0, 200, 2))},
    "bad words": {"bad_words": ["a", "bc"], "temperature": 2.0},
    "processor": {"logits_processor": halve_small_ids, "temperature": 1.0},
    "guide": {"guide": EvenThenOdd, "temperature": 1.0},
    "logprobs": {"logprobs": 4, "prompt_logprobs": 2, "temperature": 0.7, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_sampling_options_in_a_graph(folders, option):
    """Replayed and launched steps agree, and rows that do not use an option are unaffected."""
    plain = SamplingParams(max_tokens=24, ignore_eos=True, seed=1)
    ends = {"ignore_eos": option != "minimum"}
    special = SamplingParams(**({"max_tokens": 24, "seed": 2, "n": 2} | ends | OPTIONS[option]))
    prompts, params = (
        [random_tokens(20), random_tokens(9, seed=2), random_tokens(31, seed=3)],
        [plain, special, plain],
    )
    results = {}
    for graphs in (False, True):
        llm = load(
            folders("llama"), max_batch=4, cuda_graphs=graphs, batch_invariant=True, prefix_cache=False
        )
        found = llm.generate(prompts, params)
        results[graphs] = [(a.token_ids, a.finish_reason, a.logprobs, a.prompt_logprobs) for a in found]
        without = llm.generate(prompts[0], plain)[0]
        assert without.token_ids == found[0].token_ids
        assert llm._engine.pool.used_blocks == 0
    assert results[True] == results[False]
    first, second = (answer[0] for answer in results[True][1:3])
    if option == "bias":
        assert set(first) == set(second) == {5, 6}
    elif option == "guide":
        assert [token % 2 for token in first] == [0, 1] * 12
    elif option == "minimum":
        assert len(first) >= 20
    elif option == "logprobs":
        assert all(len(one.top) == 4 for one in results[True][1][2])


def test_nan_logits_raise_their_own_error(folders):
    """Not a device-side assertion, which would leave the GPU unusable for this process."""
    broken = load(folders("llama"))
    down = broken.decoder.weights.layers[0].down
    kept = down.clone()
    down.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"(?i)nan"):
        broken.generate([random_tokens(5)], SamplingParams(max_tokens=5, ignore_eos=True))
    down.copy_(kept)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompt = random_tokens(6, seed=5)
    assert answers(broken, [prompt], params) == answers(load(folders("llama")), [prompt], params)


def test_invalid_requests_are_refused_before_any_kernel(folders):
    llm = load(folders("llama"))
    usual = answers(llm, [random_tokens(5)], SamplingParams(max_tokens=5))
    for prompt in ([[llm.config.vocab]], [[-1]], [[2**40]]):
        with pytest.raises(ModelError, match="vocabulary"):
            llm.generate(prompt)
    for params in ({"stop_token_ids": [llm.config.vocab]}, {"logit_bias": {-1: 1.0}}, {"top_k": 2**31}):
        with pytest.raises(ModelError, match=next(iter(params))):
            llm.generate([random_tokens(5)], SamplingParams(**params))
    assert answers(llm, [random_tokens(5)], SamplingParams(max_tokens=5)) == usual


def test_process_wide_settings_change_nothing(folders):
    prompts, params = workload(6, seed=9)
    expected = answers(load(folders("llama")), prompts, params)
    with torch.autocast("cuda", dtype=torch.float16):
        assert answers(load(folders("llama")), prompts, params) == expected
    with torch.device("cuda"):
        assert answers(load(folders("llama")), prompts, params) == expected
        on_cpu = LLM(folders("llama"), device="cpu", dtype="float32")
        assert (
            len(on_cpu.generate(prompts[0], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
        )
    with default_dtype(torch.float64):
        assert answers(load(folders("llama")), prompts, params) == expected


def test_a_chunked_prompt_gives_the_logits_of_a_whole_one(folders):
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
