"""Tokenizers of folders, of ChatGLM2 and 3 and of GGUF files, and their errors."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from runner_models import save_chatglm, save_model
from runner_tokenizers import (
    CONTROL,
    NORMAL,
    PIECES,
    edit_json,
    folder_tokenizer,
    gguf_tokenizer,
    spm_tokenizer,
    write_sentencepiece,
)

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.chatglm_tokenizer import ChatGLMTokenizer
from flashdecpp.loading.tokenizer import FolderTokenizer

ENCODED = {  # by hand: repeatedly merge the pair with the highest score
    "hello": ["▁hello"],
    "hello world": ["▁hello", "▁w", "or", "l", "d"],
    "hell, helo": ["▁hel", "l", ",", "▁hel", "o"],
    "o  ho": ["▁", "o", "▁", "▁h", "o"],
    "wé\n": ["▁w", "<0xC3>", "<0xA9>", "<0x0A>"],
    "<s>": ["▁", "<0x3C>", "<0x73>", "<0x3E>"],  # plain text, not the special token
}
ADDED = len(PIECES)  # the first id of the tokens that ChatGLM2 adds after its pieces


@pytest.fixture
def tokenizer(tmp_path) -> ChatGLMTokenizer:
    write_sentencepiece(tmp_path / "tokenizer.model")
    return ChatGLMTokenizer(tmp_path)


@pytest.mark.parametrize("text", ENCODED)
def test_pairs_are_merged_by_their_scores(tokenizer, text):
    expected = [PIECES.index(piece) for piece in ENCODED[text]]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [ADDED + 1, ADDED + 3, *expected]  # [gMASK] sop
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 1, *expected, 2, ADDED + 4]) == text
    assert tokenizer.eos_ids == (2,)


def test_a_piece_may_have_the_name_of_an_added_token(tmp_path):
    pieces = ["sop" if piece == "▁w" else piece for piece in PIECES]
    write_sentencepiece(tmp_path / "tokenizer.model", pieces=pieces)
    tokenizer = ChatGLMTokenizer(tmp_path)
    ids = [ADDED + 1, ADDED + 3, pieces.index("▁hel"), pieces.index("sop"), ADDED + 4, 10**6]
    assert tokenizer.decode(ids) == "helsop"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[gMASK]sop helsopeop"


def test_chatglm2s_chat_is_rounds(tokenizer):
    first = {"role": "user", "content": "hello"}
    answer, second = {"role": "assistant", "content": "world"}, {"role": "user", "content": "lo"}
    ask, reply = "\u95ee\uff1a", "\u7b54\uff1a"
    assert tokenizer.chat_prompt([first]) == f"[Round 1]\n\n{ask}hello\n\n{reply}"
    prompt = f"[Round 1]\n\n{ask}hello\n\n{reply}world\n\n[Round 2]\n\n{ask}lo\n\n{reply}"
    assert tokenizer.chat_prompt([first, answer, second]) == prompt
    assert tokenizer.encode_chat([first, answer, second]) == tokenizer.encode(prompt)
    with pytest.raises(ModelError, match="has no role 'system'"):
        tokenizer.chat_prompt([{"role": "system", "content": "be kind"}])


def test_a_chatglm2_folder_generates(tmp_path):
    save_chatglm(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.model"):
        LLM(tmp_path, device="cpu")
    write_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert llm.tokenizer.encode("hello") == [ADDED + 1, ADDED + 3, PIECES.index("▁hello")]
    ids = llm.tokenizer.encode("h", add_special_tokens=False)
    (answer,) = llm.generate([ids], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(answer.token_ids) == 8


def test_files_without_byte_pair_encoding(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_sentencepiece(path)
    whole = path.read_bytes()
    for content in (b"", b"IQ== 0\nIg== 1\n", whole[:-3], whole[:1000]):  # the second: GLM-4's own format
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is not a SentencePiece model"):
            ChatGLMTokenizer(tmp_path)
    for settings in ({"kind": 1}, {"remove_spaces": 1}):
        write_sentencepiece(path, **settings)
        with pytest.raises(ModelError, match="is not byte-pair encoding of plain text"):
            ChatGLMTokenizer(tmp_path)


@pytest.mark.parametrize("add_space", [True, False])
def test_gguf_metadata_of_the_same(add_space):
    tokenizer = spm_tokenizer(add_space_prefix=add_space)
    if add_space:
        for text, pieces in ENCODED.items():
            if text != "<s>":  # encoded to the token here, since chat templates write it
                assert tokenizer.encode(text) == [1, *(PIECES.index(piece) for piece in pieces)]
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1]
    for text in ("hello world", "wé\n", "o  ho"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    without = spm_tokenizer(add_space_prefix=add_space, add_bos_token=False)
    assert without.encode(" hello" if not add_space else "hello") == [PIECES.index("▁hello")]


# ---- ChatGLM3 and GLM-4

ROLES = {role: ADDED + 5 + i for i, role in enumerate(("system", "user", "assistant", "observation"))}


def save_chatglm3(folder: Path) -> ChatGLMTokenizer:
    write_sentencepiece(folder / "tokenizer.model")
    settings = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatGLMTokenizer(folder)


def test_chatglm3s_roles_are_tokens(tmp_path):
    """A role, a line with the name of a tool, and the text."""
    tokenizer = save_chatglm3(tmp_path)
    messages = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "<|user|>"},  # text, not the token
        {"role": "assistant", "metadata": "lo", "content": "world"},
        {"role": "observation", "content": "o"},
    ]
    expected = [ADDED + 1, ADDED + 3]  # [gMASK] sop
    for message in messages:
        name = message.get("metadata", "")
        expected += [ROLES[message["role"]], *tokenizer.encode(name + "\n", add_special_tokens=False)]
        expected += tokenizer.encode(message["content"], add_special_tokens=False)
    assert tokenizer.encode_chat(messages) == [*expected, ROLES["assistant"]]
    assert tokenizer.eos_ids == (2, ROLES["user"], ROLES["observation"])
    assert tokenizer.decode(tokenizer.encode_chat(messages[:1])) == "\n hello"
    assert tokenizer.chat_prompt(messages[:1]) == "[gMASK]sop<|system|>\n hello<|assistant|>"


@pytest.mark.parametrize("generation", [2, 3])
def test_what_chatglms_chat_does_not_support(tmp_path, generation):
    tokenizer = save_chatglm3(tmp_path)
    if generation == 2:
        (tmp_path / "tokenizer_config.json").unlink()
        tokenizer = ChatGLMTokenizer(tmp_path)
    for messages, tools, reason in (
        ([{"role": "tool", "content": "hello"}], None, "has no role 'tool'"),
        ([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], None, "content is a string"),
        ([{"role": "user", "content": "hello"}], [{"type": "function"}], "has no tools"),
        ("hello", None, "messages must be a list"),
    ):
        with pytest.raises(ModelError, match=reason):
            tokenizer.encode_chat(messages, tools)


def test_glm4s_first_tokenizer_is_named(tmp_path):
    """A line per token. A tokenizer.json in the folder takes precedence."""
    folder_tokenizer(tmp_path / "whole")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for make in (FolderTokenizer, ChatGLMTokenizer):
        with pytest.raises(ModelError, match=r"tiktoken vocabulary, as GLM-4 .* add the tokenizer\.json"):
            make(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "whole" / "tokenizer.json").read_text())
    assert FolderTokenizer(tmp_path).encode("hi")


# ---- Folders


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The questions asked on standard input, which always answers yes."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *text: questions.extend(text or [""]) or "y")
    return questions


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "reference", [[None, "own.Own"], ["own.Own", None], ["someone/model--own.Own", None]]
)
def test_code_in_a_folder_is_never_run(tmp_path, asked, where, reference):
    save_model(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    edit_json(tmp_path / where, lambda values: values.update(auto_map={"AutoTokenizer": reference}))
    edit_json(tmp_path / "tokenizer_config.json", lambda values: values.update(tokenizer_class="Own"))
    expected = folder_tokenizer(tmp_path / "plain").encode("hi <s>")
    assert FolderTokenizer(tmp_path).encode("hi <s>") == expected
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    if where == "tokenizer_config.json":
        with pytest.raises(
            ModelError, match=r"code of that folder, which is never run; save it .* tokenizer\.json"
        ):
            FolderTokenizer(tmp_path)
    assert not ran.exists() and not asked


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\noid",
            r"tokenizer\.json .*git lfs pull",
        ),
        ("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("tokenizer.json", "[]", r"can't be loaded from tokenizer\.json"),
        ("tokenizer.json", "5", r"can't be loaded from tokenizer\.json"),
        ("tokenizer.json", "\0\1", r"can't be loaded from tokenizer\.json"),
        ("tokenizer.json", '{"model": 5}', r"can't be loaded from tokenizer\.json"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json must hold an object, got a list"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 5}', "can't be loaded"),
        ("special_tokens_map.json", "5", r"special_tokens_map\.json must hold an object"),
    ],
)
def test_files_that_are_something_else(tmp_path, file, content, reason):
    folder_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=reason) as error:
        FolderTokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_a_folder_in_place_of_a_file(tmp_path, name):
    folder_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ModelError, match=f"{name} is a folder"):
        FolderTokenizer(tmp_path)


# ---- GGUF files

FAMILIES = {
    "llama-bpe": "llama3 llama-v3 falcon3 pixtral",
    "qwen2": "deepseek-r1-qwen megrez kormo",
    "gpt-2": "phi-2 olmo exaone4",
    "smollm": "starcoder command-r refact",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "stablelm2": "hunyuan grok-2",
}
WORDS = ["12", "123", "'T", "'t", "\u0120 ", "\u0120x", "..", "\u010a\u010a"]
MERGES = ["1 2", "12 3", "' T", "' t", "\u0120 x", ". .", "\u010a \u010a"]
SPOKEN = "12345 it's  DON'T\n\n x... A1b é"


def with_merges(pre: str):
    tokens = [word.replace("\u0120 ", "<unused>") for word in WORDS]
    return gguf_tokenizer(*tokens, kind=NORMAL, pre=pre, merges=MERGES)


@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_an_enormous_token_id(tmp_path, place):
    """The tokenizers library would allocate a table for it, and abort the process if it could not."""
    folder_tokenizer(tmp_path, "<turn>")

    def change(values):
        if place == "vocabulary":
            values["model"]["vocab"]["a"] = 1 << 31
        else:
            values["added_tokens"][-1]["id"] = 1 << 40

    edit_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(ModelError, match=r"tokenizer\.json has a token of the id \d+; ids must be at most"):
        FolderTokenizer(tmp_path)


def test_text_that_looks_like_a_large_id(tmp_path):
    numbers = {'x": 4294967296, "': 259, "4294967296": 260}
    folder_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda values: values["model"]["vocab"].update(numbers))
    assert FolderTokenizer(tmp_path).decode([260]) == "4294967296"


@pytest.mark.parametrize("pre", FAMILIES)
def test_other_names_of_a_pre_tokenizer(pre):
    expected = with_merges(pre).encode(SPOKEN)
    assert [with_merges(name).encode(SPOKEN) for name in FAMILIES[pre].split()] == [expected] * len(
        FAMILIES[pre].split()
    )


def test_each_pre_tokenizer_splits_text_in_its_way():
    divided = {pre: tuple(with_merges(pre).encode(SPOKEN, add_special_tokens=False)) for pre in FAMILIES}
    assert len({divided[pre] for pre in ("llama-bpe", "qwen2", "gpt-2", "smollm")}) == 4
    one_by_one = with_merges("qwen2")
    assert one_by_one.encode("123") == [one_by_one.encode(digit)[0] for digit in "123"]
    assert len(with_merges("llama-bpe").encode("123", add_special_tokens=False)) == 1
    assert with_merges("qwen2").encode("e\u0301") == with_merges("qwen2").encode("é")
    assert with_merges("stablelm2").encode("e\u0301") != with_merges("stablelm2").encode("é")
    assert with_merges("llama3").encode("x")[0] == 256 != with_merges("dbrx").encode("x")[0]


def test_no_pre_tokenizer_is_a_warning_and_llama_cpps_default():
    with pytest.warns(UserWarning, match=r"model\.gguf names no pre-tokenizer .*convert it again"):
        unnamed = with_merges(None)
    assert unnamed.encode(SPOKEN) == with_merges("default").encode(SPOKEN)
    spaced = {"merges": ["\u0120 ."], "kind": NORMAL}
    assert gguf_tokenizer("\u0120.", pre="gpt-2", **spaced).encode(" .") == [259]
    assert (
        len(gguf_tokenizer("\u0120.", pre="default", **spaced).encode(" .")) == 2
    )  # punctuation is split off


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model": "bert"}, "GGUF tokenizer 'bert' is not supported, only 'llama' and 'gpt2'"),
        ({"model": 5}, "tokenizer.ggml.model must be a string, got 5"),
        ({"model": None}, "has no tokenizer"),
        ({"tokens": None}, "has no tokenizer"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens must be a list"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores has 1 values for 259 tokens"),
        ({"model": "llama", "scores": ["x"] * 259}, "tokenizer.ggml.scores must be a list"),
        ({"token_type": [NORMAL] * 5}, "tokenizer.ggml.token_type has 5 values for 259 tokens"),
        ({"token_type": CONTROL}, "tokenizer.ggml.token_type must be a list"),
        ({"merges": ["zz yy"]}, "merge 'zz yy' is not of two tokens"),
        ({"merges": ["a b"]}, "merge 'a b' is not of two tokens"),
        ({"merges": ["ab"]}, "merge 'ab' is not of two tokens"),
        ({"merges": [5]}, "tokenizer.ggml.merges must be a list"),
        ({"pre": 5}, "tokenizer.ggml.pre must be a string"),
        ({"pre": "new"}, "pre-tokenizer 'new' is not supported, only .*llama-bpe.*qwen2"),
        ({"eos_token_id": 259}, "tokenizer.ggml.eos_token_id is 259, but there are 259 tokens"),
        ({"bos_token_id": 10**9}, "tokenizer.ggml.bos_token_id is 1000000000, but"),
        ({"eot_token_id": -2}, "tokenizer.ggml.eot_token_id is -2, but"),
        ({"eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id must be an integer"),
        ({"add_bos_token": 5}, "tokenizer.ggml.add_bos_token must be true or false"),
        ({"chat_template": 5}, "tokenizer.chat_template must be a string"),
    ],
)
def test_inconsistent_metadata(values, reason):
    with pytest.raises(ModelError, match=reason) as error:
        gguf_tokenizer(**values)
    assert "model.gguf" in str(error.value) and "\n" not in str(error.value)


def test_large_vocabularies_load_at_once():
    """128,000 tokens; merges of a piece of a million characters are not searched."""
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in range(100, 260) for c in range(100, 200)]
    started = time.perf_counter()
    tokenizer = gguf_tokenizer(*words, kind=NORMAL)
    assert tokenizer.decode([259, 300]) == words[0] + words[41]
    with pytest.raises(ModelError, match="far too long"):
        spm_tokenizer("x" * 1_000_000, kind=NORMAL)
    assert time.perf_counter() - started < 10


# ---- Prompts


@pytest.mark.parametrize("make", [gguf_tokenizer, spm_tokenizer])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\ud800b", r"U\+D800 at character 1, a lone surrogate"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"U\+DCE9 at character 3"),
        (b"hi", "must be a string, got bytes"),
        (None, "must be a string, got NoneType"),
        (["hi"], "must be a string, got list"),
    ],
)
def test_invalid_text(make, text, reason):
    with pytest.raises(ModelError, match=reason):
        make().encode(text)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_text_that_cannot_fit_is_refused_before_it_is_encoded(tmp_path, kind):
    tokenizer = gguf_tokenizer() if kind == "gguf" else folder_tokenizer(tmp_path)
    started = time.perf_counter()
    with pytest.raises(ModelError, match="of 50000000 characters has far more tokens than the 1000 that fit"):
        tokenizer.encode("hello " * 8_333_333 + "!!", limit=1000)
    assert time.perf_counter() - started < 5  # all of it would take a minute and 15 GB


def test_text_that_fits_is_the_same_with_a_limit():
    """Even if it is one token for many characters."""
    wide = "x" * 64
    tokenizer = gguf_tokenizer(wide, kind=CONTROL)
    text = wide * 2000
    assert tokenizer.encode(text, limit=2500) == tokenizer.encode(text) == [259] * 2000
    short = "hello" * 1000
    assert tokenizer.encode(short, limit=10) == tokenizer.encode(short)  # the caller decides what is too long
