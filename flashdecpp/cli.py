"""The command line: `flashdecpp` or `python -m flashdecpp`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flashdecpp.runner import LLM, Completion, SamplingParams

app = typer.Typer(
    help="Run language models with FlashDecoding++ kernels: unified-maximum attention, flat GEMM and GEMV.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would take "[default: ...]" for a style and drop it
)

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'demo', a Hugging Face folder, or a .gguf file.", show_default=True),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: the GPU if there is one]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 (CPU only), bfloat16 or float16.  [default: bfloat16; on a GPU the model's own]"
    ),
]
Phi = Annotated[
    str,
    typer.Option(
        help="Unified maximum of the softmax: auto (what calibrate wrote beside the model, else carry), "
        "carry (each sequence's last row maxima), none, or a file."
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        help="Weights: auto (a GGUF's Q4_0, Q4_1 and Q8_0 as stored), none (all in --dtype), "
        "int8 or int4 (float weights rounded to the nearest)."
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        help="Replay decode steps on a GPU as CUDA graphs; without, their kernels are launched one by one, "
        "to debug or profile."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of an answer.", min=1)]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 takes the most likely token.", min=0)
]
TopK = Annotated[int, typer.Option(help="Choose among the k most likely tokens; 0 is off.", min=0)]
TopP = Annotated[float, typer.Option(help="Choose among the most likely tokens that sum up to p.", max=1)]
MinP = Annotated[
    float, typer.Option(help="Drop tokens below p times the likeliest one's probability.", min=0, max=1)
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens already there less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.  [default: a fresh one]")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given again.")]
Samples = Annotated[int, typer.Option(help="Answers to each prompt; answer i has seed + i.", min=1)]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the answer.")]


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Without one, --file or standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Every line of the input is a prompt of its own.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each result.")] = False,
    model: Model = "demo",
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    samples: Samples = 1,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    phi: Phi = "auto",
    quantize: Quantize = "auto",
    cuda_graphs: CudaGraphs = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="An answer doesn't depend on what it is batched with: every step computes a full batch, "
            "and every prompt is computed anew.",
        ),
    ] = False,
) -> None:
    """Continue a prompt (or answer it, with --chat); the text streams to standard output."""
    from flashdecpp.runner import SamplingParams

    prompts = _prompts(prompt, file, lines)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        n=samples,
    )
    llm = _load(
        model,
        device,
        dtype,
        phi,
        quantize=quantize,
        cuda_graphs=cuda_graphs,
        batch_invariant=batch_invariant,
        prefix_cache=not batch_invariant,
    )
    inputs = [_templated(llm, text) for text in prompts] if chat else prompts
    answers = len(inputs) * samples
    if answers == 1 and not as_json:
        _print_stream(llm.stream(inputs[0], params))
    else:
        completions = llm.generate(inputs, params, progress=answers > 1)
        answered = [text for text in prompts for _ in range(samples)]
        for text, completion in zip(answered, completions, strict=True):
            print(_as_json(text, completion) if as_json else completion.text, flush=True)
    _print_stats(llm)


@app.command()
def chat(
    model: Model = "demo",
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    phi: Phi = "auto",
    quantize: Quantize = "auto",
    cuda_graphs: CudaGraphs = True,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation, /new forgets it."""
    from flashdecpp.runner import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = _load(model, device, dtype, phi, quantize=quantize, cuda_graphs=cuda_graphs)
    _converse(llm, system, params)


@app.command()
def calibrate(
    model: Model = "demo",
    text: Annotated[
        Path | None, typer.Option(help="A text to measure.  [default: a short one of many kinds]")
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="Most tokens of it to measure.", min=1)
    ] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where phi goes.  [default: beside the model]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the statistics into this PNG (matplotlib).")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model's softmax inputs and write the unified maximum of every head beside the model."""
    from flashdecpp.runner import calibrate as calibration
    from flashdecpp.runner.calibration_text import TEXT
    from flashdecpp.runner.phi import phi_path

    if plot is not None:
        calibration.need_matplotlib()
    _need_writable(output, plot)
    content = TEXT if text is None else text.read_text(encoding="utf-8")
    llm = _load(model, device, dtype, "none")
    output = phi_path(llm.path) if output is None else output
    _need_writable(output)
    measured = calibration.measure(llm, llm.tokenizer.encode(content)[:tokens])
    measured.save(output)
    if plot is not None:
        calibration.plot(measured, plot)
    for line in calibration.report(measured):
        print(line)
    print(f"phi is in {output}" + ("" if plot is None else f", the plot in {plot}"))


