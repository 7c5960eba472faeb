"""Plans and loads the weights: checks them all, then copies them into packed tensors a few rows at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp._progress import progress_bar
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.models.architectures import TensorNames
from flashdecpp.models.config import ModelConfig
from flashdecpp.models.weights import Layer, Matrix, Weights
from flashdecpp.quantization import QuantizedWeight, quantize

from .formats import ROUNDED, Format
from .quantized_files import quantized, sign_of_quantization

LOOKED_UP = ("embed", "positions")  # matrices whose rows are gathered, not multiplied
CHUNK_BYTES = 16 << 20  # float32 bytes converted at once: the memory that loading needs beyond the weights


class WeightSource(Protocol):
    """Tensors by name, read lazily."""

    path: Path  # the folder or the file
    shapes: dict[str, tuple[int, ...]]

    def check(self, name: str) -> None:
        """Raises a ModelError if the tensor's rows can't be weights."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first dimension, on the CPU, in any float dtype."""
        ...

    def format(self, name: str) -> Format | None:
        """The tensor's format if it is stored in one that ops.quantized_linear runs, else None."""
        ...

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop) of a tensor that has a format, as stored."""
        ...

    def release(self, name: str) -> None:
        """Drops the tensor's pages once it has been copied."""
        ...


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor as the checkpoint names and shapes it.

    With `interleaved_heads` > 0 the rows of each head are stored for adjacent-pair rotation, and loading
    restores the half-and-half order.
    """

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the decoder: checkpoint tensors stacked by rows."""

    tensors: tuple[CheckpointTensor, ...]
    float32: bool = False  # whatever the model's dtype
    offset: float = 0.0  # added to the stored values of a norm
    format: Format | None = None  # None: the model's dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(tensor.shape[0] for tensor in self.tensors), *self.tensors[0].shape[1:])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.float32 else dtype

    def nbytes(self, dtype: torch.dtype) -> int:
        if self.format is not None:
            rows, columns = self.shape
            return self.format.nbytes(rows, columns)
        return math.prod(self.shape) * self.dtype(dtype).itemsize

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        if self.format is not None:
            rows, columns = self.shape
            return self.format.allocate(rows, columns, device)
        return torch.empty(self.shape, dtype=self.dtype(dtype), device=device)

    def read(self, source: WeightSource, name: str, start: int, stop: int) -> Matrix:
        """Rows [start, stop) of a checkpoint tensor in this weight's format."""
        if self.format is None:
            values = source.rows(name, start, stop)
            return values.float() + self.offset if self.offset else values
        if not self.format.stored:
            values = source.rows(name, start, stop).float()
            return quantize(values, self.format.bits, self.format.group, scales_dtype=torch.float16)
        rows = source.quantized_rows(name, start, stop)
        if self.format.offsets and rows.offsets is None:  # stacked with tensors that have offsets
            return replace(rows, offsets=rows.scales * (-8 if rows.bits == 4 else 0))
        return rows


