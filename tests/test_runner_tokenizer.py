"""SentencePiece's byte-pair encoding, out of ChatGLM2's file and out of GGUF metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from runner_models import save_chatglm

from flashdecpp.runner import LLM, ModelError, SamplingParams
from flashdecpp.runner.chatglm_tokenizer import ChatGLMTokenizer
from flashdecpp.runner.gguf_header import Metadata
from flashdecpp.runner.gguf_tokenizer import GGUFTokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGED = ["▁h", "el", "lo", "▁hel", "▁hello", "▁w", "or"]  # the first one first
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *MERGED, *"▁helowrd,"]
KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(MERGED) + 9)]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(MERGED) + 9)]
ENCODED = {  # by hand: the pair with the highest score is merged, again and again
    "hello": ["▁hello"],
    "hello world": ["▁hello", "▁w", "or", "l", "d"],
    "hell, helo": ["▁hel", "l", ",", "▁hel", "o"],
    "o  ho": ["▁", "o", "▁", "▁h", "o"],
    "wé\n": ["▁w", "<0xC3>", "<0xA9>", "<0x0A>"],
    "<s>": ["▁", "<0x3C>", "<0x73>", "<0x3E>"],  # no special token, only text
}
BEHIND = len(PIECES)  # the first id of the tokens that ChatGLM2 puts behind its pieces


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffers message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def write_model(path: Path, *, kind: int = 2, add_space: int = 1, remove_spaces: int = 0) -> None:
    pieces = zip(PIECES, SCORES, KINDS, strict=True)
    whole = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + field(3, its)) for piece, score, its in pieces
    )
    whole += field(2, field(3, kind) + field(35, 1))
    whole += field(3, field(1, b"identity") + field(2, b"") + field(3, add_space) + field(4, remove_spaces))
    path.write_bytes(whole)


def as_file(values: dict[str, Any]) -> Metadata:
    metadata = Metadata(Path("model.gguf"))
    metadata.update(values)
    return metadata


@pytest.fixture
def tokenizer(tmp_path) -> ChatGLMTokenizer:
    write_model(tmp_path / "tokenizer.model")
    return ChatGLMTokenizer(tmp_path)


@pytest.mark.parametrize("text", ENCODED)
def test_pairs_are_merged_by_their_scores(tokenizer, text):
    expected = [PIECES.index(piece) for piece in ENCODED[text]]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [BEHIND + 1, BEHIND + 3, *expected]  # [gMASK] sop
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 1, *expected, 2, BEHIND + 4]) == text
    assert tokenizer.eos_ids == (2,)


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
    write_model(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert llm.tokenizer.encode("hello") == [BEHIND + 1, BEHIND + 3, PIECES.index("▁hello")]
    ids = llm.tokenizer.encode("h", add_special_tokens=False)
    (answer,) = llm.generate([ids], SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(answer.token_ids) == 8


def test_files_that_are_no_byte_pair_encoding(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_model(path)
    whole = path.read_bytes()
    for content in (b"", b"IQ== 0\nIg== 1\n", whole[:-3], whole[:1000]):  # the second: GLM-4's own format
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is not a SentencePiece model"):
            ChatGLMTokenizer(tmp_path)
    for settings in ({"kind": 1}, {"remove_spaces": 1}):
        write_model(path, **settings)
        with pytest.raises(ModelError, match="does not hold byte-pair encoding of plain text"):
            ChatGLMTokenizer(tmp_path)


@pytest.mark.parametrize("add_space", [True, False])
def test_gguf_metadata_of_the_same(add_space):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": add_space,
    }
    tokenizer = GGUFTokenizer(as_file(metadata))
    if add_space:
        for text, pieces in ENCODED.items():
            if text != "<s>":  # read as the token here: chat templates write it
                assert tokenizer.encode(text) == [1, *(PIECES.index(piece) for piece in pieces)]
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1]
    for text in ("hello world", "wé\n", "o  ho"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    without = GGUFTokenizer(as_file(metadata | {"tokenizer.ggml.add_bos_token": False}))
    assert without.encode(" hello" if not add_space else "hello") == [PIECES.index("▁hello")]
