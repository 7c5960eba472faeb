"""GGUF files written from a small model give the results of that model."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from runner_models import (
    CHAT_TEMPLATE,
    byte_tokens,
    random_tokens,
    runner_logits,
    save_model,
    transformers_logits,
)
from transformers import AutoTokenizer

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.gguf import GGUFFile

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_gguf(
    path: Path,
    model,
    architecture: str = "llama",
    quantization: Q = Q.F32,
    pre: str = "smollm",
    rope_factors=None,
    others: dict[str, Q] | None = None,
    writer: dict[str, int] | None = None,
) -> None:
    """As llama.cpp's converter does, permuted rows of q and k included. `others`: the types of some parts;
    `writer`: options of the writer.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture, **(writer or {}))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = byte_tokens() + [f"<unused{i}>" for i in range(config.vocab_size - len(byte_tokens()))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_merges([])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(CHAT_TEMPLATE)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name and architecture == "llama":
                halves = values.reshape(count, 2, -1, *values.shape[1:])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        kind = quantization if values.ndim == 2 else Q.F32
        kind = next((other for part, other in (others or {}).items() if part in name), kind)
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name.replace("model.layers.", "blk."), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantization", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_logits_equal_those_of_the_model(tmp_path, architecture, overrides, quantization):
    model = save_model(tmp_path / "hf", architecture, **overrides)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, architecture, quantization)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # rounded as in the file
                packed = gguf.quants.quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.tensor(gguf.quants.dequantize(packed, quantization)))
    prompt, following = random_tokens(20, seed=1), random_tokens(8, seed=2)
    expected = transformers_logits(model, prompt, following)
    for quantize in ("auto", "none"):  # the op on stored weights, and dequantized weights
        llm = LLM(path, device="cpu", dtype="float32", quantize=quantize)
        logits = runner_logits(llm, prompt, following)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        stored = {Q.Q8_0: "int8", Q.Q4_0: "int4", Q.Q4_1: "int4"}.get(quantization, "float32")
        assert llm.decoder.weights.storage_formats == (stored if quantize == "auto" else "float32")


