"""Guides: every position gets only tokens the grammar allows, whatever else is in the batch."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from runner_models import VOCAB, load, random_tokens

from flashdecpp import Guide, ModelError, SamplingParams

PROMPT = random_tokens(12, seed=4)
EOS = 257


class Choices:
    """Allows the given tokens at each position, then only the end of sequence."""

    def __init__(self, *choices: set[int]) -> None:
        self.choices = list(choices)
        self.accepted: list[int] = []

    def fill(self, mask: torch.Tensor) -> None:
        assert mask.dtype == torch.int32 and mask.shape == (-(-VOCAB // 32),) and mask.device.type == "cpu"
        assert mask.is_contiguous() and bool((mask == -1).all())
        place = len(self.accepted)
        allowed = self.choices[place] if place < len(self.choices) else {EOS}
        bits = torch.zeros(len(mask) * 32, dtype=torch.int64)
        bits[sorted(allowed)] = 1
        words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
        mask.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))

    def accept(self, token: int) -> None:
        assert token in self.choices[len(self.accepted)]
        self.accepted.append(token)


CHOICES = [{1, 31, 32}, {63}, {0, 64, 255}, set(range(100, 130)), {271, 258}]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 3, "top_k": 9, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("behind", [0, 1])
def test_only_allowed_tokens_are_generated(folder, llm, behind, params):
    own = load(folder)
    own._engine.behind = behind
    assert isinstance(Choices(), Guide)
    made = []

    def guide() -> Choices:
        made.append(Choices(*CHOICES))
        return made[-1]

    free = SamplingParams(max_tokens=12, ignore_eos=True, **params)
    guided = SamplingParams(max_tokens=12, guide=guide, n=3 if params else 1, **params)
    prompts = [random_tokens(30), PROMPT, random_tokens(7, seed=2)]
    first, *answers, last = own.generate(prompts, [free, guided, free])
    assert len(made) == len(answers) and len({id(one) for one in made}) == len(made)
    for answer, its in zip(answers, made, strict=True):
        assert len(answer.token_ids) == 5 and answer.token_ids == its.accepted
        assert all(token in allowed for token, allowed in zip(answer.token_ids, CHOICES, strict=True))
        assert (answer.finish_reason, answer.stop_match) == ("stop", EOS)
    for answer, prompt in ((first, prompts[0]), (last, prompts[2])):
        assert answer.token_ids == llm.generate(prompt, free)[0].token_ids  # unaffected
    assert own._engine.pool.used_blocks == 0


def test_guides_survive_preemption(folder):
    """A guide's state stays with its answer while the answer waits."""

    def params(number: int) -> SamplingParams:
        choices = [set(range(number, 256, 3 + place % 5)) for place in range(40)]
        return SamplingParams(max_tokens=30 + number, guide=lambda: Choices(*choices), bad_words=["ab", "z"])

    prompts = [random_tokens(10 + 3 * i, seed=i) for i in range(8)]
    several = [params(number) for number in range(8)]
    expected = [load(folder).generate([p], s)[0].token_ids for p, s in zip(prompts, several, strict=True)]
    for behind in (0, 1):
        small = load(folder, max_batch=5, cache_tokens=16 * 10, prefix_cache=False)
        small._engine.behind = behind
        assert [answer.token_ids for answer in small.generate(prompts, several)] == expected
        assert small.stats.preemptions > 0 and small._engine.pool.used_blocks == 0


class Failing:
    def __init__(self, part: str) -> None:
        self.part = part

    def fill(self, mask: torch.Tensor) -> None:
        if self.part == "fill":
            raise RuntimeError("the grammar is broken")
        if self.part == "nothing":
            mask.zero_()

    def accept(self, token: int) -> None:
        if self.part == "accept":
            raise RuntimeError("the grammar is broken")


@pytest.mark.parametrize("part", ["fill", "accept", "nothing"])
def test_a_failing_guide_ends_only_its_own_request(llm, part):
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = llm.generate(PROMPT, free)[0].token_ids
    other = llm.stream(PROMPT, free)
    said = [next(other).token_id]
    error, match = (ModelError, "guide may exclude all") if part == "nothing" else (RuntimeError, "is broken")
    with pytest.raises(error, match=match):
        llm.generate(PROMPT, SamplingParams(guide=lambda: Failing(part)))
    assert said + [piece.token_id for piece in other][:-1] == expected
    assert llm._engine.pool.used_blocks == 0


def test_an_object_that_is_not_a_guide_is_refused_up_front(llm):
    with pytest.raises(ModelError, match="guide must return an object with fill and accept, got dict"):
        llm.stream("x", SamplingParams(guide=dict))


# Grammars from a library


class Grammar:
    """llguidance's matcher as a guide, as in the documentation."""

    def __init__(self, tokenizer, grammar: str) -> None:
        import llguidance

        self.matcher = llguidance.LLMatcher(tokenizer, grammar)

    def fill(self, mask: torch.Tensor) -> None:
        from llguidance.torch import fill_next_token_bitmask

        fill_next_token_bitmask(self.matcher, mask.unsqueeze(0))

    def accept(self, token: int) -> None:
        assert self.matcher.consume_token(token), self.matcher.get_error()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_follows_a_schema_with_llguidance(llm, folder, temperature):
    llguidance = pytest.importorskip("llguidance")
    pytest.importorskip("llguidance.hf")
    own = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = llguidance.hf.from_tokenizer(own, n_vocab=llm.config.vocab)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, defaults={"whitespace_flexible": False})
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=60, n=4, guide=lambda: Grammar(tokenizer, grammar)
    )
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    *answers, other = llm.generate([PROMPT, PROMPT], [params, free])
    found = [json.loads(answer.text) for answer in answers]
    for value in found:
        assert set(value) == {"name", "age"} and value["name"] in ("ann", "bob") and 1 <= value["age"] <= 99
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert len({json.dumps(value) for value in found}) == 1 if temperature == 0 else True
    assert other.token_ids == llm.generate(PROMPT, free)[0].token_ids
