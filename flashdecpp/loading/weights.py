"""Loads the weights: checked first, then packed straight into their place, a few rows at a time."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.models.architectures import Naming
from flashdecpp.models.config import ModelConfig
from flashdecpp.models.weights import Layer, Matrix, Weights
from flashdecpp.quantization import QuantizedWeight, quantize

from .formats import ROUNDED, Format
from .quantized_files import quantized, sign_of_quantization

LOOKED_UP = ("embed", "positions")  # matrices whose rows are taken, not multiplied with
CHUNK_BYTES = 16 << 20  # float32 bytes that are converted at once: what loading holds beyond the weights


class WeightSource(Protocol):
    """Tensors by name, read lazily."""

    path: Path  # the folder or the file
    shapes: dict[str, tuple[int, ...]]

    def check(self, name: str) -> None:
        """A ModelError where the tensor's rows can't be weights."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first dimension, on the CPU, in any float dtype."""
        ...

    def format(self, name: str) -> Format | None:
        """How the tensor is quantized, where it is and ops.quantized_linear can run it so."""
        ...

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop) of a tensor that has a format, as they are stored."""
        ...

    def release(self, name: str) -> None:
        """The tensor has been copied: its pages may go."""
        ...


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint. `interleaved_heads` > 0: its rows are stored for adjacent-pair rotation
    (the two of a pair side by side) and are put back in half-and-half order, head by head."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0


@dataclass(frozen=True)
class Slot:
    """One weight of the decoder: pieces stacked by rows."""

    pieces: tuple[Piece, ...]
    float32: bool = False  # whatever the model's dtype
    offset: float = 0.0  # what is added to the stored values of a norm
    format: Format | None = None  # None: in the model's dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.float32 else dtype

    def nbytes(self, dtype: torch.dtype) -> int:
        if self.format is not None:
            return self.format.nbytes(*self.shape)
        return math.prod(self.shape) * self.dtype(dtype).itemsize

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        if self.format is not None:
            return self.format.allocate(*self.shape, device)
        return torch.empty(self.shape, dtype=self.dtype(dtype), device=device)

    def read(self, source: WeightSource, name: str, start: int, stop: int) -> Matrix:
        """Rows of a piece, as they are stored here."""
        if self.format is None:
            values = source.rows(name, start, stop)
            return values.float() + self.offset if self.offset else values
        if not self.format.stored:
            values = source.rows(name, start, stop).float()
            return quantize(values, self.format.bits, self.format.group, scales_dtype=torch.float16)
        rows = source.quantized_rows(name, start, stop)
        if self.format.offsets and rows.offsets is None:  # beside pieces that have them
            return replace(rows, offsets=rows.scales * (-8 if rows.bits == 4 else 0))
        return rows


@dataclass(frozen=True)
class Plan:
    """Which tensors of the checkpoint go where."""

    top: dict[str, Slot]
    layers: tuple[dict[str, Slot], ...]

    @property
    def slots(self) -> list[Slot]:
        return [*self.top.values(), *(slot for layer in self.layers for slot in layer.values())]

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """[N, K] of every weight that a linear layer has, each once."""
        slots = [slot for layer in self.layers for slot in layer.values()]
        slots += [slot for field, slot in self.top.items() if field not in LOOKED_UP]
        slots.append(self.top.get("lm_head", self.top["embed"]))
        return list(dict.fromkeys(slot.shape for slot in slots if len(slot.shape) == 2))

    def nbytes(self, dtype: torch.dtype) -> int:
        return sum(slot.nbytes(dtype) for slot in self.slots)

    def quantized(self, quantize: str, source: WeightSource) -> "Plan":
        """The plan with a format for every matrix that is quantized: `quantize` as in LLM.

        Where all pieces of a weight are stored in a format of the op, of the same bits, it stays what it is.
        Other weights are rounded where that is asked for and their columns fill whole groups, except for
        embeddings (and so an lm_head that is tied to one).
        """
        if quantize == "none":
            return self

        def with_format(field: str, slot: Slot) -> Slot:
            if len(slot.shape) != 2:
                return slot
            formats = [source.format(piece.name) for piece in slot.pieces]
            if all(formats) and len({(found.bits, found.group) for found in formats}) == 1:
                return replace(slot, format=replace(formats[0], offsets=any(f.offsets for f in formats)))
            rounded = ROUNDED.get(quantize)
            if field in LOOKED_UP or rounded is None or slot.shape[1] % (rounded.group or 1):
                return slot
            return replace(slot, format=rounded)

        def quantized(slots: dict[str, Slot]) -> dict[str, Slot]:
            return {field: with_format(field, slot) for field, slot in slots.items()}

        return Plan(quantized(self.top), tuple(quantized(layer) for layer in self.layers))


def plan_weights(
    config: ModelConfig, names: Naming, source: WeightSource, interleaved_qk: bool = False
) -> Plan:
    """Where each tensor goes; a ModelError where one is missing or has another shape than configured."""
    hidden, ffn, embed_dim = config.hidden, config.ffn, config.embed_dim
    architecture = config.architecture
    if config.layers > len(source.shapes):  # before anything is made for each layer
        raise ModelError(
            f"the configuration has {config.layers} layers, "
            f"more than {source.path} has tensors ({len(source.shapes)})"
        )
    heads = (config.q_heads, config.kv_heads, 0) if interleaved_qk else None
    first_layer = names.layer.format(0)
    known = (r for r in names.roots if any(name.startswith(r + first_layer) for name in source.shapes))
    root = next(known, names.roots[0])

    def norm(field: str, name: str, width: int) -> dict[str, Slot]:
        offset = architecture.norm_offset  # a sum, which the model's dtype might not hold
        piece = Piece(f"{name}.weight", (width,))
        slots = {field: Slot((piece,), float32=offset != 0, offset=offset)}
        if architecture.norm == "layer":
            slots[field + "_bias"] = Slot((Piece(f"{name}.bias", (width,)),))
        return slots

    def linear(
        field: str,
        prefix: str,
        parts: Sequence[str],
        rows: Sequence[int],
        columns: int,
        bias: bool = False,
        heads: Sequence[int] | None = None,
    ) -> dict[str, Slot]:
        """`rows` of each part, or of what a single part has packed; `heads`: the interleaved ones of each."""
        if len(parts) == 1:
            rows = (sum(rows),)
        pieces = list(zip([prefix + part for part in parts], rows, heads or (0,) * len(rows), strict=True))
        slots = {field: Slot(tuple(Piece(f"{name}.weight", (n, columns), h) for name, n, h in pieces))}
        if bias:
            slots[field + "_bias"] = Slot(tuple(Piece(f"{name}.bias", (n,), h) for name, n, h in pieces))
        return slots

    def layer(prefix: str) -> dict[str, Slot]:
        gate_up_rows = (ffn, ffn) if architecture.gated else (ffn,)
        slots = {
            **linear("qkv", prefix, names.qkv, config.qkv_rows, hidden, config.qkv_bias, heads),
            **linear("o", prefix, (names.o,), (hidden,), config.qkv_rows[0], config.o_bias),
            **linear("gate_up", prefix, names.gate_up, gate_up_rows, hidden, config.mlp_bias),
            **linear("down", prefix, (names.down,), (hidden,), ffn, config.mlp_bias),
        }
        widths = dict.fromkeys(("attn_norm", "ffn_norm", "attn_out_norm", "ffn_out_norm"), hidden)
        widths |= dict.fromkeys(("q_norm", "k_norm"), config.head_dim)
        for field, width in widths.items():
            if name := getattr(names, field):
                slots |= norm(field, prefix + name, width)
        return slots

    embed, head = root + names.embed, names.lm_head
    stored = [name for name in (embed, head) if f"{name}.weight" in source.shapes]
    if config.tied_embeddings and (len(stored) < 2 or _equal(source, stored, (config.vocab, embed_dim))):
        # One tensor, under whichever of its two names.
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
        top |= linear("project_in", root, (names.project_in,), (hidden,), embed_dim)
        top |= linear("project_out", root, (names.project_out,), (embed_dim,), hidden)
    plan = Plan(top, tuple(layer(root + names.layer.format(index)) for index in range(config.layers)))
    _check(plan, source)
    return plan


def load_weights(plan: Plan, source: WeightSource, device: torch.device, dtype: torch.dtype) -> Weights:
    """Loads everything, with a progress bar on stderr. Beyond the weights it holds about CHUNK_BYTES."""
    need, free = plan.nbytes(dtype), available_bytes(device)
    if need > free:
        raise OutOfMemory(f"the weights need {gigabytes(need)} on {device}, where {gigabytes(free)} are free")
    with tqdm(
        total=need, unit="B", unit_scale=True, desc="weights", file=sys.stderr, leave=False, disable=None
    ) as bar:

        def load(slots: dict[str, Slot]) -> dict[str, Matrix]:
            return {field: _load(slot, source, device, dtype, bar) for field, slot in slots.items()}

        top = load(plan.top)
        top.setdefault("lm_head", top["embed"])
        layers = tuple(Layer(**load(slots)) for slots in plan.layers)
        return Weights(**top, layers=layers, dtype=dtype)


def _check(plan: Plan, source: WeightSource) -> None:
    pieces = [piece for slot in plan.slots for piece in slot.pieces]
    missing = [piece.name for piece in pieces if piece.name not in source.shapes]
    if missing:
        if sign := sign_of_quantization(source.path, source.shapes):
            raise ModelError(quantized(source.path, sign))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"the checkpoint lacks the tensors {', '.join(missing[:3])}{more}")
    for piece in pieces:
        source.check(piece.name)
        if source.shapes[piece.name] != piece.shape:
            raise ModelError(
                f"tensor {piece.name} has the shape {source.shapes[piece.name]}, "
                f"the configuration asks for {piece.shape}"
            )


def _equal(source: WeightSource, names: Sequence[str], shape: tuple[int, int]) -> bool:
    """Whether the matrices that a configuration calls tied are so: else transformers takes each as it is."""
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


def _load(slot: Slot, source: WeightSource, device: torch.device, dtype: torch.dtype, bar: tqdm) -> Matrix:
    whole = slot.allocate(dtype, device)
    row_bytes = slot.nbytes(dtype) // slot.shape[0]
    first = 0
    for piece in slot.pieces:
        rows = piece.shape[0]
        target = _half_and_half(rows, piece.interleaved_heads) if piece.interleaved_heads else None
        step = max(1, CHUNK_BYTES // (4 * math.prod(piece.shape[1:])))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = slot.read(source, piece.name, start, stop)
            for place, values in zip(_parts(whole), _parts(chunk), strict=True):
                if target is None:
                    place[first + start : first + stop].copy_(values)
                else:
                    index = (first + target[start:stop]).to(device)
                    place.index_copy_(0, index, values.to(device=device, dtype=place.dtype))
            bar.update((stop - start) * row_bytes)
        source.release(piece.name)
        first += rows
    return whole


def _parts(weight: Matrix) -> list[torch.Tensor]:
    """The tensors of a weight; a row of it is a row of each."""
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [part for part in (weight.weight, weight.scales, weight.offsets) if part is not None]


def _half_and_half(rows: int, heads: int) -> torch.Tensor:
    """Where each stored row goes: pair j of a head is stored at 2j, 2j + 1 and belongs at j, j + half."""
    dim = rows // heads
    row = torch.arange(rows)
    head, within = row // dim, row % dim
    return head * dim + within % 2 * (dim // 2) + within // 2
