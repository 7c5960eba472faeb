"""Reads config.json and generation_config.json of any transformers version."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flashdecpp.errors import ModelError
from flashdecpp.models.architectures import ARCHITECTURES, Architecture, Bias
from flashdecpp.models.config import MAX_LAYERS, ModelConfig
from flashdecpp.models.rope import Rope

from .config_reader import ConfigReader
from .json_files import read_json
from .quantized_files import quantized

# config.json's hidden_act -> its name in the ops
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Checked before transformers reads the file, since it takes their types for granted
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
LAYER_TYPES = ("full_attention", "sliding_attention")

# transformers 5 gathers theta and scaling in rope_parameters; 4 had rope_theta and rope_scaling.
ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Numbers that a rope type must have, and numbers that it may have
ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ORIGINAL, ORIGINAL_KEY = ("llama3", "yarn", "longrope"), "original_max_position_embeddings"
ROPE_OPTIONAL = {
    "longrope": ("attention_factor",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


def find_architecture(config: ConfigReader) -> Architecture:
    """The architecture that config.json's "architectures" names, or its "model_type" if the list is empty."""
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


def config_from_directory(path: Path, generation: ConfigReader) -> ModelConfig:
    """The configuration in config.json, with the end-of-sequence tokens of generation_config.json."""
    raw = read_json(path / "config.json")
    top = ConfigReader(raw, str(path / "config.json"))
    for key in ("quantization_config", "quantization", "compression_config"):
        if how := top.mapping(key, {}):
            raise ModelError(quantized(path, str(how.get("quant_method", key))))
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
    layers = settings.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden, q_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    head_dim = settings.integer("head_dim", hidden // q_heads)
    query_scalar = settings.number("query_pre_attn_scalar", None, above=0.0)
    layer_types = settings.get("layer_types") or ["sliding_attention"] * layers
    if len(layer_types) != layers or any(layer_type not in LAYER_TYPES for layer_type in layer_types):
        settings.refuse("layer_types", f"a list of {layers} of {' and '.join(LAYER_TYPES)}")
    window = settings.integer("sliding_window", -1) if architecture.windowed else -1
    ropes = _ropes(settings, layer_types, head_dim, architecture)
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
        windows=tuple(window if layer_type == "sliding_attention" else -1 for layer_type in layer_types),
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


def read_generation_config(folder: Path) -> ConfigReader:
    """generation_config.json, empty if the folder has none."""
    path = folder / "generation_config.json"
    return ConfigReader(read_json(path) if path.exists() else {}, str(path))


def _settings(top: ConfigReader, architecture: Architecture) -> ConfigReader:
    """The text model's configuration under Llama's keys, whatever its architecture calls them."""
    names = architecture.keys
    stated = top.section("text_config") if "text_config" in top.values else top
    stated = ConfigReader(stated.values, stated.source, names)
    for key in SIZES:
        stated.integer(key, None)
    stated.integer("num_hidden_layers", None, high=MAX_LAYERS)
    layer_types = stated.get("layer_types", [])
    if not isinstance(layer_types, list) or not all(isinstance(name, str) for name in layer_types):
        stated.refuse("layer_types", "a list of strings")
    for key in ROPE_KEYS:
        shared = stated.section(key)
        for parameters in (shared, *(shared.section(name) for name in LAYER_TYPES)):
            _scaling(parameters, _rope_type(parameters))
    values = _completed(top, architecture) if architecture.in_transformers else top.values
    return ConfigReader(values, top.source, names, architecture.defaults)


def _completed(top: ConfigReader, architecture: Architecture) -> Mapping[str, Any]:
    """The text model's values, completed by transformers' defaults.

    The architecture determines the configuration class; code or classes that the file names are ignored.
    """
    from transformers import CONFIG_MAPPING  # late: slow to import, and GGUF files do not need it

    try:
        config = CONFIG_MAPPING[architecture.model_type].from_dict(dict(top.values))
        return config.get_text_config().to_dict()
    except Exception as error:  # transformers raises many types of error for a bad file
        reason = " ".join(str(error).split())
        raise ModelError(f"{top.source} can't be read: {reason}") from error


def _has_bias(settings: ConfigReader, where: Bias) -> bool:
    return where if isinstance(where, bool) else any(settings.flag(key, False) for key in where)


def _ropes(
    settings: ConfigReader, layer_types: list[str], head_dim: int, architecture: Architecture
) -> tuple[Rope | None, ...]:
    """The rope of every layer. Layers of one type share theirs."""
    if architecture.rotary is None:
        return (None,) * len(layer_types)
    shared = settings.section(next(filter(settings.get, ROPE_KEYS), ROPE_KEYS[0]))
    ropes = {}
    for name in set(layer_types):
        own = shared.section(name) if name in shared.values else shared
        ropes[name] = _rope(settings, own, head_dim, architecture, shared=own is shared)
    return tuple(ropes[name] for name in layer_types)


def _rope(
    settings: ConfigReader, parameters: ConfigReader, head_dim: int, architecture: Architecture, shared: bool
) -> Rope:
    """A rope from its parameters. `shared`: they are those of all layers."""
    kind = _rope_type(parameters)
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
    if kind in ORIGINAL and shared:  # as in transformers, the top-level one takes precedence
        top = settings.integer(ORIGINAL_KEY, None, low=2)
        scaling[ORIGINAL_KEY] = top or scaling[ORIGINAL_KEY]
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            scaling[key] = parameters.numbers(key, dim // 2, above=0.0)
    recomputed = kind == "longrope" and architecture.rekeyed_longrope
    return Rope(dim, theta, max_positions, kind, scaling, recomputed)


def _scaling(parameters: ConfigReader, kind: str) -> dict[str, Any]:
    """The parameters of a rope type, apart from its lists, under the same keys."""
    scaling = {key: parameters.number(key, above=0.0) for key in ROPE_REQUIRED.get(kind, ())}
    scaling |= {key: parameters.number(key, None, low=0.0) for key in ROPE_OPTIONAL.get(kind, ())}
    if kind in ORIGINAL:
        scaling[ORIGINAL_KEY] = parameters.integer(ORIGINAL_KEY, None, low=2)
    if kind in ("yarn", "longrope"):
        scaling["factor"] = parameters.number("factor", None, above=0.0)
    if kind == "yarn":
        scaling["truncate"] = parameters.flag("truncate", True)
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        parameters.refuse("high_freq_factor", f"above low_freq_factor {scaling['low_freq_factor']:g}")
    return scaling


def _rope_type(parameters: ConfigReader) -> str:
    return parameters.text("rope_type", None) or parameters.text("type", "default")


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
