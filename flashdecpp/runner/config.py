"""What the decoder needs to know of a model, read from config.json or from GGUF metadata."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import torch

from .architectures import Architecture, Bias, find_architecture, find_gguf_architecture
from .errors import ModelError
from .gguf import GGUFFile
from .rope import Rope
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


@dataclass(frozen=True)
class ModelConfig:
    architecture: Architecture
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    embed_dim: int  # `hidden`, unless the embeddings are projected to it
    norm_eps: float
    context: int  # most tokens of a sequence
    ropes: tuple[Rope | None, ...]  # of each layer, None where nothing is rotated
    tied_embeddings: bool
    windows: tuple[int, ...]  # sliding window of each layer, -1 for none
    activation: str = "silu"
    norm_after: bool = False  # norms follow on what a sublayer adds to the residual stream, and replace it
    attn_scale: float | None = None  # of q.k; None: 1 / sqrt(head_dim)
    attn_softcap: float = 0.0  # 0 for none
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float16  # of the checkpoint; quantised ones count as float16

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ModelError(
                f"{self.q_heads} query heads are not a multiple of {self.kv_heads} key/value heads"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ModelError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")

    @cached_property
    def rekeyed(self) -> bool:
        """Whether some rope has keys computed anew where a sequence outgrows their frequencies."""
        return any(rope.recomputed for rope in self._distinct_ropes)

    def rotation(self, length: int) -> int:
        """Stands for all frequencies of a prompt of `length`: the same where each of them is the same."""
        return sum(rope.rotation(length) for rope in self._distinct_ropes)  # none of them ever decreases

    @cached_property
    def _distinct_ropes(self) -> list[Rope]:
        return list({id(rope): rope for rope in self.ropes if rope is not None}.values())

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        return (self.q_heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


class ModelSettings:
    """A model's configuration under Llama's keys, whatever its architecture calls them."""

    def __init__(self, architecture: Architecture, values: Any) -> None:
        self.architecture = self._architecture = architecture
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"config.json has no {self._architecture.keys.get(key, key)}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """null and a key that isn't there are the same."""
        value = getattr(self._values, self._architecture.keys.get(key, key), None)
        return self._architecture.defaults.get(key, default) if value is None else value

    def bias(self, where: Bias) -> bool:
        return where if isinstance(where, bool) else any(self.get(key) for key in where)


