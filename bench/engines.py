"""End-to-end Llama-2-7B on one GPU: decode steps and prefill with flashdecpp, vLLM and transformers.

A checkpoint of random float16 weights with the real shapes is written once, and each engine in turn loads it
in its own process. `decode_ms` is (time of 65 tokens - time of 1) / 64 and `prefill_ms` is the time of one
token, both for whole `generate` calls on token ids; for transformers, they are steps of a greedy loop on a
static cache, eager and under torch.compile(mode="reduce-overhead").

    python bench/engines.py [--engines flashdecpp,vllm,transformers] [--output FILE.json]
    python bench/engines.py --dry-run      # a tiny model on the CPU, to test the script itself

Engines that are not installed are reported as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
}
TINY = LLAMA_2_7B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
CASES = [(1, 128), (1, 1024), (1, 8192), (8, 1024), (32, 1024)]  # sequences, tokens per prompt
TINY_CASES = [(1, 16), (2, 32)]
STEPS = 64
ENGINES = ("flashdecpp", "vllm", "transformers")

# prompts, tokens to generate per prompt -> None
Generate = Callable[[list[list[int]], int], None]


def write_checkpoint(folder: Path, sizes: dict[str, int], device: str) -> None:
    """Random float16 weights in one file per layer, a config, and a tokenizer with one word per token."""
    hidden, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    config = sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    pieces = {f"<{index}>": index for index in range(vocab)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": pieces, "unk_token": "<0>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.float16, device=device).normal_(std=0.02).cpu()

    norm = torch.ones(hidden, dtype=torch.float16)
    files = {
        "ends": {
            "model.embed_tokens.weight": matrix(vocab, hidden),
            "model.norm.weight": norm,
            "lm_head.weight": matrix(vocab, hidden),
        }
    }
    names: dict[str, str] = {}
    for layer in range(-1, sizes["num_hidden_layers"]):
        prefix, name = f"model.layers.{layer}.", "ends" if layer < 0 else f"layer{layer:02}"
        tensors = files.get(name) or {
            **{f"{prefix}self_attn.{x}_proj.weight": matrix(hidden, hidden) for x in "qkvo"},
            **{f"{prefix}mlp.{x}_proj.weight": matrix(ffn, hidden) for x in ("gate", "up")},
            f"{prefix}mlp.down_proj.weight": matrix(hidden, ffn),
            f"{prefix}input_layernorm.weight": norm.clone(),
            f"{prefix}post_attention_layernorm.weight": norm.clone(),
        }
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def flashdecpp_engine(folder: str, cases: list[tuple[int, int]]) -> Generate:
    from flashdecpp import LLM, SamplingParams

    batch = max(rows for rows, _ in cases)
    tokens = max(rows * (length + STEPS + 32) for rows, length in cases)
    llm = LLM(folder, max_batch=batch, cache_tokens=tokens, prefix_cache=False)

    def generate(prompts: list[list[int]], count: int) -> None:
        llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), progress=False
        )

    return generate


def vllm_engine(folder: str, cases: list[tuple[int, int]]) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    from vllm import LLM, SamplingParams

    longest = max(length for _, length in cases) + 2 * STEPS
    llm = LLM(
        model=folder,
        dtype="float16",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=64,
        max_num_batched_tokens=longest,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": sorted({rows for rows, _ in cases})},
    )

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return generate


def measure_generate(generate: Generate, cases: list[tuple[int, int]], vocab: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def seconds(rows: int, length: int, count: int) -> float:
        prompts = torch.randint(3, vocab, (rows, length), generator=generator).tolist()
        begin = time.perf_counter()
        generate(prompts, count)
        return time.perf_counter() - begin

    results = []
    for rows, length in cases:
        seconds(rows, length, 4)
        one = statistics.median(seconds(rows, length, 1) for _ in range(3))
        many = statistics.median(seconds(rows, length, STEPS + 1) for _ in range(3))
        results.append(
            {
                "sequences": rows,
                "prompt": length,
                "prefill_ms": round(one * 1e3, 2),
                "decode_ms": round((many - one) / STEPS * 1e3, 3),
            }
        )
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def measure_transformers(folder: str, cases: list[tuple[int, int]], vocab: int, device: str) -> list[dict]:
    from transformers import LlamaForCausalLM, StaticCache

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="sdpa").to(
        device
    )

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run(rows: int, length: int, compiled: bool) -> tuple[float, float]:
        cache = StaticCache(config=model.config, max_cache_len=length + 32)

        def step(tokens: torch.Tensor) -> torch.Tensor:
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1)

        prompt = torch.randint(3, vocab, (rows, length), device=device)
        step(prompt)
        cache.reset()
        synchronize()
        begin = time.perf_counter()
        tokens = step(prompt)
        tokens.tolist()
        prefill = time.perf_counter() - begin
        if compiled:
            step = torch.compile(step, mode="reduce-overhead")
        times = []
        for _ in range(16):
            begin = time.perf_counter()
            tokens = step(tokens).clone()  # the next replay of the graph overwrites its result
            tokens.tolist()
            times.append(time.perf_counter() - begin)
        return prefill, statistics.median(times[6:])

    results = []
    with torch.inference_mode():
        for rows, length in cases:
            prefill, eager = run(rows, length, compiled=False)
            row = {"sequences": rows, "prompt": length, "prefill_ms": round(prefill * 1e3, 2)}
            row["eager_decode_ms"] = round(eager * 1e3, 3)
            if device == "cuda" and (rows, length) in ((1, 1024), (8, 1024)):
                torch.compiler.reset()
                row["compiled_decode_ms"] = round(run(rows, length, compiled=True)[1] * 1e3, 3)
            results.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return results


def measure_engine(engine: str, folder: str, dry: bool) -> dict[str, object]:
    """Measures an engine in this process. Returns its version and results."""
    cases, sizes = (TINY_CASES, TINY) if dry else (CASES, LLAMA_2_7B)
    device, vocab = "cpu" if dry else "cuda", sizes["vocab_size"]
    module = __import__(engine)
    if engine == "transformers":
        results = measure_transformers(folder, cases, vocab, device)
    else:
        make = flashdecpp_engine if engine == "flashdecpp" else vllm_engine
        results = measure_generate(make(folder, cases), cases, vocab)
    return {"version": module.__version__, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = measure_engine(*options.child, dry=options.dry_run)
        # The engine itself may write to standard output, too.
        print(f"\n{json.dumps(found)}", flush=True)
        return

    import measure

    results: dict[str, object] = {}
    if not options.dry_run:
        results["read_ceiling_gbs"] = round(measure.read_ceiling_gbs())
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if options.dry_run else "cuda"
        write_checkpoint(Path(folder), TINY if options.dry_run else LLAMA_2_7B, device)
        if device == "cuda":
            torch.cuda.empty_cache()
        for engine in options.engines.split(","):
            if importlib.util.find_spec(engine) is None:
                results[engine] = "not installed"
                continue
            command = [sys.executable, __file__, "--child", engine, folder]
            command += ["--dry-run"] if options.dry_run else []
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            answer = child.stdout.strip().splitlines()[-1:] or ["null"]
            results[engine] = (
                json.loads(answer[0]) if child.returncode == 0 else f"failed: {child.returncode}"
            )
            print(engine, json.dumps(results[engine]), flush=True)
            if options.output:  # after every engine, so that an interrupted run keeps its results
                measure.save(options.output, results)


if __name__ == "__main__":
    main()
