"""Small random checkpoints for the runner's tests, and transformers' results for them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flashdecpp import LLM
from flashdecpp.models.kv_cache import KVCache, blocks_for

VOCAB = 272  # 256 bytes, three special tokens, and some that never occur in text
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # Much larger than in a real model, so that logits differ, also between positions.
    initializer_range=0.15,
    bos_token_id=256,
    eos_token_id=257,
)
# kind -> transformers' class names before "Config" and "ForCausalLM", and settings that SIZES lacks, or must
# drop (None)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "llama": ("Llama", "Llama", {}),
    "mistral": ("Mistral", "Mistral", {}),
    "qwen2": ("Qwen2", "Qwen2", {}),
    "qwen3": ("Qwen3", "Qwen3", {"head_dim": 24}),
    "gemma2": (
        "Gemma2",
        "Gemma2",
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 100,
            "sliding_window": 24,
            "attn_implementation": "eager",  # older versions chose SDPA, which drops the softcap
        },
    ),
    "gemma3": ("Gemma3Text", "Gemma3", {"head_dim": 256, "query_pre_attn_scalar": 100, "sliding_window": 24}),
    "phi3": ("Phi3", "Phi3", {"pad_token_id": 258}),
    "opt": (
        "OPT",
        "OPT",
        {"intermediate_size": None, "num_key_value_heads": None, "ffn_dim": 96, "init_std": 0.15},
    ),
    "glm": ("Glm", "Glm", {"head_dim": 16, "pad_token_id": 258}),
    "glm4": ("Glm4", "Glm4", {"head_dim": 16, "pad_token_id": 258}),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the process-wide default, as a program that embeds the runner might."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(folder: Path, **settings: Any) -> LLM:
    """On the CPU in float32, where answers are bitwise the same whatever else is in the batch."""
    return LLM(folder, **({"device": "cpu", "dtype": "float32"} | settings))


def make_model(kind: str = "llama", **overrides) -> PreTrainedModel:
    """A random model in float32."""
    torch.manual_seed(0)
    config_name, model_name, own = FAMILIES[kind]
    settings = {key: value for key, value in (SIZES | own).items() if value is not None} | overrides
    config = getattr(transformers, config_name + "Config")(**settings)
    return randomize(getattr(transformers, model_name + "ForCausalLM")(config))


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Makes biases and norms random: zeros and ones would hide a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_model(folder: Path, kind: str = "llama", *, shard: str = "1GB", **overrides) -> PreTrainedModel:
    """Saves a random model and a byte tokenizer in `folder`; returns the model in float32."""
    model = make_model(kind, **overrides)
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model


def save_chatglm(folder: Path, **settings) -> PreTrainedModel:
    """A GLM model in the format of ChatGLM2's authors, with renamed settings and packed, renamed tensors.

    transformers no longer has that format, but has the same math under other names.
    """
    glm = make_model("glm", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    config = glm.config
    settings = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "eos_token_id": 257,
        "ffn_hidden_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": 2,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    } | settings
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "model.layers": "transformer.encoder.layers",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    state = {"transformer.rotary_pos_emb.inv_freq": torch.zeros(4)}
    theirs = glm.state_dict()
    for index, kind in itertools.product(range(config.num_hidden_layers), ("weight", "bias")):
        parts = [theirs.pop(f"model.layers.{index}.self_attn.{part}_proj.{kind}") for part in "qkv"]
        state[f"transformer.encoder.layers.{index}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
    for name, tensor in theirs.items():
        for ours, original in names.items():
            name = name.replace(ours, original)
        state[name] = tensor
    halves = dict(list(state.items())[:9]), dict(list(state.items())[9:])
    index = {}
    for number, half in enumerate(halves, start=1):
        torch.save(half, folder / f"pytorch_model-0000{number}-of-00002.bin")
        index |= dict.fromkeys(half, f"pytorch_model-0000{number}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(settings))
    save_tokenizer(folder)
    return glm


def byte_tokens() -> list[str]:
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]


def save_tokenizer(folder: Path) -> None:
    tokens = byte_tokens()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def runner_logits(llm: LLM, prompt: list[int], following: list[int]) -> torch.Tensor:
    """The runner's logits after the prompt and after each token that follows: [1 + len(following), vocab]."""
    decoder = llm.decoder
    blocks = blocks_for(len(prompt) + len(following))
    cache = KVCache.for_model(decoder.config, blocks, decoder.device, decoder.dtype)
    with decoder.device:
        # Out of order, to expose mistakes in the use of the table.
        table = torch.arange(blocks - 1, -1, -1, dtype=torch.int32)[None]
        rows = [decoder.prefill(torch.tensor(prompt), cache, table)]
        for i, token in enumerate(following):
            seq_lens = torch.tensor([len(prompt) + i + 1], dtype=torch.int32)
            rows.append(decoder.decode(torch.tensor([token]), cache, seq_lens, table))
    return torch.cat(rows).float().cpu()


@torch.inference_mode()
def transformers_logits(model: PreTrainedModel, prompt: list[int], following: list[int]) -> torch.Tensor:
    """The same from transformers, also cached and step by step, as some rope scalings depend on that."""
    with model.device:
        out = model(torch.tensor([prompt]), use_cache=True)
        rows = [out.logits[:, -1]]
        for token in following:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[:, -1])
    return torch.cat(rows).float().cpu()


def random_tokens(count: int, seed: int = 0, below: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, (count,), generator=generator).tolist()