def config_from_directory(path: Path) -> ModelConfig:
    """Reads config.json (of any transformers version) and generation_config.json."""
    raw = read_json(path / "config.json")
    architecture = find_architecture(raw.get("architectures") or [])
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{path} is quantised ({method}); use a float16 / bfloat16 / float32 checkpoint or a GGUF"
        )
    values = _hf_config(path) if architecture.in_transformers else Namespace(**raw)
    settings = ModelSettings(architecture, values)
    for key, needed in architecture.requires.items():
        if bool(settings.get(key)) != needed:
            raise ModelError(f"{architecture.name} is supported only with {key} {str(needed).lower()}")
    activation = ACTIVATIONS.get(settings["hidden_act"])
    if activation is None:
        raise ModelError(
            f"hidden_act {settings['hidden_act']!r} is not supported, only {', '.join(ACTIVATIONS)}"
        )
    layers, hidden, q_heads = (
        settings[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    head_dim = settings.get("head_dim") or hidden // q_heads
    query_scalar = settings.get("query_pre_attn_scalar")
    kinds = settings.get("layer_types") or ["sliding_attention"] * layers
    window = settings.get("sliding_window", -1) if architecture.windowed else -1
    ropes = _hf_ropes(settings, kinds, head_dim, architecture)
    contexts = [rope.context for rope in ropes if rope is not None]
    return ModelConfig(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=settings.get("num_key_value_heads", q_heads),
        head_dim=head_dim,
        ffn=settings["intermediate_size"],
        vocab=settings["vocab_size"],
        embed_dim=settings.get("word_embed_proj_dim", hidden),
        norm_eps=settings["rms_norm_eps"],
        context=max(contexts, default=settings["max_position_embeddings"]),
        ropes=ropes,
        tied_embeddings=bool(settings["tie_word_embeddings"]),
        windows=tuple(window if kind == "sliding_attention" else -1 for kind in kinds),
        activation=activation,
        norm_after=not settings.get("do_layer_norm_before", True),
        attn_scale=None if query_scalar is None else query_scalar**-0.5,
        attn_softcap=settings.get("attn_logit_softcapping", 0.0),
        logit_softcap=settings.get("final_logit_softcapping", 0.0),
        qkv_bias=settings.bias(architecture.qkv_bias),
        o_bias=settings.bias(architecture.o_bias),
        mlp_bias=settings.bias(architecture.mlp_bias),
        eos_ids=_eos_ids(raw, path / "generation_config.json"),
        dtype=_hf_dtype(raw),
    )


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """GGUF says by the presence of a tensor whether the model has one: biases, an untied head."""
    metadata, tensors = file.metadata, file.shapes
    architecture = find_gguf_architecture(metadata.get("general.architecture", ""))

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture.gguf}.{key}", default)
        if value is None:
            raise ModelError(f"the GGUF file has no {architecture.gguf}.{key}")
        return value

    if get("expert_count", 0):
        raise ModelError("mixture-of-experts GGUF files are not supported")
    layers, hidden, q_heads = get("block_count"), get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // q_heads)
    rope = _gguf_rope(get, file, head_dim)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    extra = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        q_heads=q_heads,
        kv_heads=get("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        ffn=get("feed_forward_length"),
        vocab=get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        embed_dim=hidden,
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        context=rope.context,
        ropes=(rope,) * layers,
        tied_embeddings="output.weight" not in tensors,
        windows=(get("attention.sliding_window", -1),) * layers,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        eos_ids=tuple(sorted({token for token in (eos, *extra) if token is not None})),
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; a model folder must have one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def generation_settings(folder: Path) -> Settings:
    """What generation_config.json says; nothing where there is none."""
    path = folder / "generation_config.json"
    return Settings(read_json(path) if path.exists() else {}, str(path))


def _hf_config(path: Path) -> Any:
    from transformers import AutoConfig  # late: it is slow to import and a GGUF file does without it

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except Exception as error:  # transformers raises many kinds for a bad file
        raise ModelError(
            f"{path / 'config.json'} can't be read: {str(error).strip().splitlines()[0]}"
        ) from error


def _hf_ropes(
    settings: ModelSettings, kinds: list[str], head_dim: int, architecture: Architecture
) -> tuple[Rope | None, ...]:
    """Of each layer; layers of one kind share theirs."""
    if architecture.rotary is None:
        return (None,) * len(kinds)
    # transformers 5 gathers theta and scaling in rope_parameters; 4 had rope_theta and rope_scaling.
    parameters = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    ropes = {
        kind: _hf_rope(settings, dict(parameters.get(kind, parameters)), head_dim) for kind in set(kinds)
    }
    return tuple(ropes[kind] for kind in kinds)


def _hf_rope(settings: ModelSettings, parameters: dict[str, Any], head_dim: int) -> Rope:
    theta = parameters.pop("rope_theta", None) or settings.get("rope_theta", 10000.0)
    theta *= settings.get("rope_ratio", 1.0)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    fraction = parameters.pop("partial_rotary_factor", None) or settings.get("partial_rotary_factor", 1.0)
    dim, max_positions = int(head_dim * fraction), settings["max_position_embeddings"]
    recomputed = kind == "longrope" and settings.architecture.rekeyed_longrope
    return Rope(dim, theta, max_positions, kind, parameters, recomputed)


def _gguf_rope(get: Callable[..., Any], file: GGUFFile, head_dim: int) -> Rope:
    kind = {"none": "default", "linear": "linear", "yarn": "yarn"}.get(get("rope.scaling.type", "none"))
    if kind is None:
        raise ModelError(
            f"GGUF rope scaling {get('rope.scaling.type')!r} is not supported, only linear and yarn"
        )
    scaling = {"factor": get("rope.scaling.factor", 1.0)}
    if original := get("rope.scaling.original_context_length", 0):
        scaling["original_max_position_embeddings"] = original
    if shape := file.shapes.get("rope_freqs.weight"):
        scaling["factors"] = file.rows("rope_freqs.weight", 0, shape[0]).tolist()
    dim = get("rope.dimension_count", head_dim)
    return Rope(dim, get("rope.freq_base", 10000.0), get("context_length"), kind, scaling)


def _eos_ids(raw: dict[str, Any], generation_config: Path) -> tuple[int, ...]:
    found: set[int] = set()
    generation = read_json(generation_config) if generation_config.exists() else {}
    for eos in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return tuple(sorted(found))


def _hf_dtype(raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