@dataclass(frozen=True)
class Plan:
    """Which tensors of the checkpoint make up which weight. `top`: those outside the layers."""

    top: dict[str, PackedWeight]
    layers: tuple[dict[str, PackedWeight], ...]

    @property
    def weights(self) -> list[PackedWeight]:
        return [*self.top.values(), *(weight for layer in self.layers for weight in layer.values())]

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """The distinct shapes [N, K] of the linear layers' weights."""
        weights = [weight for layer in self.layers for weight in layer.values()]
        weights += [weight for field, weight in self.top.items() if field not in LOOKED_UP]
        weights.append(self.top.get("lm_head", self.top["embed"]))
        matrices = (weight.shape for weight in weights if len(weight.shape) == 2)
        return list(dict.fromkeys((n, k) for n, k in matrices))

    def nbytes(self, dtype: torch.dtype) -> int:
        return sum(weight.nbytes(dtype) for weight in self.weights)

    def quantized(self, quantize: str, source: WeightSource) -> "Plan":
        """The plan with a format for every matrix that is to be quantized. `quantize` as in LLM.

        A weight whose tensors are all stored in formats that the op runs, of the same bits and group, keeps
        its format. Others are rounded on request if their columns fill whole groups, except for embeddings
        (and thus a tied lm_head).
        """
        if quantize == "none":
            return self

        def with_format(field: str, weight: PackedWeight) -> PackedWeight:
            if len(weight.shape) != 2:
                return weight
            stored = [source.format(tensor.name) for tensor in weight.tensors]
            formats = [format for format in stored if format is not None]
            alike = len({(format.bits, format.group) for format in formats}) == 1
            if alike and len(formats) == len(stored):
                return replace(weight, format=replace(formats[0], offsets=any(f.offsets for f in formats)))
            rounded = ROUNDED.get(quantize)
            if field in LOOKED_UP or rounded is None or weight.shape[1] % (rounded.group or 1):
                return weight
            return replace(weight, format=rounded)

        def quantized(weights: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
            return {field: with_format(field, weight) for field, weight in weights.items()}

        return Plan(quantized(self.top), tuple(quantized(layer) for layer in self.layers))


def plan_weights(
    config: ModelConfig, names: TensorNames, source: WeightSource, interleaved_qk: bool = False
) -> Plan:
    """Plans every weight. Raises a ModelError for tensors that are missing or not of the configured shape."""
    hidden, ffn, embed_dim = config.hidden, config.ffn, config.embed_dim
    architecture = config.architecture
    if config.layers > len(source.shapes):  # before anything is built per layer
        raise ModelError(
            f"the configuration has {config.layers} layers, "
            f"more than {source.path} has tensors ({len(source.shapes)})"
        )
    heads = (config.q_heads, config.kv_heads, 0) if interleaved_qk else None
    first_layer = names.layer.format(0)
    known = (r for r in names.roots if any(name.startswith(r + first_layer) for name in source.shapes))
    root = next(known, names.roots[0])

    def norm(field: str, name: str, width: int) -> dict[str, PackedWeight]:
        offset = architecture.norm_offset  # the sum is kept in float32: half types might round it
        tensor = CheckpointTensor(f"{name}.weight", (width,))
        weights = {field: PackedWeight((tensor,), float32=offset != 0, offset=offset)}
        if architecture.norm == "layer":
            weights[field + "_bias"] = PackedWeight((CheckpointTensor(f"{name}.bias", (width,)),))
        return weights

    def linear(
        field: str,
        prefix: str,
        members: Sequence[str],
        rows: Sequence[int],
        columns: int,
        bias: bool = False,
        heads: Sequence[int] | None = None,
    ) -> dict[str, PackedWeight]:
        """`rows` and interleaved `heads` per tensor. A checkpoint may pack all rows in one tensor."""
        if len(members) == 1:
            rows = (sum(rows),)
        stacked = list(zip(members, rows, heads or (0,) * len(rows), strict=True))

        def packed(suffix: str, *shape: int) -> PackedWeight:
            return PackedWeight(
                tuple(CheckpointTensor(f"{prefix}{name}.{suffix}", (n, *shape), h) for name, n, h in stacked)
            )

        weights = {field: packed("weight", columns)}
        if bias:
            weights[field + "_bias"] = packed("bias")
        return weights

    def layer(prefix: str) -> dict[str, PackedWeight]:
        gate_up_rows = (ffn, ffn) if architecture.gated else (ffn,)
        weights = {
            **linear("qkv", prefix, names.qkv, config.qkv_rows, hidden, config.qkv_bias, heads),
            **linear("o", prefix, (names.o,), (hidden,), config.qkv_rows[0], config.o_bias),
            **linear("gate_up", prefix, names.gate_up, gate_up_rows, hidden, config.mlp_bias),
            **linear("down", prefix, (names.down,), (hidden,), ffn, config.mlp_bias),
        }
        widths = dict.fromkeys(("attn_norm", "ffn_norm", "attn_out_norm", "ffn_out_norm"), hidden)
        widths |= dict.fromkeys(("q_norm", "k_norm"), config.head_dim)
        for field, width in widths.items():
            if name := getattr(names, field):
                weights |= norm(field, prefix + name, width)
        return weights

    embed, head = root + names.embed, names.lm_head
    stored = [name for name in (embed, head) if f"{name}.weight" in source.shapes]
    if config.tied_embeddings and (len(stored) < 2 or _equal(source, stored, (config.vocab, embed_dim))):
        # One tensor, under either of its two names.
        top = linear("embed", "", stored[:1] or (embed,), (config.vocab,), embed_dim)
    else:
        top = linear("embed", "", (embed,), (config.vocab,), embed_dim)
        top |= linear("lm_head", "", (head,), (config.vocab,), embed_dim)
    if not config.norm_after:
        top |= norm("norm", root + names.norm, hidden)
    if names.positions:
        rows = config.context + architecture.position_offset
        top |= linear("positions", root, (names.positions,), (rows,), hidden)
    if embed_dim != hidden:
        if names.project_in is None or names.project_out is None:
            raise ModelError(f"{architecture.name} is supported only with embeddings of the hidden size")
        top |= linear("project_in", root, (names.project_in,), (hidden,), embed_dim)
        top |= linear("project_out", root, (names.project_out,), (embed_dim,), hidden)
    plan = Plan(top, tuple(layer(root + names.layer.format(index)) for index in range(config.layers)))
    _check(plan, source)
    return plan


def load_weights(plan: Plan, source: WeightSource, device: torch.device, dtype: torch.dtype) -> Weights:
    """Loads all weights, with a progress bar. Needs about CHUNK_BYTES of memory beyond them."""
    need, free = plan.nbytes(dtype), available_bytes(device)
    if need > free:
        raise OutOfMemory(f"the weights need {gigabytes(need)} on {device}, where {gigabytes(free)} are free")
    with progress_bar(total=need, desc="weights", unit="B", unit_scale=True) as bar:

        def load(weights: dict[str, PackedWeight]) -> dict[str, Any]:
            return {field: _load(weight, source, device, dtype, bar) for field, weight in weights.items()}

        top = load(plan.top)
        top.setdefault("lm_head", top["embed"])
        layers = tuple(Layer(**load(weights)) for weights in plan.layers)
        return Weights(**top, layers=layers, dtype=dtype)


def _check(plan: Plan, source: WeightSource) -> None:
    tensors = [tensor for weight in plan.weights for tensor in weight.tensors]
    missing = [tensor.name for tensor in tensors if tensor.name not in source.shapes]
    if missing:
        if sign := sign_of_quantization(source.path, source.shapes):
            raise ModelError(quantized(source.path, sign))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"the checkpoint lacks the tensors {', '.join(missing[:3])}{more}")
    for tensor in tensors:
        source.check(tensor.name)
        if source.shapes[tensor.name] != tensor.shape:
            raise ModelError(
                f"tensor {tensor.name} has the shape {source.shapes[tensor.name]}, "
                f"the configuration asks for {tensor.shape}"
            )


