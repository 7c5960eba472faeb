"""Reads the model configuration from GGUF metadata, with the meaning that llama.cpp gives it."""

from typing import Any

from flashdecpp.errors import ModelError
from flashdecpp.models.architectures import find_gguf_architecture
from flashdecpp.models.config import MAX_LAYERS, ModelConfig
from flashdecpp.models.rope import Rope, yarn_magnitude

from .config_reader import ConfigReader
from .gguf import GGUFFile

ENDS = ("eos", "eot", "eom")  # tokens that end a sequence
SCALINGS = ("none", "linear", "yarn", "longrope")


class GGUFConfigReader(ConfigReader):
    """A file's metadata. A list with the same value for every layer counts as that value."""

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Biases and an untied head are not in the metadata: the presence of their tensors tells."""
    metadata, tensors, source = file.metadata, file.shapes, str(file.path)
    architecture = find_gguf_architecture(ConfigReader(metadata, source).text("general.architecture"))
    settings = GGUFConfigReader(metadata, source, prefix=f"{architecture.gguf}.")
    if settings.integer("expert_count", 0, low=0):
        raise ModelError("mixture-of-experts GGUF files are not supported")
    layers, hidden = settings.integer("block_count", high=MAX_LAYERS), settings.integer("embedding_length")
    q_heads = settings.integer("attention.head_count")
    head_dim = settings.integer("attention.key_length", hidden // q_heads)
    rope = _rope(settings, file, head_dim)
    # Vocabularies are extended without an update of the metadata; the tensor has a row for every token.
    vocab = tensors.get("token_embd.weight", (0,))[0] or settings.integer("vocab_size")
    tokens = ConfigReader(metadata, source, prefix="tokenizer.ggml.")
    ends = [token for kind in ENDS for token in tokens.token_ids(f"{kind}_token_id")]
    return ModelConfig(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=settings.integer("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        ffn=settings.integer("feed_forward_length"),
        vocab=vocab,
        embed_dim=hidden,
        norm_eps=settings.number("attention.layer_norm_rms_epsilon", low=0.0),
        context=rope.context,
        ropes=(rope,) * layers,
        tied_embeddings="output.weight" not in tensors,
        windows=(settings.integer("attention.sliding_window", 0, low=0) or -1,) * layers,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        eos_ids=tuple(ends),
    )


def _rope(settings: ConfigReader, file: GGUFFile, head_dim: int) -> Rope:
    """As in llama.cpp, a factor without a type is linear, 0 means none, and any extrapolation is yarn."""
    kind = settings.text("rope.scaling.type", "linear")
    if kind not in SCALINGS:
        raise ModelError(f"GGUF rope scaling {kind!r} is not supported, only {', '.join(SCALINGS)}")
    older = settings.number("rope.scale_linear", 0.0, low=0.0)
    factor = settings.number("rope.scaling.factor", older, low=0.0) or 1.0
    if kind == "none":
        factor = 1.0
    context = settings.integer("context_length")
    original = settings.integer("rope.scaling.original_context_length", 0, low=0) or context
    scaling: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": original}
    dim = settings.integer("rope.dimension_count", head_dim, high=head_dim)
    if "rope_freqs.weight" in file.shapes:
        scaling["factors"] = _factors(file, "rope_freqs.weight", dim)

    magnitude = settings.number("rope.scaling.attn_factor", 1.0, low=0.0)
    extrapolation = settings.number("rope.scaling.yarn_ext_factor", -1.0)
    if extrapolation < 0:  # not set
        extrapolation = 1.0 if kind == "yarn" else 0.0
    if extrapolation:
        kind, scaling["extrapolation"] = "yarn", extrapolation
        scaling["beta_fast"] = settings.number("rope.scaling.yarn_beta_fast", 32.0, low=0.0)
        scaling["beta_slow"] = settings.number("rope.scaling.yarn_beta_slow", 1.0, low=0.0)
        of_all = settings.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0)
        magnitude *= yarn_magnitude(factor) / yarn_magnitude(factor, of_all)
    else:
        magnitude *= settings.number("rope.scaling.yarn_attn_factor", 1.0, low=0.0)
        if kind == "longrope" and "factors" not in scaling:
            scaling["by_context"] = True
            for which in ("short", "long"):
                divisors = _factors(file, f"rope_factors_{which}.weight", dim)
                scaling[f"{which}_factor"] = [divisor * factor for divisor in divisors]
        else:
            kind = "default" if factor == magnitude == 1.0 else "linear"
    scaling["attention_factor"] = magnitude
    theta = settings.number("rope.freq_base", 10000.0, above=1.0)
    return Rope(dim, theta, context, kind, scaling)


def _factors(file: GGUFFile, name: str, dim: int) -> list[float]:
    """The divisors of the dim / 2 frequencies that a tensor holds."""
    shape = file.shapes.get(name)
    if shape != (dim // 2,):
        raise ModelError(f"{file.path}: {name} must have the shape ({dim // 2},), got {shape}")
    file.check(name)
    factors = file.rows(name, 0, dim // 2)
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ModelError(f"{file.path}: {name} must hold finite numbers above 0")
    return factors.tolist()
