"""The decoder architectures, as data: what their tensors are called and how they differ from Llama.

To add one that fits the shared decoder (model.py), add an entry to ARCHITECTURES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ModelError


@dataclass(frozen=True)
class Naming:
    """Tensor names without ".weight" / ".bias"; a tuple is packed, by rows, into one weight."""

    embed: str
    norm: str
    lm_head: str
    layer: str  # prefix of a layer's tensors, with its index as {}
    attn_norm: str
    qkv: tuple[str, ...]
    o: str
    ffn_norm: str
    gate_up: tuple[str, ...]
    down: str


LLAMA_NAMES = Naming(
    embed="model.embed_tokens",
    norm="model.norm",
    lm_head="lm_head",
    layer="model.layers.{}.",
    attn_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    ffn_norm="post_attention_layernorm",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)

GGUF_NAMES = Naming(
    embed="token_embd",
    norm="output_norm",
    lm_head="output",
    layer="blk.{}.",
    attn_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    o="attn_output",
    ffn_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
)


@dataclass(frozen=True)
class Architecture:
    """`biases` reads from a Hugging Face configuration which of qkv, o and mlp have one."""

    name: str  # the class name in config.json's "architectures"
    names: Naming
    biases: Callable[[Any], dict[str, bool]]
    windowed: bool = False  # sliding_window of the configuration counts
    gguf: str | None = None  # GGUF's general.architecture
    gguf_interleaved_qk: bool = False  # GGUF stores the rows of q and k for adjacent-pair rotation


def _llama_biases(config: Any) -> dict[str, bool]:
    attention = bool(getattr(config, "attention_bias", False))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(getattr(config, "mlp_bias", False))}


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", LLAMA_NAMES, _llama_biases, gguf="llama", gguf_interleaved_qk=True),
    Architecture("MistralForCausalLM", LLAMA_NAMES, lambda config: {}, windowed=True),
    Architecture(
        "Qwen2ForCausalLM", LLAMA_NAMES, lambda config: {"qkv_bias": True}, windowed=True, gguf="qwen2"
    ),
)


def find_architecture(names: list[str]) -> Architecture:
    """The architecture of config.json's "architectures" list."""
    for architecture in ARCHITECTURES:
        if architecture.name in names:
            return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ModelError(
        f"architecture {', '.join(names) or 'unknown'} is not supported; supported are {supported}"
    )


def find_gguf_architecture(name: str) -> Architecture:
    """The architecture of a GGUF file's general.architecture."""
    for architecture in ARCHITECTURES:
        if architecture.gguf == name:
            return architecture
    supported = ", ".join(architecture.gguf for architecture in ARCHITECTURES if architecture.gguf)
    raise ModelError(f"GGUF architecture {name!r} is not supported; supported are {supported}")