def _equal(source: WeightSource, names: Sequence[str], shape: tuple[int, int]) -> bool:
    """Whether matrices that the configuration calls tied are equal. transformers uses both if they differ."""
    names = [f"{name}.weight" for name in names]
    if any(source.shapes[name] != shape for name in names):
        return False
    for name in names:
        source.check(name)
    rows, columns = shape
    step = max(1, CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        first, second = (source.rows(name, start, min(start + step, rows)) for name in names)
        if not torch.equal(first.float(), second.float()):
            return False
    return True


def _load(
    weight: PackedWeight, source: WeightSource, device: torch.device, dtype: torch.dtype, bar: tqdm
) -> Matrix:
    packed = weight.allocate(dtype, device)
    row_bytes = weight.nbytes(dtype) // weight.shape[0]
    first = 0
    for tensor in weight.tensors:
        rows = tensor.shape[0]
        order = _half_and_half(rows, tensor.interleaved_heads) if tensor.interleaved_heads else None
        step = max(1, CHUNK_BYTES // (4 * math.prod(tensor.shape[1:])))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = weight.read(source, tensor.name, start, stop)
            for target, values in zip(_row_tensors(packed), _row_tensors(chunk), strict=True):
                if order is None:
                    target[first + start : first + stop].copy_(values)
                else:
                    index = (first + order[start:stop]).to(device)
                    target.index_copy_(0, index, values.to(device=device, dtype=target.dtype))
            bar.update((stop - start) * row_bytes)
        source.release(tensor.name)
        first += rows
    return packed


def _row_tensors(weight: Matrix) -> list[torch.Tensor]:
    """The tensors that hold a weight. Each has a row per row of the weight."""
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [x for x in (weight.weight, weight.scales, weight.offsets) if x is not None]


def _half_and_half(rows: int, heads: int) -> torch.Tensor:
    """The row that each stored one moves to: pair j of a head goes from 2j, 2j + 1 to j, j + half."""
    dim = rows // heads
    row = torch.arange(rows)
    head, within = row // dim, row % dim
    return head * dim + within % 2 * (dim // 2) + within // 2
