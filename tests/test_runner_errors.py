"""Errors of models, prompts and settings: one clear line each, before any long work."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from runner_models import random_tokens, save_model

from flashdecpp import LLM, ModelError, OutOfMemory, SamplingParams
from flashdecpp.engine import llm as llm_module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose weights must not be loaded: errors are found before."""

    def load_weights(*_):
        raise AssertionError("the weights were loaded")

    save_model(tmp_path)
    monkeypatch.setattr(llm_module, "load_weights", load_weights)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def refused(folder, match, kind=ModelError, **arguments):
    with pytest.raises(kind, match=match) as caught:
        LLM(folder, **({"device": "cpu"} | arguments))
    assert "\n" not in str(caught.value)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for size in (0, 4, 8, 8 + header // 2, 8 + header, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, r"model\.safetensors is (truncated|empty)")
    path.write_bytes(b"this is no safetensors file at all")
    refused(folder, "is not a safetensors file")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"has neither model\.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"lacks 2 of 2 weight files: model-1\.safetensors, model-2\.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "not a valid index of weight files")


def test_missing_and_misshapen_tensors(folder):
    edit_config(folder, num_hidden_layers=4)
    refused(folder, r"lacks the tensors model\.layers\.3\.")
    edit_config(folder, num_hidden_layers=3, intermediate_size=100)
    refused(folder, r"tensor model\.layers\.0\.mlp\.\w+\.weight has the shape .* asks for")


def test_missing_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, r"has no tokenizer\.json")


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "the tokenizer in .* can't be loaded")


def test_unsupported_architecture(folder):
    edit_config(folder, architectures=["MambaForCausalLM"])
    refused(folder, "MambaForCausalLM is not supported; supported are LlamaForCausalLM, Mistral.*, Qwen2")
    edit_config(folder, architectures=None, model_type=None)
    refused(folder, "architecture unknown is not supported")


def test_other_unsupported_configurations(folder):
    edit_config(folder, hidden_act="tanh")
    refused(folder, "hidden_act 'tanh' is not supported")
    edit_config(folder, hidden_act="silu", quantization_config={"quant_method": "gptq"})
    refused(folder, r"is quantized \(gptq\)")
    edit_config(folder, quantization_config=None, head_dim=12)
    refused(folder, "head_dim must be a multiple of 8")


def test_broken_or_missing_config(folder):
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json")


def test_paths_that_are_not_models(folder):
    refused(folder / "nowhere", "does not exist: give a model folder, a .gguf file or 'demo'")
    refused(folder / "tokenizer.json", "neither a model folder nor a .gguf file")


def test_settings(folder):
    refused(folder, "dtype on cpu must be one of float16, bfloat16, float32, got int8", dtype="int8")
    refused(folder, "dtype on cpu must be one of", dtype="quarter")
    refused(folder, "device 'tpu9' is not known", device="tpu9")
    refused(folder, "device must be cpu or cuda", device="meta")
    refused(folder, "max_len must be from 1 to the model's context of 256, got 257", max_len=257)
    refused(folder, "quantize must be one of auto, none, int8, int4, got int5", quantize="int5")
    refused(folder, "max_batch must be 1 or more, got 0", max_batch=0)
    refused(folder, "cache_tokens must be 1 or more, got 0", cache_tokens=0)
    if not torch.cuda.is_available():
        refused(folder, "torch finds no GPU here", device="cuda")


def test_cache_out_of_memory_before_loading(folder):
    refused(folder, "KV cache of .* don't fit cpu, where .* are free", OutOfMemory, cache_tokens=10**12)


def test_weights_out_of_memory(tmp_path, monkeypatch):
    from flashdecpp.loading import weights

    save_model(tmp_path)
    monkeypatch.setattr(weights, "available_bytes", lambda device: 1000)
    refused(tmp_path, "the weights need .* on cpu, where .* are free", OutOfMemory)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return LLM(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_prompts_that_do_not_fit(llm, call):
    for prompt, match in (
        (random_tokens(256), "256 tokens, which leaves no room for an answer within 256: shorten it"),
        (random_tokens(300), "the prompt has 300 tokens"),
        ([], "the prompt is empty"),
        ([5, 272], "token id 272 is outside the vocabulary of 272"),
        ([-1], "token id -1 is outside the vocabulary"),
    ):
        with pytest.raises(ModelError, match=match):
            llm.generate([prompt]) if call == "generate" else llm.stream(prompt)


def test_a_bad_prompt_stops_the_batch_before_it_starts(llm):
    llm.stats = None
    with pytest.raises(ModelError, match="the prompt has 300 tokens"):
        llm.generate([random_tokens(5), random_tokens(300)])
    assert llm.stats is None


def test_params_and_prompts_must_pair_up(llm):
    with pytest.raises(ModelError, match="2 prompts need as many SamplingParams, got 1"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_cache_out_of_memory_in_a_call(llm, monkeypatch):
    from flashdecpp.engine import engine
    from flashdecpp.models import kv_cache

    for module in (kv_cache, engine):
        monkeypatch.setattr(module, "available_bytes", lambda device: 10_000)
    with pytest.raises(OutOfMemory, match=r"a KV cache of \d+ tokens needs .* on cpu, where .* are free"):
        llm.generate("hello", SamplingParams(max_tokens=200))
    monkeypatch.undo()
    assert llm.generate("hello")[0].token_ids  # still usable


def test_a_fixed_cache_too_small_for_the_call(llm, tmp_path):
    save_model(tmp_path)
    small = LLM(tmp_path, device="cpu", dtype="float32", cache_tokens=32)
    with pytest.raises(OutOfMemory, match="may need 208 tokens of KV cache, which has 32"):
        small.generate("hello", SamplingParams(max_tokens=200))
    assert len(small.generate("hello", SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids) == 20


def test_chat_without_a_template(folder, llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer._tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
