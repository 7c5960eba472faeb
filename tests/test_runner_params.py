"""Parameters and prompts of a request, their types, and the isolation of requests from each other."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from runner_models import VOCAB, default_dtype, load, random_tokens

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.generation_config import GenerationDefaults

PROMPT = random_tokens(12, seed=4)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def tokens(llm: LLM, params: SamplingParams = GREEDY, prompt=PROMPT) -> list[int]:
    return llm.generate(prompt, params)[0].token_ids


def refused(call, match: str = "") -> None:
    with pytest.raises(ModelError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# Arguments


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": True},
        {"temperature": 10**400},
        {"temperature": 1e39},
        {"temperature": np.float32("inf")},
        {"temperature": "0.5"},
        {"top_k": 2**31},
        {"top_k": 10**5000},
        {"top_k": np.float32(3)},
        {"top_p": [0.9]},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"presence_penalty": "1"},
        {"frequency_penalty": float("inf")},
        {"seed": 2**63},
        {"seed": True},
        {"n": 10**9},
        {"n": 2.0},
        {"max_tokens": "3"},
        {"max_tokens": 1.0},
        {"min_tokens": -1},
        {"min_tokens": 9, "max_tokens": 8},
        {"stop": 5},
        {"stop": b"end"},
        {"stop": {"end": 1}},
        {"bad_words": [""]},
        {"bad_words": 7},
        {"stop_token_ids": 5},
        {"stop_token_ids": ["5"]},
        {"stop_token_ids": [1.0]},
        {"logit_bias": [(1, 2.0)]},
        {"logit_bias": {"1": 2.0}},
        {"logit_bias": {1: "2"}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"logprobs": True},
        {"logprobs": -1},
        {"prompt_logprobs": 1.5},
        {"ignore_eos": 1},
        {"skip_special_tokens": None},
        {"logits_processor": "f"},
        {"guide": object()},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_params_that_no_step_could_use_are_refused(bad):
    (name, *_) = bad
    refused(lambda: SamplingParams(**bad), rf"^{name}\S* must be .*, (which|got) ")


@pytest.mark.parametrize(
    "bad",
    [
        {"stop_token_ids": [VOCAB]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {VOCAB: 1.0}},
        {"logprobs": VOCAB + 1},
        {"prompt_logprobs": VOCAB + 1},
    ],
    ids=str,
)
def test_params_beyond_the_vocabulary_are_refused(llm, bad):
    (name,) = bad
    for call in (llm.generate, llm.stream):
        refused(lambda call=call: call("hi", SamplingParams(**bad)), rf"^{name} .*vocabulary of {VOCAB}")


def test_numbers_of_numpy_are_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=np.float64(0.9),
        seed=np.uint8(3),
        max_tokens=np.int32(4),
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int64(3): np.float16(-1)},
    )
    plain = SamplingParams(
        temperature=0.5, top_k=5, top_p=0.9, seed=3, max_tokens=4, stop_token_ids=[1, 2], logit_bias={3: -1.0}
    )
    assert params == plain and repr(params) == repr(plain)
    assert SamplingParams(stop=None, bad_words=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize("temperature", [1e-30, 1e-50, 1e-320])
def test_a_temperature_near_zero_is_greedy(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=8, ignore_eos=True)
    assert tokens(llm, params) == tokens(llm)[:8]


def test_limits_that_float32_rounds_away_keep_their_meaning(llm):
    best = tokens(llm)[:6]
    for own in ({"top_p": 1e-60}, {"min_p": 1.0}, {"top_k": 1}):
        drawn = SamplingParams(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True, **own)
        assert tokens(llm, drawn) == best


PROMPTS = {
    "tuple": tuple(PROMPT),
    "range": range(10),
    "generator": (token for token in PROMPT),
    "numpy": np.array(PROMPT),
    "numpy int32": np.array(PROMPT, dtype=np.int32),
    "numpy scalars": [np.int64(token) for token in PROMPT],
    "tensor": torch.tensor(PROMPT),
    "tensor scalars": list(torch.tensor(PROMPT)),
    "one row": torch.tensor([PROMPT]),
    "mapping": {"input_ids": PROMPT, "attention_mask": [1] * len(PROMPT)},
    "encoding": transformers.BatchEncoding({"input_ids": torch.tensor([PROMPT])}),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_may_come_in_any_type_of_integers(llm, kind):
    prompt, one = PROMPTS[kind], SamplingParams(max_tokens=1)
    expected = list(range(10)) if kind == "range" else PROMPT
    if kind == "generator":
        assert llm.generate(prompt, one)[0].prompt_token_ids == expected
        return
    assert [answer.prompt_token_ids for answer in llm.generate(prompt, one)] == [expected]
    assert len(list(llm.stream(prompt, one))) >= 1
    pair = llm.generate([prompt, "hi"], one) if kind != "one row" else llm.generate((prompt, "hi"), one)
    assert pair[0].prompt_token_ids == expected and pair[1].prompt == "hi"


def test_several_prompts_may_come_in_any_iterable(llm):
    one = SamplingParams(max_tokens=1)
    rows = torch.tensor([PROMPT, PROMPT[::-1]])
    for prompts in (rows, rows.numpy(), {"input_ids": rows}, iter([PROMPT, PROMPT[::-1]])):
        assert [answer.prompt_token_ids for answer in llm.generate(prompts, one)] == rows.tolist()
    padded = {"input_ids": [[9, 9, 1, 2], [1, 2, 3, 4]], "attention_mask": [[0, 0, 1, 1], [1] * 4]}
    assert [a.prompt_token_ids for a in llm.generate(padded, one)] == [[1, 2], [1, 2, 3, 4]]
    texts = {"a": 1, "b": 2}
    for prompts in (("a", "b"), texts.keys(), np.array(["a", "b"]), (text for text in "ab")):
        assert [answer.prompt for answer in llm.generate(prompts, one)] == ["a", "b"]
    assert llm.generate([]) == []


def test_what_a_tokenizer_of_transformers_returns_is_a_prompt(llm, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages, one = [{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1)
    for tensors in (None, "pt", "np"):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors=tensors)
        (answer,) = llm.generate(encoded, one)
        assert answer.prompt == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, 5, 1.5, b"hi", [b"hi"], {"prompt": "hi"}, object()),
        *([1.5], [1, 2.0], ["1", 2], [[1, "2"]], [True, False], [None], [[[1]]]),
        *(torch.tensor(3), torch.tensor([1.0]), torch.tensor([[[1]]]), np.array([True])),
        *({"input_ids": [[1, 2]], "attention_mask": [[1]]}, [5, VOCAB], [-1], ["hi", []]),
    ],
    ids=lambda prompt: "object" if type(prompt) is object else repr(prompt)[:30],
)
def test_invalid_prompts_are_refused_at_once(llm, prompt):
    refused(lambda: llm.generate(prompt, GREEDY), "prompt|token id")
    if not isinstance(prompt, list):
        refused(lambda: llm.stream(prompt, GREEDY), "prompt")


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 5, [None], [GREEDY, GREEDY], [{}]], ids=str)
def test_invalid_params_are_refused(llm, params):
    refused(lambda: llm.generate("hi", params), "SamplingParams")
    refused(lambda: llm.stream("hi", params), "params")


@pytest.mark.parametrize(
    "messages", [None, "hi", [], ["hi"], {"role": "user", "content": "x"}, [{"content": "x"}]], ids=repr
)
def test_invalid_messages_are_refused(llm, messages):
    refused(lambda: llm.chat(messages), "messages")


@pytest.mark.parametrize(
    "setting",
    [
        {"max_batch": 10**9},
        {"max_batch": 2.5},
        {"max_batch": "4"},
        {"cache_tokens": 1.5},
        {"cache_tokens": True},
        {"prefill_chunk": "x"},
        {"max_len": 100.0},
        {"max_len": -1},
        {"prefix_cache": "no"},
        {"cuda_graphs": 1},
        {"batch_invariant": None},
        {"generation_config": "x"},
        {"phi": 5},
        {"phi": [torch.zeros(4)]},
        {"phi": [torch.full((4,), torch.nan)] * 3},
        {"device": 3.5},
        {"device": "cuda:-1"},
        {"dtype": 16},
        {"dtype": "tensor"},
        {"quantize": 4},
    ],
    ids=str,
)
def test_settings_of_a_wrong_type_are_refused(folder, setting):
    refused(lambda: load(folder, **setting), next(iter(setting)))


def test_invalid_models_and_missing_gpus(folder, monkeypatch):
    for model in (None, 5, b"x", ["a"]):
        refused(lambda model=model: LLM(model), "^model must be a path or a name")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(lambda: load(folder, device="cuda:9"), "cuda:9 was asked for, but torch finds 2 GPUs")


def test_defaults_are_those_of_the_model(llm, monkeypatch):
    defaults = GenerationDefaults(temperature=1.0, top_k=7, repetition_penalty=1.3, max_tokens=5)
    monkeypatch.setattr(llm, "defaults", defaults)
    own = SamplingParams(temperature=1.0, top_k=7, repetition_penalty=1.3, max_tokens=5, seed=3)
    assert SamplingParams(seed=3).resolved(defaults) == own.resolved(GenerationDefaults())
    assert tokens(llm, SamplingParams(seed=3)) == tokens(llm, own)
    given = SamplingParams(temperature=0, top_k=0, repetition_penalty=1, max_tokens=None, ignore_eos=True)
    resolved = given.resolved(defaults)
    assert (resolved.temperature, resolved.top_k, resolved.max_tokens) == (0.0, 0, None)
    assert len(tokens(llm, given)) == llm.max_len - len(PROMPT)


# Their effects, compared with transformers


@dataclass
class Penalty(transformers.LogitsProcessor):
    """OpenAI's definition: over the answer's tokens."""

    presence: float
    frequency: float

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores)
        for token in input_ids[0, len(PROMPT) :].tolist():
            counts[0, token] += 1
        return scores - self.presence * (counts > 0) - self.frequency * counts


def their_tokens(theirs, count: int = 24, processors=(), **settings) -> list[int]:
    settings = {
        "eos_token_id": 257,
        "pad_token_id": 258,
        "do_sample": False,
        "max_new_tokens": count,
    } | settings
    processors = transformers.LogitsProcessorList(processors)
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    found = theirs.generate(prompt, attention_mask=mask, logits_processor=processors, **settings)
    return found[0, len(PROMPT) :].tolist()


NO_EOS = {257: -float("inf")}


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"presence_penalty": 3.0}, {"processors": [Penalty(3.0, 0.0)]}),
        ({"frequency_penalty": 1.5}, {"processors": [Penalty(0.0, 1.5)]}),
        ({"presence_penalty": -2.0, "frequency_penalty": 0.4}, {"processors": [Penalty(-2.0, 0.4)]}),
        ({"logit_bias": {5: 9.0, 7: -4.0} | NO_EOS}, {"sequence_bias": {(5,): 9.0, (7,): -4.0}}),
    ],
    ids=str,
)
def test_penalties_and_biases_are_those_of_transformers(llm, theirs, params, settings):
    settings = settings | {"suppress_tokens": [257]}
    expected = their_tokens(theirs, **settings)
    changed = SamplingParams(max_tokens=24, **({"ignore_eos": True} | params))
    assert expected != their_tokens(theirs, suppress_tokens=[257])
    others = [GREEDY, SamplingParams(max_tokens=9, presence_penalty=1.0, logit_bias={1: 4.0})]
    prompts = [random_tokens(5), PROMPT, random_tokens(30, seed=2)]
    together = llm.generate(prompts, [others[0], changed, others[1]])  # whatever the other rows
    assert together[1].token_ids == tokens(llm, changed) == expected


def test_penalties_survive_preemption_and_late_reading(folder, llm):
    params = [
        SamplingParams(
            max_tokens=40,
            ignore_eos=True,
            presence_penalty=float(i % 3),
            frequency_penalty=i % 2 / 2,
            logit_bias={i: 5.0} if i % 4 else None,
            min_tokens=i,
            stop_token_ids=[200 + i, 230 + i],
            repetition_penalty=1 + i % 3 / 10,
        )
        for i in range(10)
    ]
    prompts = [random_tokens(10 + i, seed=i) for i in range(10)]
    expected = [tokens(llm, p, prompt) for p, prompt in zip(params, prompts, strict=True)]
    for behind in (0, 1):
        small = load(folder, max_batch=4, cache_tokens=160)
        small._engine.behind = behind
        assert [answer.token_ids for answer in small.generate(prompts, params)] == expected
        assert small.stats.preemptions > 0 and small._engine.pool.used_blocks == 0


def test_min_tokens_hold_back_what_ends_an_answer(llm, theirs):
    free = tokens(llm, SamplingParams(max_tokens=24, ignore_eos=True))
    ending = free[2]
    (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[ending]))
    assert answer.token_ids == free[: free.index(ending)]
    assert (answer.finish_reason, answer.stop_match) == ("stop", ending)
    for least in (1, 5, 24):
        params = SamplingParams(max_tokens=24, min_tokens=least, stop_token_ids=[ending])
        expected = their_tokens(theirs, eos_token_id=[257, ending], min_new_tokens=least)
        (answer,) = llm.generate(PROMPT, params)
        ended = expected and expected[-1] in (257, ending)
        assert answer.token_ids == (expected[:-1] if ended else expected)
        assert answer.stop_match == (expected[-1] if ended else None)
        assert len(answer.token_ids) >= least


def test_bad_words_are_never_generated(llm, theirs):
    letters = set(llm.tokenizer.encode("abcdefghijklmnop", add_special_tokens=False))
    others = [token for token in range(VOCAB) if token not in letters]
    bias = dict.fromkeys(others, -float("inf"))
    (free,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, logit_bias=bias))
    words = [free.token_ids[place] for place in (slice(1, 3), slice(6, 9), slice(11, 12))]
    texts = [llm.tokenizer.decode(word) for word in words]
    expected = their_tokens(theirs, bad_words_ids=words, suppress_tokens=others)
    (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, logit_bias=bias, bad_words=texts))
    assert answer.token_ids == expected != free.token_ids
    assert not any(text in answer.text for text in texts)


def test_bad_words_of_several_tokens(llm):
    """'ab' and 'aba' are never generated, although both letters are."""
    ids = llm.tokenizer.encode("ab", add_special_tokens=False)
    often = dict.fromkeys(ids, 30.0)
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=1, logit_bias=often)
    assert "ab" in llm.generate(PROMPT, params)[0].text
    banned = SamplingParams(
        max_tokens=40, ignore_eos=True, temperature=1.0, seed=1, logit_bias=often, bad_words=["ab", "bbb"]
    )
    text = llm.generate(PROMPT, banned)[0].text
    assert set("ab") <= set(text) and "ab" not in text and "bbb" not in text


def test_a_logits_processor_runs_first(llm, folder):
    seen = []

    def odd(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(ids), logits.dtype, tuple(logits.shape)))
        logits[::2] = -torch.inf
        return logits

    params = SamplingParams(max_tokens=10, logits_processor=odd, logprobs=2)
    free = SamplingParams(max_tokens=10, ignore_eos=True)
    for behind in (0, 1):
        engine_llm = load(folder)
        engine_llm._engine.behind = behind
        seen.clear()
        answers = engine_llm.generate([PROMPT, PROMPT], [params, free])
        assert answers[1].token_ids == tokens(llm, free)
        answer = answers[0]
        assert all(token % 2 for token in answer.token_ids)
        assert [ids for ids, *_ in seen] == [PROMPT + answer.token_ids[:i] for i in range(len(seen))]
        assert {kind for _, *kind in map(lambda s: (s[0], (s[1], s[2])), seen) for kind in kind} == {
            (torch.float32, (VOCAB,))
        }
        # Log-probabilities are those of the unmodified logits.
        unchanged = llm.generate(PROMPT, SamplingParams(max_tokens=1, logprobs=2))[0].logprobs[0]
        assert dict(answer.logprobs[0].top) == pytest.approx(dict(unchanged.top))
    for wrong in (lambda ids, logits: None, lambda ids, logits: logits[:5]):
        refused(
            lambda wrong=wrong: llm.generate("x", SamplingParams(logits_processor=wrong)), "logits_processor"
        )


def test_special_tokens_stay_in_the_text_if_asked_for(llm):
    always = {258: 1e4}
    for skip, text in ((True, ""), (False, "<pad>" * 3)):
        params = SamplingParams(max_tokens=3, logit_bias=always, skip_special_tokens=skip)
        assert llm.generate("x", params)[0].text == text
        assert "".join(piece.text for piece in llm.stream("x", params)) == text


def test_a_completion_has_what_identifies_and_repeats_it(llm):
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, n=2)
    answers = llm.generate([PROMPT, "hello", PROMPT * 3], params)
    assert [(a.index, a.sample) for a in answers] == list(itertools.product(range(3), range(2)))
    for answer in answers:
        again = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=answer.seed)
        assert tokens(llm, again, answer.prompt_token_ids) == answer.token_ids
        assert answer.prompt_tokens == len(answer.prompt_token_ids) and answer.generated_tokens == 8
    (found,) = llm.generate([PROMPT * 3], params.__class__(max_tokens=1))
    assert found.cached_prompt_tokens == llm.stats.cached_prompt_tokens == 32


def test_answers_are_yielded_as_they_end(llm):
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (20, 3, 9)]
    order = [answer.index for answer in llm.completions([PROMPT] * 3, params)]
    assert order == [1, 2, 0]
    refused(lambda: llm.completions(None), "prompts")  # by the call itself
    first = llm.completions([PROMPT] * 3, params)
    next(first)
    first.close()
    assert llm._engine.pool.used_blocks == 0


# Isolation


SPOILED = 271  # a token that no prompt or answer here contains


@pytest.fixture
def spoiled(folder) -> LLM:
    """A model whose logits are NaN after a prompt with token SPOILED."""
    llm = load(folder)
    llm.decoder.weights.embed[SPOILED] = torch.nan
    return llm


def test_logits_of_nan_end_their_own_request(spoiled, llm):
    expected = tokens(llm, SamplingParams(max_tokens=30, ignore_eos=True))
    assert SPOILED not in expected
    good = spoiled.stream(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    said = [next(good).token_id]
    for call in (lambda: spoiled.generate([SPOILED], GREEDY), lambda: list(spoiled.stream([1, SPOILED, 3]))):
        refused(call, "all logits are NaN")
        said.append(next(good).token_id)
    said += [piece.token_id for piece in good][:-1]
    assert said == expected
    assert spoiled._engine.pool.used_blocks == 0


def test_params_that_leave_no_token_end_their_own_request(llm):
    nothing = dict.fromkeys(range(VOCAB), -float("inf"))
    refused(
        lambda: llm.generate("x", SamplingParams(logit_bias=nothing)), "no token can be chosen: logit_bias"
    )
    only_eos = {token: -float("inf") for token in range(VOCAB) if token != 257}
    params = SamplingParams(logit_bias=only_eos, min_tokens=2)
    refused(lambda: llm.generate("x", params), "after 0 tokens .*logit_bias, min_tokens")
    assert llm.generate("x", SamplingParams(logit_bias=only_eos))[0].finish_reason == "stop"
    assert llm._engine.pool.used_blocks == 0


def test_an_error_is_raised_by_the_call_that_it_belongs_to(llm):
    """Even if another thread runs the steps."""

    def broken(ids, logits):
        if len(ids) > len(PROMPT) + 2:
            raise ZeroDivisionError("a user's mistake")
        return logits

    good = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = tokens(llm, good)
    bad = llm.stream(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True, logits_processor=broken))
    next(bad)  # joins now and advances with the steps of the other
    assert tokens(llm, good) == expected
    with pytest.raises(ZeroDivisionError, match="a user's mistake"):
        list(bad)
    assert tokens(llm, good) == expected and llm._engine.pool.used_blocks == 0


def test_bad_requests_of_one_thread_do_not_affect_another(llm):
    good = SamplingParams(max_tokens=30, ignore_eos=True)
    expected, found = tokens(llm, good), []

    def work() -> None:
        for _ in range(8):
            try:
                found.append(tokens(llm, good))
            except Exception as error:
                found.append(error)

    def fail(ids, logits):
        raise KeyError("not mine")

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        with contextlib.suppress(KeyError):
            llm.generate(PROMPT, SamplingParams(max_tokens=3, logits_processor=fail))
    assert found == [expected] * 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_step_leaves_a_usable_llm(folder, llm, monkeypatch, error):
    own = load(folder)
    expected = tokens(llm, SamplingParams(max_tokens=30, ignore_eos=True))
    for owner, part in (
        (own.decoder, "decode"),
        (own._engine.cache or own, "stats"),
        (own._engine.scheduler, "advance"),
    ):
        if part == "stats":
            continue

        def interrupt(*args, **kwargs):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(owner, part, interrupt)
            with pytest.raises(error):
                own.generate(PROMPT, GREEDY)
        assert own._engine.pool.used_blocks == 0
        assert tokens(own, SamplingParams(max_tokens=30, ignore_eos=True)) == expected


def test_blocks_that_an_error_left_uncounted_are_found_again(folder, llm):
    own = load(folder, cache_tokens=160)
    other = own.stream(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    said = [next(other).token_id]
    pool = own._engine.pool
    allocate = pool.allocate

    def interrupted(count: int):
        allocate(count)
        raise KeyboardInterrupt  # before anything has recorded which they are

    pool.allocate = interrupted
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            own.generate(random_tokens(30), GREEDY)
    pool.allocate = allocate
    said += [piece.token_id for piece in other][:-1]
    assert said == tokens(llm, SamplingParams(max_tokens=30, ignore_eos=True))
    assert pool.used_blocks == 0 and pool.free_blocks == 10


def test_a_stream_that_is_collected_within_a_step_of_its_own_thread(llm, monkeypatch):
    """Garbage may be collected at any time: neither a deadlock nor leaked blocks may follow."""
    expected = tokens(llm)
    decode, left = llm.decoder.decode, []
    left.append(llm.stream(PROMPT, GREEDY))
    next(left[0])

    def collect(*args):
        if left:
            left.pop()
            gc.collect()
        return decode(*args)

    monkeypatch.setattr(llm.decoder, "decode", collect)
    done = []
    worker = threading.Thread(target=lambda: done.append(tokens(llm)), daemon=True)
    worker.start()
    worker.join(timeout=30)
    assert done == [expected]
    assert llm._engine.pool.used_blocks == 0


def test_figures_count_the_computed_tokens(folder, monkeypatch):
    """Every decode step takes 20 ms here; the first token needs none."""
    llm = load(folder)
    llm.generate(PROMPT, GREEDY)
    decode = mock.Mock(side_effect=llm.decoder.decode)

    def slow(*args):
        time.sleep(0.02)
        return decode(*args)

    monkeypatch.setattr(llm.decoder, "decode", slow)
    for count in (2, 5):
        (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=count, ignore_eos=True))
        for rate in (answer.tokens_per_second, llm.stats.tokens_per_second):
            assert 10 < rate < 50
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    decode.reset_mock()
    next(stream)
    decode.assert_not_called()  # yielded before the next step
    stream.close()


# torch settings of the calling program


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_settings_of_torch_around_it_change_nothing(folder, name):
    params = SamplingParams(
        max_tokens=30,
        ignore_eos=True,
        temperature=0.8,
        seed=1,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        logit_bias={3: 1.0},
        bad_words=["x"],
        logprobs=2,
        prompt_logprobs=1,
    )
    prompts = [random_tokens(40, seed=i) for i in range(3)]

    def answers(llm: LLM):
        found = llm.generate(prompts, [params, replace(GREEDY, max_tokens=30), params])
        assert llm.stats.preemptions > 0
        return [(answer.token_ids, answer.logprobs, answer.prompt_logprobs) for answer in found]

    small = {"cache_tokens": 16 * 9}  # also saves and restores sequences
    before = load(folder, **small)
    expected = answers(before)
    with SURROUNDINGS[name]():
        within = load(folder, **small)
        assert answers(within) == expected
        assert answers(before) == expected
    assert answers(within) == expected
    within.decoder.weights.embed.mul_(1.0)  # its weights are ordinary tensors
