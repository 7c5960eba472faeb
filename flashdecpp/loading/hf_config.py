"""A Hugging Face folder's config.json and generation_config.json, of any transformers version."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flashdecpp.errors import ModelError
from flashdecpp.models.architectures import ARCHITECTURES, Architecture, Bias
from flashdecpp.models.config import MOST_LAYERS, ModelConfig
from flashdecpp.models.rope import Rope

from .json_files import read_json
from .settings import Settings

# config.json's hidden_act -> the name that ops.gated_activation knows
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What is looked at before transformers makes anything of it, which takes these for granted
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
LAYER_KINDS = ("full_attention", "sliding_attention")

# transformers 5 gathers theta and scaling in rope_parameters; 4 had rope_theta and rope_scaling.
ROPE_KEYS = ("rope_parameters", "rope_scaling")
# The numbers that a kind of rope scaling must have, and those that it may have
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ORIGINAL, ORIGINAL_KEY = ("llama3", "yarn", "longrope"), "original_max_position_embeddings"
ROPE_TAKES = {
    "longrope": ("attention_factor",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def find_architecture(config: Settings) -> Architecture:
    """The one that config.json's "architectures" name, or its "model_type" where they name none."""
    names = config.get("architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        config.refuse("architectures", "a list of class names")
    model_type = None if names else config.text("model_type", None)
    for architecture in ARCHITECTURES:
        if architecture.name in names or architecture.model_type == model_type:
            return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    asked = ", ".join(names) or model_type or "unknown"
    raise ModelError(f"architecture {asked} is not supported; supported are {supported}")


def config_from_directory(path: Path, generation: Settings) -> ModelConfig:
    """What config.json says, and generation_config.json of the end of a sequence."""
    raw = read_json(path / "config.json")
    top = Settings(raw, str(path / "config.json"))
    for key in ("quantization_config", "quantization", "compression_config"):
        if how := top.mapping(key, {}):
            raise ModelError(
                f"{path} is quantised ({how.get('quant_method', key)}); "
                "use a float16 / bfloat16 / float32 checkpoint or a GGUF"
            )
    files = (top, top.section("text_config"), generation)
    ends = [token for file in files for token in file.token_ids("eos_token_id")]
    architecture = find_architecture(top)
    settings = _settings(top, architecture)
    for key, needed in architecture.requires.items():
        if bool(settings.get(key)) != needed:
            raise ModelError(f"{architecture.name} is supported only with {key} {str(needed).lower()}")
    activation = ACTIVATIONS.get(settings.text("hidden_act"))
    if activation is None:
        raise ModelError(
            f"hidden_act {settings.get('hidden_act')!r} is not supported, only {', '.join(ACTIVATIONS)}"
        )
    layers = settings.integer("num_hidden_layers", high=MOST_LAYERS)
    hidden, q_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    head_dim = settings.integer("head_dim", hidden // q_heads)
    query_scalar = settings.number("query_pre_attn_scalar", None, above=0.0)
    kinds = settings.get("layer_types") or ["sliding_attention"] * layers
    if len(kinds) != layers or any(kind not in LAYER_KINDS for kind in kinds):
        settings.refuse("layer_types", f"a list of {layers} of {' and '.join(LAYER_KINDS)}")
    window = settings.integer("sliding_window", -1) if architecture.windowed else -1
    ropes = _ropes(settings, kinds, head_dim, architecture)
    contexts = [rope.context for rope in ropes if rope is not None]
    return ModelConfig(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=settings.integer("num_key_value_heads", q_heads),
        head_dim=head_dim,
        ffn=settings.integer("intermediate_size"),
        vocab=settings.integer("vocab_size"),
        embed_dim=settings.integer("word_embed_proj_dim", hidden),
        norm_eps=settings.number("rms_norm_eps", low=0.0),
        context=max(contexts, default=settings.integer("max_position_embeddings")),
        ropes=ropes,
        tied_embeddings=settings.flag("tie_word_embeddings"),
        windows=tuple(window if kind == "sliding_attention" else -1 for kind in kinds),
        activation=activation,
        norm_after=not settings.flag("do_layer_norm_before", True),
        attn_scale=None if query_scalar is None else query_scalar**-0.5,
        attn_softcap=settings.number("attn_logit_softcapping", 0.0, low=0.0),
        logit_softcap=settings.number("final_logit_softcapping", 0.0, low=0.0),
        qkv_bias=_has_bias(settings, architecture.qkv_bias),
        o_bias=_has_bias(settings, architecture.o_bias),
        mlp_bias=_has_bias(settings, architecture.mlp_bias),
        eos_ids=tuple(ends),
        dtype=_dtype(raw),
    )


def generation_settings(folder: Path) -> Settings:
    """What generation_config.json says; nothing where there is none."""
    path = folder / "generation_config.json"
    return Settings(read_json(path) if path.exists() else {}, str(path))


def _settings(top: Settings, architecture: Architecture) -> Settings:
    """A model's configuration under Llama's keys, whatever its architecture calls them."""
    names = architecture.keys
    stated = top.section("text_config") if "text_config" in top.values else top
    stated = Settings(stated.values, stated.source, names)
    for key in SIZES:
        stated.integer(key, None)
    stated.integer("num_hidden_layers", None, high=MOST_LAYERS)
    kinds = stated.get("layer_types", [])
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        stated.refuse("layer_types", "a list of strings")
    for key in ROPE_KEYS:
        shared = stated.section(key)
        for parameters in (shared, *(shared.section(kind) for kind in LAYER_KINDS)):
            _scaling(parameters, _kind(parameters))
    values = _completed(top, architecture) if architecture.in_transformers else top.values
    return Settings(values, top.source, names, architecture.defaults)


def _completed(top: Settings, architecture: Architecture) -> Mapping[str, Any]:
    """The text model's values, with transformers' own where the file lacks one. Its class is known: whatever
    code or other class the file names is not looked for."""
    from transformers import CONFIG_MAPPING  # late: it is slow to import and a GGUF file does without it

    try:
        config = CONFIG_MAPPING[architecture.model_type].from_dict(dict(top.values))
        return config.get_text_config().to_dict()
    except Exception as error:  # transformers raises many kinds for a bad file
        reason = " ".join(str(error).split())
        raise ModelError(f"{top.source} can't be read: {reason}") from error


def _has_bias(settings: Settings, where: Bias) -> bool:
    return where if isinstance(where, bool) else any(settings.flag(key, False) for key in where)


def _ropes(
    settings: Settings, kinds: list[str], head_dim: int, architecture: Architecture
) -> tuple[Rope | None, ...]:
    """Of each layer; layers of one kind share theirs."""
    if architecture.rotary is None:
        return (None,) * len(kinds)
    shared = settings.section(next(filter(settings.get, ROPE_KEYS), ROPE_KEYS[0]))
    ropes = {}
    for kind in set(kinds):
        own = shared.section(kind) if kind in shared.values else shared
        ropes[kind] = _rope(settings, own, head_dim, architecture, shared=own is shared)
    return tuple(ropes[kind] for kind in kinds)


def _rope(
    settings: Settings, parameters: Settings, head_dim: int, architecture: Architecture, shared: bool
) -> Rope:
    """parameters: of this rope. shared: they are those of all layers."""
    kind = _kind(parameters)
    theta = parameters.number("rope_theta", None, above=1.0) or settings.number(
        "rope_theta", 10000.0, above=1.0
    )
    theta *= settings.number("rope_ratio", 1.0, above=0.0)
    fraction = settings.number("partial_rotary_factor", 1.0, above=0.0, high=1.0)
    fraction = parameters.number("partial_rotary_factor", fraction, above=0.0, high=1.0)
    if kind == "default" and not architecture.partial_rotary:
        fraction = 1.0
    dim, max_positions = int(head_dim * fraction), settings.integer("max_position_embeddings")
    scaling = _scaling(parameters, kind)
    if kind in ORIGINAL and shared:  # as transformers has it, the one at the top counts more
        top = settings.integer(ORIGINAL_KEY, None, low=2)
        scaling[ORIGINAL_KEY] = top or scaling[ORIGINAL_KEY]
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            scaling[key] = parameters.numbers(key, dim // 2, above=0.0)
    recomputed = kind == "longrope" and architecture.rekeyed_longrope
    return Rope(dim, theta, max_positions, kind, scaling, recomputed)


def _scaling(parameters: Settings, kind: str) -> dict[str, Any]:
    """What a kind of scaling reads but for its lists, under the same keys."""
    scaling = {key: parameters.number(key, above=0.0) for key in ROPE_NEEDS.get(kind, ())}
    scaling |= {key: parameters.number(key, None, low=0.0) for key in ROPE_TAKES.get(kind, ())}
    if kind in ORIGINAL:
        scaling[ORIGINAL_KEY] = parameters.integer(ORIGINAL_KEY, None, low=2)
    if kind in ("yarn", "longrope"):
        scaling["factor"] = parameters.number("factor", None, above=0.0)
    if kind == "yarn":
        scaling["truncate"] = parameters.flag("truncate", True)
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        parameters.refuse("high_freq_factor", f"above low_freq_factor {scaling['low_freq_factor']:g}")
    return scaling


def _kind(parameters: Settings) -> str:
    return parameters.text("rope_type", None) or parameters.text("type", "default")


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
