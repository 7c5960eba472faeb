"""Weights that are quantized in a way that other libraries read: how a model folder shows it."""

from collections.abc import Iterable
from pathlib import Path

# Beside the weights, by GPTQ, AWQ and NVIDIA's ModelOpt, where config.json has no word of it
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# What a weight's parts are called: by GPTQ, AWQ, EXL2; mlx; compressed-tensors; bitsandbytes; HQQ
PARTS = {"qweight", "qzeros", "q_weight", "scales", "weight_packed", "weight_scale", "weight_scale_inv"}
PARTS |= {"SCB", "absmax", "W_q"}


def quantized(path: Path, sign: str) -> str:
    """What is said of such weights. sign: how that is known."""
    return f"{path} is quantized ({sign}); use a float16, bfloat16 or float32 checkpoint or a GGUF file"


def sign_of_quantization(folder: Path, tensors: Iterable[str]) -> str | None:
    """Why weights that are missing under their usual names may be quantized; None where nothing says so."""
    for name in FILES:
        if (folder / name).is_file():
            return f"it has a {name}"
    part = next((name for name in tensors if name.rpartition(".")[2] in PARTS), None)
    return None if part is None else f"it has the tensor {part}"
