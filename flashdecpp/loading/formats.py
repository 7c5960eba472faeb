"""Formats that quantized weights are stored in."""

from dataclasses import dataclass

import torch

from flashdecpp.quantization import QuantizedWeight

QUANTIZE = ("auto", "none", "int8", "int4")  # values of LLM(quantize=)


@dataclass(frozen=True)
class Format:
    """How a weight is quantized. `stored`: the checkpoint has it in this format, so nothing is rounded.

    Scales and offsets are float16, as in GGUF files.
    """

    bits: int
    group: int | None  # weights per scale; None: one scale per row
    offsets: bool = False
    stored: bool = False

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1

    def nbytes(self, rows: int, columns: int) -> int:
        scales = rows * self.groups(columns) * torch.float16.itemsize
        return rows * columns * self.bits // 8 + scales * (2 if self.offsets else 1)

    def allocate(self, rows: int, columns: int, device: torch.device) -> QuantizedWeight:
        def numbers() -> torch.Tensor:
            shape = (rows, self.groups(columns)) if self.group else (rows,)
            return torch.empty(shape, dtype=torch.float16, device=device)

        dtype, width = (torch.uint8, columns // 2) if self.bits == 4 else (torch.int8, columns)
        weight = torch.empty((rows, width), dtype=dtype, device=device)
        return QuantizedWeight(weight, numbers(), numbers() if self.offsets else None)


ROUNDED = {"int8": Format(8, None), "int4": Format(4, 32)}  # formats that float weights are rounded to
