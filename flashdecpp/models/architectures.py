"""The decoder architectures as data: their tensor names and how they differ from Llama.

An architecture that fits the shared decoder (decoder.py) needs only an entry in ARCHITECTURES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flashdecpp.errors import ModelError


@dataclass(frozen=True)
class TensorNames:
    """Tensor names without ".weight" / ".bias", or None if the architecture has no such tensor.

    The tensors of a tuple are packed, by rows, into one weight.
    """

    roots: tuple[str, ...]  # prefixes of all names but lm_head; the first with a layer is used
    embed: str
    norm: str
    lm_head: str
    layer: str  # prefix of a layer's tensors; {} is its index
    attn_norm: str
    qkv: tuple[str, ...]  # three names, or one if the checkpoint packs them
    o: str
    ffn_norm: str
    gate_up: tuple[str, ...]  # two names, or one if packed or without a gate
    down: str
    q_norm: str | None = None  # per head, before rotation
    k_norm: str | None = None
    attn_out_norm: str | None = None  # before the residual add of attention
    ffn_out_norm: str | None = None  # before that of the feed-forward part
    positions: str | None = None  # learned position embeddings
    project_in: str | None = None  # from embeddings to hidden states of another width
    project_out: str | None = None  # and back


LLAMA_NAMES = TensorNames(
    roots=("model.",),
    embed="embed_tokens",
    norm="norm",
    lm_head="lm_head",
    layer="layers.{}.",
    attn_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    ffn_norm="post_attention_layernorm",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
QWEN3_NAMES = replace(LLAMA_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
GEMMA2_NAMES = replace(
    LLAMA_NAMES,
    attn_out_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
)
GEMMA3_NAMES = replace(GEMMA2_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
PHI3_NAMES = replace(LLAMA_NAMES, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
GLM_NAMES = replace(LLAMA_NAMES, gate_up=("mlp.gate_up_proj",))
GLM4_NAMES = replace(GLM_NAMES, attn_out_norm="post_self_attn_layernorm", ffn_out_norm="post_mlp_layernorm")

OPT_NAMES = TensorNames(
    roots=("model.decoder.", "decoder."),
    embed="embed_tokens",
    positions="embed_positions",
    project_in="project_in",
    project_out="project_out",
    norm="final_layer_norm",
    lm_head="lm_head",
    layer="layers.{}.",
    attn_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.out_proj",
    ffn_norm="final_layer_norm",
    gate_up=("fc1",),
    down="fc2",
)

CHATGLM_NAMES = TensorNames(
    roots=("transformer.",),
    embed="embedding.word_embeddings",
    norm="encoder.final_layernorm",
    lm_head="transformer.output_layer",
    layer="encoder.layers.{}.",
    attn_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    o="self_attention.dense",
    ffn_norm="post_attention_layernorm",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)

GGUF_NAMES = TensorNames(
    roots=("",),
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

# Whether a projection has a bias: always, never, or if one of these keys of the configuration is true
Bias = bool | tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A decoder architecture. The defaults describe Llama's."""

    name: str  # the class name in config.json's "architectures"
    model_type: str  # of its configuration in transformers
    names: TensorNames
    keys: Mapping[str, str] = field(default_factory=dict)  # Llama's key -> its name in config.json
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of Llama's keys missing in config.json
    requires: Mapping[str, bool] = field(default_factory=dict)  # the only supported values of flags
    in_transformers: bool = True  # False: config.json is read without transformers
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # added to the stored weights of norms
    rotary: Literal["halves", "pairs"] | None = "halves"  # layout of rotated pairs; None: no rotation
    partial_rotary: bool = False  # partial_rotary_factor applies without rope scaling, too
    rekeyed_longrope: bool = False  # keys are recomputed when longrope switches to its long factors
    position_offset: int = 0  # row of position 0 in the learned embeddings
    scaled_embedding: bool = False  # by sqrt(hidden)
    gated: bool = True
    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    windowed: bool = False  # sliding_window of the configuration applies
    float16: bool = True  # False: hidden states overflow float16
    gguf: str | None = None  # GGUF's general.architecture
    gguf_names: TensorNames = GGUF_NAMES
    gguf_interleaved_qk: bool = False  # GGUF stores q and k for adjacent-pair rotation


LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    LLAMA_NAMES,
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    mlp_bias=("mlp_bias",),
    gguf="llama",
    gguf_interleaved_qk=True,
)
QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    QWEN3_NAMES,
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    windowed=True,
    gguf="qwen3",
    gguf_names=replace(GGUF_NAMES, q_norm="attn_q_norm", k_norm="attn_k_norm"),
)
GEMMA2 = Architecture(
    "Gemma2ForCausalLM",
    "gemma2",
    GEMMA2_NAMES,
    keys={"hidden_act": "hidden_activation"},
    requires={"use_bidirectional_attention": False},
    norm_offset=1.0,
    scaled_embedding=True,
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    windowed=True,
    float16=False,
)
GEMMA3 = replace(
    GEMMA2,
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    names=GEMMA3_NAMES,
    # transformers applies the soft cap of attention in Gemma 2 only
    requires={"use_bidirectional_attention": False, "attn_logit_softcapping": False},
)
GLM = Architecture(
    "GlmForCausalLM", "glm", GLM_NAMES, rotary="pairs", partial_rotary=True, qkv_bias=("attention_bias",)
)
CHATGLM = Architecture(  # ChatGLM2, ChatGLM3 and GLM-4 in their authors' format
    "ChatGLMModel",
    "chatglm",
    CHATGLM_NAMES,
    keys={
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
    },
    defaults={"hidden_act": "silu", "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    requires={
        "multi_query_attention": True,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
    },
    in_transformers=False,
    rotary="pairs",
    partial_rotary=True,
    qkv_bias=("add_qkv_bias", "add_bias_linear"),
    o_bias=("add_bias_linear",),
    mlp_bias=("add_bias_linear",),
)

ARCHITECTURES = (
    LLAMA,
    Architecture("MistralForCausalLM", "mistral", LLAMA_NAMES, windowed=True),
    Architecture("Qwen2ForCausalLM", "qwen2", LLAMA_NAMES, qkv_bias=True, windowed=True, gguf="qwen2"),
    QWEN3,
    GEMMA2,
    GEMMA3,
    replace(  # the language model of the multimodal checkpoints
        GEMMA3,
        name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        names=replace(GEMMA3_NAMES, roots=("language_model.model.", "model.language_model.")),
    ),
    Architecture(
        "Phi3ForCausalLM", "phi3", PHI3_NAMES, partial_rotary=True, windowed=True, rekeyed_longrope=True
    ),
    Architecture(
        "OPTForCausalLM",
        "opt",
        OPT_NAMES,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={"rms_norm_eps": 1e-5},
        requires={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
        norm="layer",
        rotary=None,
        position_offset=2,
        gated=False,
        qkv_bias=("enable_bias",),
        o_bias=("enable_bias",),
        mlp_bias=("enable_bias",),
    ),
    GLM,
    replace(GLM, name="Glm4ForCausalLM", model_type="glm4", names=GLM4_NAMES),
    CHATGLM,
    replace(CHATGLM, name="ChatGLMForConditionalGeneration"),
)


def find_gguf_architecture(name: str) -> Architecture:
    """The architecture that a GGUF file's general.architecture names."""
    for architecture in ARCHITECTURES:
        if architecture.gguf == name:
            return architecture
    supported = ", ".join(architecture.gguf for architecture in ARCHITECTURES if architecture.gguf)
    raise ModelError(f"GGUF architecture {name!r} is not supported; supported are {supported}")
