"""Recognizes model folders whose weights are quantized in formats of other libraries."""

from collections.abc import Iterable
from pathlib import Path

# Written by GPTQ, AWQ and NVIDIA's ModelOpt if config.json does not mention the quantization
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Names of a weight's tensors in GPTQ, AWQ, EXL2; mlx; compressed-tensors; bitsandbytes; HQQ
TENSORS = {"qweight", "qzeros", "q_weight", "scales", "weight_packed", "weight_scale", "weight_scale_inv"}
TENSORS |= {"SCB", "absmax", "W_q"}


def quantized(path: Path, sign: str) -> str:
    """The error message for such weights. `sign`: how they were recognized."""
    return f"{path} is quantized ({sign}); use a float16, bfloat16 or float32 checkpoint or a GGUF file"


def sign_of_quantization(folder: Path, tensors: Iterable[str]) -> str | None:
    """A sign that weights missing under their usual names are quantized, or None."""
    for name in FILES:
        if (folder / name).is_file():
            return f"it has a {name}"
    found = next((name for name in tensors if name.rpartition(".")[2] in TENSORS), None)
    return None if found is None else f"it has the tensor {found}"
