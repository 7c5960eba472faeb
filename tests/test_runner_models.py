"""The decoder and its loading against transformers, on small random checkpoints of every architecture."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from runner_models import (
    FAMILIES,
    make_model,
    random_tokens,
    randomize,
    runner_logits,
    save_chatglm,
    save_model,
    save_tokenizer,
    transformers_logits,
)
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2ForCausalLM,
)

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.checkpoint import open_checkpoint
from flashdecpp.loading.weights import load_weights
from flashdecpp.models import decoder as decoder_module
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.layers import DecoderLayer, ForwardPass, Norm
from flashdecpp.models.rope import Rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.9 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
PHI3_LONGROPE = {  # as in Phi-3's files
    "original_max_position_embeddings": 64,
    "rope_scaling": {key: LONGROPE[key] for key in ("short_factor", "long_factor")} | {"type": "longrope"},
}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "gemma2": ("gemma2", {}),
    "gemma2-low-caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-biases": ("gemma2", {"attention_bias": True, "head_dim": 16}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3-linear-rope": (
        "gemma3",
        {
            "sliding_window_pattern": 2,
            "rope_theta": 1e5,
            "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 24}),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.75, "head_dim": 32}),
    "phi3-longrope": ("phi3", PHI3_LONGROPE),
    "opt": ("opt", {}),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "opt-projections": ("opt", {"word_embed_proj_dim": 48}),
    "opt-no-biases": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "glm": ("glm", {}),
    "glm-no-biases": ("glm", {"attention_bias": False, "num_key_value_heads": 1}),
    "glm4": ("glm4", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt_length", [1, 50, 70])
def test_logits_match_transformers(tmp_path, case, prompt_length):
    """Prefill and 32 decode steps; two of the lengths go past position 64, where some scalings switch."""
    kind, overrides = CASES[case]
    model = save_model(tmp_path, kind, **overrides)
    llm = LLM(tmp_path, device="cpu", dtype=torch.float32)
    prompt, following = random_tokens(prompt_length, seed=1), random_tokens(32, seed=2)
    expected = transformers_logits(model, prompt, following)
    assert expected.std() > 0.3  # otherwise the comparison would mean little
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt_length", [20, 60, 80])
def test_dynamic_rope_grows_with_the_sequence(tmp_path, prompt_length):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = save_model(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert llm.max_len == 256
    prompt, following = random_tokens(prompt_length, seed=1), random_tokens(32, seed=2)
    expected = transformers_logits(model, prompt, following)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


CHUNKED = ["llama", "mistral-window", "qwen2-window", "gemma2", "gemma3-linear-rope", "phi3-longrope", "opt"]


@pytest.mark.parametrize("case", CHUNKED)
def test_long_prompts_are_prefilled_in_chunks(tmp_path, monkeypatch, case):
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", 32)
    kind, overrides = CASES[case]
    model = save_model(tmp_path, kind, **overrides)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    prompt, following = random_tokens(101, seed=1), random_tokens(4, seed=2)
    expected = transformers_logits(model, prompt, following)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        ("cpu", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_half_precision_stays_within_its_error(tmp_path, kind, device, dtype):
    """At most twice as far from float32 as transformers in the same dtype."""
    model = save_model(tmp_path, kind)
    if dtype == torch.float16 and kind.startswith("gemma"):
        with pytest.raises(ModelError, match="overflows float16; run it in bfloat16"):
            LLM(tmp_path, device=device, dtype=dtype)
        return
    prompt, following = random_tokens(40, seed=1), random_tokens(16, seed=2)
    exact = transformers_logits(model, prompt, following)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)  # .to(dtype) would round the rope too
    theirs = (transformers_logits(half.to(device), prompt, following) - exact).abs()
    ours = (runner_logits(LLM(tmp_path, device=device, dtype=dtype), prompt, following) - exact).abs()
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 1.25 * theirs.mean()


@pytest.mark.parametrize("case", [*FAMILIES, "opt-norm-after", "gemma3-linear-rope"])
def test_batches_give_the_same_tokens_as_transformers(tmp_path, case):
    """Sequences of different lengths are decoded together, each with its own positions, window and cache."""
    kind, overrides = CASES.get(case, (case, {}))
    model = save_model(tmp_path, kind, **overrides)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    prompts = [random_tokens(length, seed=length) for length in (1, 9, 40, 17)]
    answers = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    never = torch.zeros(llm.config.vocab)
    never[sorted(llm.config.eos_ids)] = -torch.inf
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = transformers_logits(model, prompt, answer.token_ids[:-1])
        assert (logits + never).argmax(dim=1).tolist() == answer.token_ids


@pytest.mark.parametrize("prompt_length", [1, 70])
def test_the_format_of_chatglm2s_authors(tmp_path, prompt_length):
    glm = save_chatglm(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert llm.config.architecture.name == "ChatGLMModel" and llm.config.dtype == torch.float16
    assert llm.config.eos_ids == (257,) and llm.max_len == 256
    prompt, following = random_tokens(prompt_length, seed=1), random_tokens(32, seed=2)
    expected = transformers_logits(glm, prompt, following)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"multi_query_attention": False},
        {"rmsnorm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"num_layers": None},
    ],
)
def test_unsupported_chatglm_settings_are_refused(tmp_path, settings):
    save_chatglm(tmp_path, **settings)
    (key,) = settings
    with pytest.raises(ModelError, match=rf"supported only with {key} (true|false)|config.json has no {key}"):
        LLM(tmp_path, device="cpu")


def test_the_text_model_of_a_multimodal_gemma_3(tmp_path):
    """Its text settings are nested, and its tensors have a different prefix."""
    text = make_model("gemma3").config.to_dict()
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    vision |= dict(image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = randomize(Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    prompt, following = random_tokens(50, seed=1), random_tokens(32, seed=2)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    expected = transformers_logits(model, prompt, following)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


def test_opt_files_in_the_hubs_layout(tmp_path):
    """One pytorch_model.bin, its tensors without the first prefix, and a tokenizer in two files."""
    model = save_model(tmp_path, "opt")
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"} | special
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    assert llm.tokenizer.decode(llm.tokenizer.encode("Hello, world")) == "Hello, world"
    prompt, following = random_tokens(20, seed=1), random_tokens(8, seed=2)
    expected = transformers_logits(model, prompt, following)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


def test_broken_torch_files(tmp_path):
    save_chatglm(tmp_path)
    path = tmp_path / "pytorch_model-00002-of-00002.bin"
    whole = path.read_bytes()
    for content in (b"", b"no weights", whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin can't be read: ") as caught:
            LLM(tmp_path, device="cpu")
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ModelError, match="lacks 1 of 2 weight files: pytorch_model-00002"):
        LLM(tmp_path, device="cpu")


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path):
    save_model(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not supported; supported are ") as caught:
        LLM(tmp_path, device="cpu")
    supported = str(caught.value).partition("supported are ")[2].split(", ")
    for _config, model, _own in FAMILIES.values():
        assert f"{model}ForCausalLM" in supported
    assert "ChatGLMModel" in supported


@pytest.mark.parametrize("setting", [{"use_bidirectional_attention": True}, {"attn_logit_softcapping": 50.0}])
def test_unsupported_gemma_3_settings_are_refused(tmp_path, setting):
    save_model(tmp_path, "gemma3", **setting)
    with pytest.raises(ModelError, match=f"Gemma3ForCausalLM is supported only with {next(iter(setting))}"):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_checkpoints_and_other_stored_dtypes(tmp_path, dtype):
    model = save_model(tmp_path / "whole", "qwen2").to(dtype)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for file in (tmp_path / "whole").glob("tokenizer*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    prompt, following = random_tokens(20, seed=1), random_tokens(8, seed=2)
    llm = LLM(sharded, device="cpu", dtype="float32")
    assert llm.config.dtype == dtype
    expected = transformers_logits(
        Qwen2ForCausalLM.from_pretrained(sharded, dtype="float32"), prompt, following
    )
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)


def test_config_files_of_transformers_4(tmp_path):
    """rope_theta next to rope_scaling, torch_dtype, eos as a list."""
    save_model(tmp_path, rope_parameters=LLAMA3)
    before = LLM(tmp_path, device="cpu").config
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": raw.pop("dtype")}
    raw["eos_token_id"] = [257, 258]
    path.write_text(json.dumps(raw))
    after = LLM(tmp_path, device="cpu").config
    torch.testing.assert_close(after.ropes[0].table(256), before.ropes[0].table(256))
    assert after.eos_ids == (257, 258)
    assert after.dtype == before.dtype


def test_rope_table_depends_only_on_the_position():
    for kind, scaling in (
        ("dynamic", {"factor": 4.0}),
        ("longrope", {k: v for k, v in LONGROPE.items() if k.endswith(("factor", "embeddings"))}),
    ):
        rope = Rope(16, 1e4, 64, kind, scaling)
        torch.testing.assert_close(rope.table(100)[:80], rope.table(80))
        assert rope.prompt_table(64) is None
        torch.testing.assert_close(rope.prompt_table(80)[-1], rope.table(80)[-1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_rounded_weights(tmp_path, quantize, tied):
    """Matches transformers with the rounded weights; the embedding and a tied lm_head stay unrounded."""
    model = save_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    llm = LLM(tmp_path, device="cpu", dtype="float32", quantize=quantize)
    weights, config = llm.decoder.weights, llm.config
    assert isinstance(weights.embed, torch.Tensor)
    assert isinstance(weights.lm_head, torch.Tensor) == tied
    assert set(weights.storage_formats.split(" + ")) == {quantize, "float32"}
    with torch.no_grad():
        for layer, rounded in zip(model.model.layers, weights.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = rounded.qkv.dense().split(config.qkv_rows)
            gate, up = rounded.gate_up.dense().chunk(2)
            pairs = [(attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)]
            pairs += [(attention.o_proj, rounded.o.dense()), (mlp.down_proj, rounded.down.dense())]
            for projection, values in [*pairs, (mlp.gate_proj, gate), (mlp.up_proj, up)]:
                step = (projection.weight.amax(1) - projection.weight.amin(1)).max() / 2 ** llm_bits(quantize)
                assert 0 < (projection.weight - values).abs().max() < step
                projection.weight.copy_(values)
        if not tied:
            model.lm_head.weight.copy_(weights.lm_head.dense())
    prompt, following = random_tokens(40, seed=1), random_tokens(8, seed=2)
    logits = runner_logits(llm, prompt, following)
    torch.testing.assert_close(logits, transformers_logits(model, prompt, following), rtol=1e-4, atol=1e-4)


def llm_bits(quantize: str) -> int:
    return int(quantize.removeprefix("int"))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("case", [*FAMILIES, "opt-norm-after"])
def test_rounded_weights_of_every_family(tmp_path, case, quantize):
    """Matches the same values stored in float32; embeddings and positions are not rounded."""
    kind, overrides = CASES.get(case, (case, {}))
    save_model(tmp_path, kind, **overrides)
    rounded, exact = (LLM(tmp_path, device="cpu", dtype="float32", quantize=q) for q in (quantize, "none"))
    assert rounded.decoder.weights.nbytes < exact.decoder.weights.nbytes

    def dense(part):
        values = {name: value.dense() for name, value in vars(part).items() if hasattr(value, "dense")}
        return dataclasses.replace(part, **values), len(values)

    layers, counts = zip(*(dense(layer) for layer in rounded.decoder.weights.layers), strict=True)
    assert set(counts) == {4}
    weights, _ = dense(rounded.decoder.weights)
    exact.decoder = Decoder(exact.config, dataclasses.replace(weights, layers=layers), exact.max_len)
    prompt, following = random_tokens(40, seed=1), random_tokens(8, seed=2)
    logits, expected = (runner_logits(llm, prompt, following) for llm in (rounded, exact))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_part_of_a_layer_can_be_replaced(tmp_path):
    """By any function from residual stream to residual stream: here two halves of a feed-forward network
    whose results are summed before the residual add, as across two devices."""
    save_model(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    config, weights = llm.config, llm.decoder.weights.layers[1]
    prompt, following = random_tokens(40, seed=1), random_tokens(3, seed=2)
    expected = runner_logits(llm, prompt, following)

    def halves(stream: torch.Tensor, forward: ForwardPass) -> torch.Tensor:
        gate, up = Norm.of(config, weights.ffn_norm)(stream).matmul(weights.gate_up.t()).chunk(2, dim=1)
        h = torch.nn.functional.silu(gate) * up
        parts = zip(h.chunk(2, dim=1), weights.down.chunk(2, dim=1), strict=True)
        return stream.add_(sum(part @ columns.t() for part, columns in parts))

    llm.decoder.layers[1] = DecoderLayer(llm.decoder.layers[1].attention, halves)
    torch.testing.assert_close(runner_logits(llm, prompt, following), expected, rtol=1e-4, atol=1e-4)
    llm.decoder.layers[1] = DecoderLayer(llm.decoder.layers[1].attention, lambda stream, _: stream)
    assert (runner_logits(llm, prompt, following) - expected).abs().max() > 0.1


def test_columns_that_do_not_fill_groups_stay_unquantized(tmp_path):
    save_model(tmp_path, intermediate_size=72)
    weights = LLM(tmp_path, device="cpu", quantize="int4").decoder.weights
    assert isinstance(weights.layers[0].down, torch.Tensor)
    assert weights.layers[0].gate_up.bits == 4


def test_quantized_weights_have_the_planned_size(tmp_path):
    save_model(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    sizes = []
    for quantize in ("none", "int8", "int4"):
        plan = checkpoint.plan.quantized(quantize, checkpoint.source)
        weights = load_weights(plan, checkpoint.source, torch.device("cpu"), torch.bfloat16)
        assert weights.nbytes == plan.nbytes(torch.bfloat16)
        sizes.append(weights.nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert LLM(tmp_path, device="cpu").decoder.weights.nbytes == sizes[0]  # auto rounds nothing


def test_weights_are_stored_once(tmp_path):
    """Loaded weights have exactly the planned size and share nothing with the files."""
    save_model(tmp_path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path)
    weights = load_weights(checkpoint.plan, checkpoint.source, torch.device("cpu"), torch.bfloat16)
    assert weights.lm_head is weights.embed
    assert weights.nbytes == checkpoint.plan.nbytes(torch.bfloat16)
    packed = [getattr(weights.layers[0], field.name) for field in dataclasses.fields(weights.layers[0])]
    assert all(tensor is None or tensor.is_contiguous() for tensor in packed)