@app.command()
def tune(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Measure the linear layers of this model: 'demo', a folder, a .gguf."
        ),
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Or these weights [N, K]: 'N,K;N,K', such as '4096,4096;11008,4096'.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The table's file.  [default: where every run finds it]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time over M into this PNG (matplotlib).")] = None,
) -> None:
    """Measure gemv, flat GEMM and BLAS on this machine: which one linear() takes for how many rows.

    For every weight [N, K] two inflection points come out: gemv below M1 rows, flat GEMM from M1 to M2, BLAS
    from M2 on. They are added to this device's table, in tables/ of $FLASHDECPP_CACHE (~/.cache/flashdecpp),
    which every later run finds by itself. `flashdecpp info --shapes ...` shows what is chosen. Let nothing
    else run meanwhile.
    """
    import torch

    from flashdecpp.dispatch import Table, machine, tuner, user_folder
    from flashdecpp.dispatch import plot as drawing
    from flashdecpp.dispatch.table import parse_shapes
    from flashdecpp.runner import calibrate as calibration
    from flashdecpp.runner.checkpoint import open_checkpoint
    from flashdecpp.runner.llm import resolve_device, resolve_dtype

    if (model is None) == (shapes is None):
        raise ValueError("say what to measure, by --model or by --shapes, not both")
    if plot is not None:
        calibration.need_matplotlib()
    _need_writable(output, plot)
    place = resolve_device(device)
    if shapes is not None:
        wanted, own_dtype = parse_shapes(shapes), torch.float16
    else:
        checkpoint = open_checkpoint(model)
        wanted, own_dtype = checkpoint.plan.linear_shapes, checkpoint.config.dtype
    table = Table(place.type, machine.device_name(place))
    if output is None:
        user_folder().mkdir(parents=True, exist_ok=True)
        output = user_folder() / table.file_name
        _need_writable(output)
    if output.exists():
        table = table.merged(Table.load(output))
    measured = tuner.tune(wanted, resolve_dtype(dtype, place, own_dtype), place)
    table.merged(measured).save(output)
    if plot is not None:
        drawing.plot(measured, plot)
    print(f"linear on {table.device}")
    for line in tuner.report(measured):
        print(f"  {line}")
    print(f"the table is {output}" + ("" if plot is None else f", the plot {plot}"))


@app.command()
def info(
    shapes: Annotated[
        str | None, typer.Option(help="Show what linear() takes for weights [N, K]: 'N,K;N,K'.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of these shapes.  [default: bfloat16; on a GPU float16]")
    ] = None,
) -> None:
    """What was built, which devices there are, and which kernels will run and why."""
    from flashdecpp.dispatch.table import parse_shapes
    from flashdecpp.info import lines

    for line in lines([] if shapes is None else parse_shapes(shapes), dtype):
        print(line)


def main() -> None:
    """Runs the command line; every expected error is one line on stderr and exit status 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        print(f"flashdecpp: {error}", file=sys.stderr)
        sys.exit(1)


def _prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or --file, not both")
    if prompt is None:
        if file is None and sys.stdin.isatty():
            print("Type the prompt, end it with Ctrl-D:", file=sys.stderr)
        prompt = file.read_text() if file else sys.stdin.read()
    prompts = [line for line in prompt.splitlines() if line.strip()] if lines else [prompt]
    if not any(text.strip() for text in prompts):
        raise ValueError("the prompt is empty")
    return prompts


def _need_writable(*paths: Path | None) -> None:
    """Raises an error where a file could not be written, before the work that it's for."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(f"{path} can't be written: {path.parent} is no folder that may be written to")


def _load(model: str, device: str | None, dtype: str | None, phi: str, **settings: str | bool) -> LLM:
    from flashdecpp.runner import LLM

    return LLM(model, device=device, dtype=dtype, phi=phi, **settings)


def _templated(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode_chat([{"role": "user", "content": text}])


def _print_stream(pieces: Iterator) -> str:
    """Prints an answer as it comes; Ctrl-C ends it. Returns what was printed."""
    answer = ""
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            answer += piece.text
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)
    return answer


def _converse(llm: LLM, system: str | None, params: SamplingParams) -> None:
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    print(
        f"{llm.name} on {llm.device}. Ctrl-C ends an answer, Ctrl-D the conversation, /new forgets it.",
        file=sys.stderr,
    )
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if text == "/new":
            messages = list(opening)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                pieces = llm.chat(messages, params, stream=True)
            except ValueError as error:
                print(f"flashdecpp: {error}; /new starts over", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": _print_stream(pieces)})
            _print_stats(llm)


def _as_json(prompt: str, completion: Completion) -> str:
    result = {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "timings": {
            "time_to_first_token_s": round(completion.time_to_first_token, 4),
            "tokens_per_second": round(completion.tokens_per_second, 2),
        },
    }
    return json.dumps(result, ensure_ascii=False)


def _print_stats(llm: LLM) -> None:
    stats = llm.stats
    if stats is None:
        return
    dtype = str(llm.dtype).removeprefix("torch.")
    softmax = stats.softmax
    if softmax != "online softmax":
        softmax += f": {stats.softmax_fallbacks} softmax fallbacks in {stats.softmax_rows} rows"
    found = f"{stats.found_tokens} tokens found in the cache, " if stats.found_tokens else ""
    preempted = f"{stats.preemptions} preemptions, " if stats.preemptions else ""
    slower = "" if stats.cuda_graphs else "no CUDA graphs, "
    slower += "batch-invariant, " if stats.batch_invariant else ""
    print(
        f"[{llm.name}, {dtype} on {llm.device}: {stats.prompt_tokens} + {stats.generated_tokens} tokens, "
        f"first after {stats.time_to_first_token:.2f} s, then {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.weights} weights {stats.weight_bytes / 2**20:.0f} MiB, "
        f"peak memory {stats.peak_memory / 2**20:.0f} MiB, {found}{preempted}{slower}{softmax}]",
        file=sys.stderr,
    )