@pytest.mark.parametrize("quantization", [Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_stored_blocks_are_used_unchanged(tmp_path, quantization):
    """Every weight equals gguf's own dequantization, in float32 with the same rounding."""
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"), quantization=quantization)
    file = GGUFFile(tmp_path / "m.gguf")
    for name, shape in file.shapes.items():
        if len(shape) == 2:
            rows = file.quantized_rows(name, 3, shape[0] - 1)
            torch.testing.assert_close(
                rows.dense(), file.rows(name, 3, shape[0] - 1), rtol=2**-23, atol=0, msg=name
            )
            assert (
                rows.nbytes == (shape[0] - 4) * gguf.quants.quant_shape_to_byte_shape(shape, quantization)[-1]
            )


def test_tensors_of_one_weight_in_different_formats(tmp_path):
    """Q4_0 stacked with Q4_1 gets offsets; 4 bits with 8 bits are dequantized."""
    model = save_model(tmp_path / "hf")
    kinds = {"attn_q": Q.Q4_0, "attn_k": Q.Q4_1, "attn_v": Q.Q4_0, "ffn_gate": Q.Q4_0, "ffn_up": Q.Q8_0}
    write_gguf(tmp_path / "m.gguf", model, quantization=Q.F32, others=kinds)
    stored, dense = (
        LLM(tmp_path / "m.gguf", device="cpu", dtype="float32", quantize=quantize).decoder.weights
        for quantize in ("auto", "none")
    )
    for layer, expected in zip(stored.layers, dense.layers, strict=True):
        assert layer.qkv.bits == 4
        torch.testing.assert_close(layer.qkv.dense(), expected.qkv)
        assert torch.equal(layer.gate_up, expected.gate_up)
    assert torch.equal(stored.embed, dense.embed)


def test_llama3_rope_is_a_tensor_of_factors(tmp_path):
    model = save_model(tmp_path / "hf", rope_parameters=LLAMA3)
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    write_gguf(tmp_path / "m.gguf", model, rope_factors=plain / model.model.rotary_emb.inv_freq.numpy())
    prompt, following = random_tokens(90, seed=1), random_tokens(8, seed=2)
    logits = runner_logits(LLM(tmp_path / "m.gguf", device="cpu", dtype="float32"), prompt, following)
    torch.testing.assert_close(logits, transformers_logits(model, prompt, following), rtol=1e-4, atol=1e-4)


def test_tensors_are_read_in_chunks(tmp_path, monkeypatch):
    from flashdecpp.loading import weights

    model = save_model(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model, quantization=Q.Q8_0)

    def load(quantize: str) -> list[torch.Tensor]:
        llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32", quantize=quantize)
        held = llm.decoder.weights
        matrices = (held.embed, held.layers[1].qkv, held.layers[1].down)
        return [matrix.dense() if quantize == "auto" else matrix for matrix in matrices]

    for quantize in ("auto", "none"):
        whole = load(quantize)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "CHUNK_BYTES", 1500)
            pieces = load(quantize)
        for a, b in zip(pieces, whole, strict=True):
            assert torch.equal(a, b)


def test_truncated_files(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, save_model(tmp_path / "hf"))
    whole = path.read_bytes()
    for size in (0, 3, 20, 1000, 6000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"m\.gguf is (truncated|empty)") as caught:
            LLM(path, device="cpu")
        assert "\n" not in str(caught.value)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ModelError, match="is not a GGUF file"):
        LLM(path, device="cpu")


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(key: str, kind: int, data: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", kind) + data


def gguf_tensor(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return gguf_text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf_file(
    *values: bytes, tensors: Sequence[bytes] = (), counts=None, version: bytes = b"\3\0\0\0"
) -> bytes:
    """A header, with other counts of tensors and values than it has where those are given, and 256 bytes."""
    counts = counts or (len(tensors), len(values))
    head = b"GGUF" + version + struct.pack("<QQ", *counts) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(256)


ALIGNMENT = "general.alignment"
HEADERS = {
    "no dimensions": (gguf_file(tensors=[gguf_tensor("t", [])]), "tensor t has 0 dimensions"),
    "a thousand dimensions": (gguf_file(tensors=[gguf_tensor("t", [1] * 1000)]), "has 1000 dimensions"),
    "no elements": (gguf_file(tensors=[gguf_tensor("t", [0, 4])]), "tensor t .* is empty"),
    "too many elements": (gguf_file(tensors=[gguf_tensor("t", [2**40, 2**40])]), "is truncated"),
    "an offset that wraps": (
        gguf_file(tensors=[gguf_tensor("t", [4], 0, 2**64 - 32)]),
        "must be at offset 0",
    ),
    "an odd offset": (gguf_file(tensors=[gguf_tensor("t", [4], 0, 1)]), "must be at offset 0.*is at 1"),
    "an overlap": (
        gguf_file(tensors=[gguf_tensor("t", [40]), gguf_tensor("u", [4], 0, 32)]),
        "tensor u must be at offset 160",
    ),
    "a gap": (
        gguf_file(tensors=[gguf_tensor("t", [4]), gguf_tensor("u", [4], 0, 64)]),
        "tensor u must be at offset 32",
    ),
    "a name twice": (gguf_file(tensors=[gguf_tensor("t", [4])] * 2), "has the tensor t twice"),
    "an unknown type": (gguf_file(tensors=[gguf_tensor("t", [4], 99)]), "tensor t has the unknown type 99"),
    "half a block": (gguf_file(tensors=[gguf_tensor("t", [40, 2], 2)]), "not whole blocks of 32"),
    "2^60 tensors": (gguf_file(counts=(2**60, 0)), "claims to have 1152921504606846976 tensors"),
    "2^60 values": (gguf_file(counts=(0, 2**60)), "claims more than 4194304 metadata values"),
    "2^63 items": (
        gguf_file(gguf_value("a", 9, struct.pack("<IQ", 0, 2**63))),
        "claims more than 4194304 metadata values",
    ),
    "2^40 texts": (gguf_file(gguf_value("a", 9, struct.pack("<IQ", 8, 2**40))), "claims more than 4194304"),
    "a text of 2^62 bytes": (gguf_file(gguf_value("a", 8, struct.pack("<Q", 2**62))), "is truncated"),
    "arrays in arrays": (
        gguf_file(gguf_value("a", 9, struct.pack("<IQ", 9, 1) * 9999)),
        "nests arrays more than 4 deep",
    ),
    "an unknown kind of value": (gguf_file(gguf_value("a", 99, b"")), "has the unknown type 99"),
    "a key twice": (gguf_file(*[gguf_value("a", 7, b"\1")] * 2), "has the key a twice"),
    "alignment 0": (gguf_file(gguf_value(ALIGNMENT, 4, bytes(4))), "must be a power of two, got 0"),
    "alignment 24": (gguf_file(gguf_value(ALIGNMENT, 4, b"\30\0\0\0")), "must be a power of two, got 24"),
    "alignment x": (gguf_file(gguf_value(ALIGNMENT, 8, gguf_text("x"))), "must be an integer, got 'x'"),
    "version 1": (gguf_file(version=b"\1\0\0\0"), "is GGUF version 1"),
    "big-endian": (gguf_file(version=b"\0\0\0\3"), "is a big-endian GGUF file"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_are_not_trusted(tmp_path, header):
    content, said = HEADERS[header]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(ModelError, match=rf"m\.gguf.*{said}") as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value) and time.process_time() - begin < 1


@pytest.mark.parametrize("item", [0, 8, 9])
def test_a_header_does_not_extend_through_a_large_file(tmp_path, item):
    """An array that fits into the file but that no model needs is refused before it is read."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file(gguf_value("a", 9, struct.pack("<IQ", item, 2**33))))
    os.truncate(path, 1 << 40)
    begin = time.process_time()
    with pytest.raises(ModelError, match="claims more than 4194304 metadata values"):
        GGUFFile(path)
    assert time.process_time() - begin < 1


def read_values(path: Path, **values: tuple[int, bytes]) -> GGUFFile:
    path.write_bytes(gguf_file(*(gguf_value(key, kind, data) for key, (kind, data) in values.items())))
    return GGUFFile(path)


def test_metadata_is_checked_by_type(tmp_path):
    metadata = read_values(
        tmp_path / "m.gguf",
        number=(4, struct.pack("<I", 2)),
        real=(6, struct.pack("<f", 0.5)),
        nan=(6, struct.pack("<f", float("nan"))),
        text=(8, gguf_text("x")),
        flag=(7, b"\1"),
        numbers=(9, struct.pack("<IQ2I", 4, 2, 2, 3)),
    ).metadata
    assert metadata.typed("number", int) == metadata.typed("number", float) == 2
    assert metadata.typed("real", float) == 0.5 and metadata.typed("text", str) == "x"
    assert metadata.typed("flag", bool) is True
    assert metadata.listed("numbers", int) == metadata.listed("numbers", float) == [2, 3]
    assert metadata.typed("gone", int, 5) == 5 and metadata.listed("gone", str, None) is None
    for key, kind, said in (
        ("real", int, "real must be an integer, got 0.5"),
        ("flag", int, "flag must be an integer, got True"),
        ("text", int, "text must be an integer, got 'x'"),
        ("text", float, "text must be a finite number"),
        ("nan", float, "nan must be a finite number"),
        ("number", str, "number must be a string, got 2"),
        ("number", bool, "number must be true or false, got 2"),
        ("numbers", int, r"numbers must be an integer, got \[2, 3\]"),
        ("gone", int, "has no gone"),
    ):
        with pytest.raises(ModelError, match=rf"m\.gguf.*{said}"):
            metadata.typed(key, kind)
    for key in ("numbers", "text"):
        with pytest.raises(ModelError, match=f"{key} must be a list of strings"):
            metadata.listed(key, str)


def test_a_gguf_file_is_recognized_by_its_first_bytes(tmp_path):
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"))
    (tmp_path / "m.gguf").rename(tmp_path / "sha256-0123")
    assert GGUFFile.is_gguf(tmp_path / "sha256-0123")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").touch()
    for other in ("pipe.gguf", "empty.gguf", "nowhere.gguf", "hf", "hf/config.json"):
        assert not GGUFFile.is_gguf(tmp_path / other)


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A model in three files."""
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"), writer={"split_max_tensors": 13})
    found = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert all(path.exists() for path in found)
    return found


def test_a_model_in_several_files_loads_from_any(tmp_path, parts):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    ids = random_tokens(9)
    answers = {
        LLM(path, device="cpu", dtype="float32").generate([ids], params)[0].token_ids.__repr__()
        for path in (*parts, tmp_path / "hf")
    }
    assert len(answers) == 1


def test_missing_and_foreign_parts_are_named(tmp_path, parts):
    def refused(path: Path, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            LLM(path, device="cpu")

    parts[1].rename(tmp_path / "kept")
    refused(parts[0], r"lacks 1 of the model's 3 parts: m-00002-of-00003\.gguf")
    shutil.copy(parts[2], parts[1])
    refused(parts[0], r"m-00002-of-00003\.gguf is not part 2 of 3, as its name says")
    (tmp_path / "kept").rename(tmp_path / "second.gguf")
    refused(
        tmp_path / "second.gguf", r"second\.gguf is part 2 of 3: it must be called NAME-00002-of-00003\.gguf"
    )


@pytest.mark.parametrize("kind", [Q.Q8_K, Q.Q8_1, Q.F64, Q.I32])
def test_types_that_cannot_be_dequantized_are_refused_before_loading(tmp_path, monkeypatch, kind):
    from flashdecpp.engine import llm as llm_module

    model = save_model(tmp_path / "hf", hidden_size=256, intermediate_size=256)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    quantize = gguf.quants.quantize

    def zeros(values: np.ndarray, wanted: Q) -> np.ndarray:
        shape = (values.shape[0], values.shape[-1] // block * block_bytes)
        return np.zeros(shape, np.uint8) if wanted == kind else quantize(values, wanted)

    monkeypatch.setattr(gguf.quants, "quantize", zeros)
    write_gguf(tmp_path / "m.gguf", model, others={"ffn_up": kind})
    monkeypatch.setattr(llm_module, "load_weights", None)
    with pytest.raises(ModelError, match=rf"ffn_up\.weight has the type {kind.name}, which"):
        LLM(tmp_path / "m.gguf", device="cpu")


def test_unsupported_files(tmp_path):
    model = save_model(tmp_path / "hf")
    path = tmp_path / "m.gguf"
    write_gguf(path, model, "mamba")
    with pytest.raises(ModelError, match="'mamba' is not supported; supported are llama, qwen2, qwen3"):
        LLM(path, device="cpu")
    write_gguf(path, model, pre="viking")
    with pytest.raises(ModelError, match="pre-tokenizer 'viking' is not supported"):
        LLM(path, device="cpu")


def test_the_tokenizer_of_the_file(tmp_path):
    """The same ids as the folder's tokenizer; <s> only if the file asks for it."""
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"))
    ours, theirs = (
        LLM(tmp_path / "m.gguf", device="cpu").tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for text in ("Hello, world", "1234 apples", "naïve 🚀", "<s>hi</s>"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.eos_ids == (257,)
    assert ours.chat_prompt([{"role": "user", "content": "hi"}]) == "<user>hi\n<assistant>"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_pre_tokenizer_gives_the_text_back(tmp_path, pre):
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"), pre=pre)
    tokenizer = LLM(tmp_path / "m.gguf", device="cpu").tokenizer
    text = "It's 12345 o'clock,\n\n  isn't it?  Ünïcödé 日本語 🚀\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hi")[0] == (256 if pre == "llama-bpe" else tokenizer.encode("h")[-1])


def test_a_gguf_model_generates(tmp_path):
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"))
    folder, file = (LLM(p, device="cpu", dtype="float32") for p in (tmp_path / "hf", tmp_path / "m.gguf"))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    ids = random_tokens(9)
    assert file.generate([ids], params)[0].token_ids == folder.generate([ids], params)[0].token_ids


def test_metadata_equals_the_gguf_package(tmp_path):
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hf"))
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value
    assert {t.name: tuple(int(n) for n in t.shape[::-1]) for t in theirs.tensors} == ours.shapes
