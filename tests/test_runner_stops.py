"""Incremental detokenization, and where an answer ends: stop strings, special tokens, end of turn."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner_models import VOCAB, make_model, save_model
from runner_tokenizers import PIECES, USER_DEFINED, folder_tokenizer, gguf_tokenizer, spm_tokenizer

from flashdecpp import LLM, SamplingParams
from flashdecpp.loading.tokenizer import BaseTokenizer, TextStream

TEXT = "naïve 🚀 日本語, hello\n"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> BaseTokenizer:
    """Ids 259 and 260 are special."""
    return folder_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<turn>", "<|end|>")


@pytest.fixture(scope="module")
def pieces() -> BaseTokenizer:
    return spm_tokenizer("<turn>")


def stream_of(
    tokenizer: BaseTokenizer, ids: list[int], stop: tuple[str, ...] = (), **options
) -> tuple[TextStream, list[str]]:
    """A stream fed with the tokens until it stops, and the text that each of them produced."""
    stream = TextStream(tokenizer, stop, **options)
    texts = []
    for token in ids:
        texts.append(stream.push(token))
        if stream.stopped:
            break
    texts.append(stream.finish())
    assert "".join(texts) == stream.text
    return stream, texts


def answer_of(tokenizer: BaseTokenizer, ids: list[int], *stop: str, **options) -> tuple[str, str | None]:
    stream, _ = stream_of(tokenizer, ids, stop, **options)
    assert stream.stopped == (stream.matched is not None)
    return stream.text, stream.matched


# ---- characters


@pytest.mark.parametrize("make", [gguf_tokenizer, spm_tokenizer])
def test_a_character_appears_with_its_last_byte(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    _, texts = stream_of(tokenizer, ids)
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)
    assert sum(map(bool, texts)) >= len(TEXT) - 6  # "hello" is a single token in the second


@pytest.mark.parametrize("kind", ["bytewise", "pieces"])
def test_bytes_that_never_form_a_character_are_released(kind, request):
    """At most three tokens later, without losing anything around them."""
    tokenizer = request.getfixturevalue(kind)
    spm = kind == "pieces"
    word = tokenizer.encode("hello", add_special_tokens=False)
    smile = [3 + b for b in "🚀".encode()] if spm else tokenizer.encode("🚀", add_special_tokens=False)
    first, last = smile[0], smile[-1]
    _, texts = stream_of(tokenizer, [*word, *[last] * 50, *word])
    shown = "hello" + "\ufffd" * 50 + (" hello" if spm else "hello")
    assert "".join(texts) == shown
    assert sum(map(bool, texts[len(word) : len(word) + 50])) == 47
    assert answer_of(tokenizer, [*smile, first, *word])[0] == "🚀\ufffd" + (" hello" if spm else "hello")
    assert set(answer_of(tokenizer, smile[:3])[0]) == {"\ufffd"}  # the answer ends inside a character


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=30))
def test_any_bytes_stream_to_the_text_of_the_whole(bytewise, ids):
    assert answer_of(bytewise, ids)[0] == bytewise.decode(ids)


@pytest.mark.parametrize("text", ["a " * 10_000, "é" * 10_000, "\ufffd" * 7_000, "<turn>" * 20_000])
def test_long_answers_take_linear_time(bytewise, text):
    ids = bytewise.encode(text, add_special_tokens=False)
    started = time.perf_counter()
    shown = answer_of(bytewise, ids, "a b")[0]
    assert shown == text.replace("<turn>", "")
    assert time.perf_counter() - started < 8  # linear takes under two seconds; quadratic, half a minute


# ---- after the prompt


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("hello", "▁hello"),  # " hello": the space belongs to the answer
        ("hello", "lo"),
        ("", "▁hello"),  # no space at the very beginning
        ("w, ", "▁hello"),
        ("hé", "▁w"),
    ],
)
def test_prompt_and_answer_join_to_the_text_of_all_tokens(pieces, prompt, answer):
    prompt_ids = pieces.encode(prompt)
    ids = [PIECES.index(answer), PIECES.index("or")]
    text = answer_of(pieces, ids, prompt_ids=prompt_ids)[0]
    assert pieces.decode(prompt_ids) + text == pieces.decode(prompt_ids + ids)


WORDS = st.lists(st.sampled_from([0, 1, 2, *range(259, len(PIECES))]), max_size=25)


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_an_answer_continues_the_prompt_from_any_position(pieces, prompt_ids, ids):
    text = answer_of(pieces, ids, prompt_ids=prompt_ids)[0]
    assert pieces.decode(prompt_ids) + text == pieces.decode(prompt_ids + ids)


def test_a_special_token_before_the_answer_does_not_hide_the_prompt(pieces):
    prompt_ids = [*pieces.encode("hello"), *[PIECES.index("</s>")] * 20]
    assert answer_of(pieces, [PIECES.index("▁hello")], prompt_ids=prompt_ids)[0] == " hello"


def test_an_answer_does_not_begin_inside_a_character_of_the_prompt(pieces):
    prompt_ids = pieces.encode("日本語" * 10)
    ids = [3 + byte for byte in "🚀".encode()]
    assert answer_of(pieces, ids, prompt_ids=prompt_ids)[0] == "🚀"


# ---- stop strings


@pytest.mark.parametrize(
    ("said", "stop", "text", "matched"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("four",), "one two three", None),
        ("abcd", ("abcd", "bc"), "a", "bc"),  # the one that ends first
        ("abcd", ("bcd", "cd"), "a", "bcd"),  # if two end together, the one listed first
        ("aaab", ("aab",), "a", "aab"),
        ("ababac", ("abac",), "ab", "abac"),
        ("aaa", ("aa",), "", "aa"),
        ("日本語", ("本",), "日", "本"),
        ("stop here, stopped", ("stopped",), "stop here, ", "stopped"),
        ("sto", ("stop",), "sto", None),
    ],
)
def test_the_text_ends_before_a_stop_string(bytewise, said, stop, text, matched):
    assert answer_of(bytewise, bytewise.encode(said, False), *stop) == (text, matched)


@settings(max_examples=100, deadline=None)
@given(st.text("ab<", max_size=20), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_match_an_exhaustive_search(bytewise, said, stop):
    ends = [n for n in range(len(said) + 1) if any(said[:n].endswith(s) for s in stop)]
    found = [s for s in stop if ends and said[: ends[0]].endswith(s)]
    text, matched = answer_of(bytewise, bytewise.encode(said, False), *stop)
    assert matched in (found or [None])
    assert text == (said[: ends[0] - len(matched)] if ends else said)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("ab<turn>cd", "<turn>", "ab"),
        ("ab<turn>\ncd", "<turn>\n", "ab"),
        ("ab<turn>cd<turn>\ne", "<turn>\n", "ab<turn>cd"),
        ("ab\n<turn>", "\n<turn>", "ab"),
        ("ab<turn><|end|>c", "<turn><|end|>", "ab"),
        ("a<turn>b<|end|>", "<|end|>", "a<turn>b"),
        ("ab<turn>cd", "<turn>x", "ab<turn>cd"),
    ],
)
def test_special_tokens_in_a_stop_string(bytewise, said, stop, text, hidden):
    """They stop the answer whether or not the text shows them."""
    ids = bytewise.encode(said, add_special_tokens=False)
    assert 259 in ids
    shown = text.replace("<turn>", "") if hidden else text
    matched = None if stop.endswith("x") else stop
    assert answer_of(bytewise, ids, stop, skip_special_tokens=hidden) == (shown, matched)


def test_a_stop_string_matches_only_visible_text(bytewise):
    """Not part of a hidden token, but text that spans one."""
    ids = bytewise.encode("ab<turn>cd", add_special_tokens=False)
    assert answer_of(bytewise, ids, "turn") == ("abcd", None)
    assert answer_of(bytewise, ids, "bc") == ("a", "bc")
    assert answer_of(bytewise, ids, "turn", skip_special_tokens=False) == ("ab<", "turn")


def test_special_tokens_are_shown_on_request(bytewise, pieces):
    ids = bytewise.encode("<s>ab<turn>", add_special_tokens=False)
    assert answer_of(bytewise, ids) == ("ab", None)
    assert answer_of(bytewise, ids, skip_special_tokens=False) == ("<s>ab<turn>", None)
    assert answer_of(pieces, [len(PIECES)], skip_special_tokens=False) == ("<turn>", None)


def test_a_model_stops_at_a_special_token(tmp_path):
    """The model repeats "ab<turn>" forever."""
    saying = {ord("a") - 33: ord("b") - 33, ord("b") - 33: 259}
    model = make_model(hidden_size=VOCAB, head_dim=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        for token in range(VOCAB):
            model.lm_head.weight[saying.get(token, ord("a") - 33), token] = 1.0
        model.model.norm.weight.fill_(1.0)
    save_model(tmp_path)
    model.save_pretrained(tmp_path)
    folder_tokenizer(tmp_path, "<turn>")
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    (endless,) = llm.generate("x", SamplingParams(max_tokens=6))
    assert (endless.finish_reason, endless.text) == ("length", "abab")
    for stop in ("<turn>", ("b<turn>", "c")):
        (answer,) = llm.generate("x", SamplingParams(max_tokens=6, stop=stop))
        assert (answer.finish_reason, answer.text) == ("stop", "ab" if stop == "<turn>" else "a")


# ---- the end of a turn


@pytest.mark.parametrize("make", [gguf_tokenizer, spm_tokenizer])
@pytest.mark.parametrize(
    "turn", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"]
)
def test_a_gguf_file_ends_turns_at_well_known_tokens(make, turn):
    tokenizer = make("<other>", turn)
    at = {text: index for index, text in tokenizer.special_tokens.items()}
    assert tokenizer.eos_ids == (at["</s>"], at[turn])


def test_a_user_defined_token_ends_a_turn_only_if_in_the_template():
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    plain = gguf_tokenizer("<|im_end|>", kind=USER_DEFINED)
    assert plain.eos_ids == (257,) and 259 not in plain.special_tokens
    told = gguf_tokenizer("<|im_end|>", kind=USER_DEFINED, chat_template=template)
    assert told.eos_ids == (257, 259) and told.special_tokens[259] == "<|im_end|>"
    assert told.encode("a<|im_end|>", False)[-1] == 259


@pytest.mark.parametrize("name", ["eot", "eom"])
def test_a_gguf_file_may_name_more_end_tokens(name):
    assert gguf_tokenizer("<bye>", **{f"{name}_token_id": 259}).eos_ids == (257, 259)
    assert gguf_tokenizer(eos_token_id=0xFFFFFFFF, token_type=[1] * 259).eos_ids == ()


def test_a_folder_ends_where_transformers_does(tmp_path):
    """At the tokenizer's own end of sequence, not at a token that merely looks like one."""
    assert folder_tokenizer(tmp_path / "a", "<|im_end|>").eos_ids == (257,)
    assert folder_tokenizer(tmp_path / "b", "<|im_end|>", eos_token="<|im_end|>").eos_ids == (259,)
