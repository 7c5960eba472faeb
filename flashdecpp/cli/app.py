"""The commands and their options."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from flashdecpp import __version__, _interrupt, _start, _threads

from . import terminal

if TYPE_CHECKING:
    from flashdecpp import LLM, SamplingParams

Command = TypeVar("Command", bound=Callable[..., None])


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with terminal.one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Run language models with FlashDecoding++ kernels: unified-maximum attention, flat GEMM and GEMV.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would read "[default: ...]" as a style and drop it
)

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'demo', a Hugging Face folder or repository, or a .gguf file."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: the GPU if there is one]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 (CPU only), bfloat16 or float16.  [default: bfloat16; on a GPU that of the model]"
    ),
]
Phi = Annotated[
    str,
    typer.Option(
        help="Unified maximum of the softmax: auto (the file that calibrate wrote next to the model, else "
        "carry), carry (the row maxima of each sequence's last step), none, or a file."
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        help="Weights: auto (Q4_0, Q4_1 and Q8_0 of a GGUF file as stored), none (all in --dtype), "
        "int8 or int4 (float weights rounded to nearest)."
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        help="Replay decode steps on a GPU as CUDA graphs, or launch their kernels one by one to debug or "
        "profile."
    ),
]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Maximum tokens of prompt and answer together.  [default: the model's context]"),
]
MaxBatch = Annotated[int, typer.Option(help="Maximum sequences that are decoded together.")]
CacheTokens = Annotated[
    int | None,
    typer.Option(help="Tokens that the KV cache has room for.  [default: by need and free memory]"),
]
GenerationConfig = Annotated[
    bool,
    typer.Option(
        "--generation-config/--no-generation-config",
        help="Use the sampling defaults of the model's generation_config.json.",
    ),
]

# Options that become fields of SamplingParams. Their defaults are those of the model and of SamplingParams.
_OWN = "  [default: the model's own]"
SAMPLING: dict[str, Any] = {
    "max_tokens": Annotated[
        int | None, typer.Option("--max-tokens", "-n", help=f"Maximum tokens of an answer.{_OWN}")
    ],
    "temperature": Annotated[
        float | None, typer.Option("--temperature", "-t", help=f"0 always picks the likeliest token.{_OWN}")
    ],
    "top_k": Annotated[int | None, typer.Option(help=f"Sample from the k likeliest tokens; 0 is off.{_OWN}")],
    "top_p": Annotated[
        float | None,
        typer.Option(help=f"Sample from the likeliest tokens whose probabilities add up to p.{_OWN}"),
    ],
    "min_p": Annotated[
        float | None, typer.Option(help=f"Drop tokens below p times the likeliest one's probability.{_OWN}")
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help=f"Above 1, tokens of prompt and answer become less likely.{_OWN}")
    ],
    "presence_penalty": Annotated[
        float | None, typer.Option(help="Subtracted from the logit of every token in the answer.")
    ],
    "frequency_penalty": Annotated[
        float | None, typer.Option(help="Subtracted from a token's logit once per occurrence in the answer.")
    ],
    "logit_bias": Annotated[
        list[str] | None,
        typer.Option(
            metavar="<id>=<value>", help="Added to a token's logit, -inf excludes it; may be repeated."
        ),
    ],
    "bad_words": Annotated[
        list[str] | None,
        typer.Option("--bad-word", metavar="<str>", help="Never generated; may be repeated."),
    ],
    "stop": Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="End the answer before this text; may be repeated."),
    ],
    "stop_token_ids": Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id", metavar="<int>", help="End the answer before this token; may be repeated."
        ),
    ],
    "min_tokens": Annotated[int | None, typer.Option(help="Minimum tokens of an answer.")],
    "ignore_eos": Annotated[
        bool | None, typer.Option("--ignore-eos", help="Never choose an end-of-sequence token.")
    ],
    "skip_special_tokens": Annotated[
        bool | None,
        typer.Option(
            "--skip-special-tokens/--keep-special-tokens", help="Whether the text leaves special tokens out."
        ),
    ],
    "seed": Annotated[int | None, typer.Option(help="Makes sampling repeatable.  [default: random]")],
}
SAMPLING_OF_MANY: dict[str, Any] = SAMPLING | {
    "n": Annotated[
        int | None, typer.Option("--samples", help="Answers per prompt (n); answer i has seed + i.")
    ],
    "logprobs": Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probabilities of the answer's tokens and of this many alternatives each."
        ),
    ],
    "prompt_logprobs": Annotated[int | None, typer.Option(help="The same for the prompt's tokens.")],
}

THREADS: dict[str, Any] = {
    "threads": Annotated[
        int | None,
        typer.Option(help="Threads to compute with on the CPU.  [default: as many as can run at once]"),
    ],
}
HOW_TO_RUN: dict[str, Any] = THREADS | {
    "quiet": Annotated[
        bool | None,
        typer.Option("--quiet", "-q", help="Write nothing but errors to standard error."),
    ],
}


def _with_options(options: dict[str, Any]) -> Callable[[Command], Command]:
    """Adds options to a command, which receives them as its **keywords."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        setattr(command, "__signature__", inspect.Signature([*own, *added]))  # noqa: B010
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return command

    return decorate


def _command(options: dict[str, Any]) -> Callable[[Command], Command]:
    """Registers a command with these options besides its own. Torch is imported when it runs, no sooner."""

    def decorate(command: Command) -> Command:
        @app.command()
        @functools.wraps(_with_options(options)(command))
        def run(threads: int | None = None, quiet: bool | None = None, **given: Any) -> None:
            with terminal.quiet_stderr() if quiet else nullcontext():
                _threads.choose_waiting_policy()  # before torch is imported
                _start()
                _threads.use_threads(threads)
                _interrupt.raise_again()
                command(**given)

        return command

    return decorate


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flashdecpp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None: ...


@_command(SAMPLING_OF_MANY | HOW_TO_RUN)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt.  [default: --file or standard input]")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Treat every line of the input as a prompt.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: a system message before the prompt.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="With --chat: a JSON list of functions that the model may call.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object per answer, as soon as it is complete.")
    ] = False,
    model: Model = "demo",
    device: Device = None,
    dtype: Dtype = None,
    phi: Phi = "auto",
    quantize: Quantize = "auto",
    max_len: MaxLen = None,
    max_batch: MaxBatch = 32,
    cache_tokens: CacheTokens = None,
    cuda_graphs: CudaGraphs = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Make answers independent of what they are batched with: every step computes a full batch, "
            "and no prompt uses the prefix cache.",
        ),
    ] = False,
    generation_config: GenerationConfig = True,
    **sampling: Any,
) -> None:
    """Continue a prompt (or answer it, with --chat); the text streams to standard output."""
    from . import answers

    prompts = _prompts(prompt, file, lines)
    params = _sampling_params(sampling)
    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    if tools is not None and not chat:
        raise ValueError("--tools needs --chat, whose template describes them to the model")
    if (params.logprobs, params.prompt_logprobs) != (None, None) and not as_json:
        raise ValueError("--logprobs and --prompt-logprobs need --json")
    functions = None if tools is None else _read_tools(tools)
    llm = _load(
        model,
        device,
        dtype,
        phi,
        quantize=quantize,
        max_len=max_len,
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        cuda_graphs=cuda_graphs,
        batch_invariant=batch_invariant,
        prefix_cache=not batch_invariant,
        generation_config=generation_config,
    )
    inputs = [_templated(llm, text, system, functions) for text in prompts] if chat else prompts
    several, interrupted = len(inputs) * params.n > 1, False
    if several or as_json:
        # On a terminal the answers would overwrite the bar.
        progress = several and not sys.stdout.isatty()
        try:
            with closing(llm.completions(inputs, params, progress=progress)) as completions:
                if as_json:
                    answers.print_json(completions, prompts)
                else:
                    answers.print_texts(completions, params.n)
        except KeyboardInterrupt:
            interrupted = True
    else:
        _, interrupted = answers.print_stream(llm.stream(inputs[0], params))
    answers.print_stats(llm)
    if interrupted:
        raise typer.Exit(130)


@_command(SAMPLING | HOW_TO_RUN)
def chat(
    model: Model = "demo",
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    phi: Phi = "auto",
    quantize: Quantize = "auto",
    max_len: MaxLen = None,
    cache_tokens: CacheTokens = None,
    cuda_graphs: CudaGraphs = True,
    generation_config: GenerationConfig = True,
    **sampling: Any,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation; /new starts a new one."""
    from .conversation import converse

    params = _sampling_params(sampling)
    llm = _load(
        model,
        device,
        dtype,
        phi,
        quantize=quantize,
        max_len=max_len,
        cache_tokens=cache_tokens,
        cuda_graphs=cuda_graphs,
        generation_config=generation_config,
    )
    converse(llm, params, system and terminal.clean(system))


@_command(HOW_TO_RUN)
def calibrate(
    model: Model = "demo",
    text: Annotated[
        Path | None, typer.Option(help="The text to measure.  [default: a short built-in one]")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Maximum tokens to measure.", min=1)] = 4096,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write phi to.  [default: next to the model]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the statistics to this PNG (needs matplotlib).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model's softmax inputs and write the unified maximum of every head next to the model."""
    from flashdecpp.calibration import calibrate as calibration
    from flashdecpp.calibration.text import TEXT
    from flashdecpp.models.phi import phi_path

    if plot is not None:
        calibration.need_matplotlib()
    _need_writable(output, plot)
    content = TEXT if text is None else terminal.read_text(text)
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


@_command(HOW_TO_RUN)
def tune(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Measure the linear layers of this model: 'demo', a folder or a .gguf file."
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Measure weights [N, K] given as 'N,K;N,K', such as '4096,4096;11008,4096'."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The table's file.  [default: where every run finds it]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot time over M to this PNG (needs matplotlib).")
    ] = None,
) -> None:
    """Measure GEMV, flat GEMM and BLAS on this device, so that linear() picks the fastest for each M.

    The result is two inflection points per weight [N, K]: GEMV below M1 rows, flat GEMM from M1 to M2, BLAS
    from M2 on. They are added to this device's table in tables/ of the cache folder ($FLASHDECPP_CACHE, else
    $XDG_CACHE_HOME/flashdecpp, else ~/.cache/flashdecpp), which later runs load by themselves;
    `flashdecpp info --shapes ...` shows the choices. Keep the device otherwise idle while it is measured.
    """
    import torch

    from flashdecpp.calibration import calibrate as calibration
    from flashdecpp.engine.llm import resolve_device, resolve_dtype
    from flashdecpp.loading.checkpoint import open_checkpoint
    from flashdecpp.tuning import Table, tuner, user_folder
    from flashdecpp.tuning import plot as drawing
    from flashdecpp.tuning.device import device_name
    from flashdecpp.tuning.table import parse_shapes

    if (model is None) == (shapes is None):
        raise ValueError("give either --model or --shapes, not both")
    if plot is not None:
        calibration.need_matplotlib()
    _need_writable(output, plot)
    target = resolve_device(device)
    if shapes is not None:
        wanted, own_dtype = parse_shapes(shapes), torch.float16
    elif model is not None:
        checkpoint = open_checkpoint(model)
        wanted, own_dtype = checkpoint.plan.linear_shapes, checkpoint.config.dtype
    table = Table(target.type, device_name(target))
    if output is None:
        with suppress(OSError):  # without the folder, _need_writable raises
            user_folder().mkdir(parents=True, exist_ok=True)
        output = user_folder() / table.file_name
        _need_writable(output)
    if output.exists():
        table = table.merged(Table.load(output))
    measured = tuner.tune(wanted, resolve_dtype(dtype, target, own_dtype), target)
    table.merged(measured).save(output)
    if plot is not None:
        drawing.plot(measured, plot)
    print(f"linear on {table.device}")
    for line in tuner.report(measured):
        print(f"  {line}")
    print(f"the table is {output}" + ("" if plot is None else f", the plot {plot}"))


@_command(THREADS)
def info(
    shapes: Annotated[
        str | None, typer.Option(help="Show what linear() runs for weights [N, K] given as 'N,K;N,K'.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of --shapes.  [default: bfloat16; on a GPU float16]")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Show decode_attention's choices for 'batch,q_len,q_heads,kv_heads,head_dim,max_len' "
            "(and ',block_size' for a paged cache); separate calls by ';'."
        ),
    ] = None,
) -> None:
    """Show what was built, the devices, and which kernels will run and why."""
    from flashdecpp.info import lines, parse_attention
    from flashdecpp.tuning.table import parse_shapes

    problems = [] if attention is None else parse_attention(attention)
    for line in lines([] if shapes is None else parse_shapes(shapes), dtype, problems):
        print(line)


def run() -> None:
    terminal.prepare()
    app()


def _prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or --file, not both")
    text = terminal.read_text(file) if prompt is None else terminal.clean(prompt)
    prompts = [line for line in text.split("\n") if line.strip()] if lines else [text]
    if not any(text.strip() for text in prompts):
        raise ValueError("the prompt is empty: give one as an argument, with --file or on standard input")
    return prompts


def _sampling_params(options: dict[str, Any]) -> SamplingParams:
    """SamplingParams from the options of SAMPLING that were given."""
    from flashdecpp import SamplingParams

    given = {name: value for name, value in options.items() if value is not None and value != []}
    for name in given.keys() & {"stop", "bad_words"}:
        given[name] = [terminal.clean(text) for text in given[name]]
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(entry) for entry in given["logit_bias"])
    return SamplingParams(**given)


def _bias(entry: str) -> tuple[int, float]:
    token, _, value = entry.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ValueError(f"--logit-bias must be ID=VALUE such as 257=-1.5, got {entry!r}") from None


def _read_tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(terminal.read_text(path))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: --tools must be JSON, a list of functions") from None
    if not isinstance(tools, list):
        raise ValueError(f"{path}: --tools must be a JSON list of functions, got a {type(tools).__name__}")
    return tools


def _need_writable(*paths: Path | None) -> None:
    """Raises an error for files that could not be written, before any long work."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(f"{path} can't be written: {path.parent} is not a writable folder")


def _load(model: str, device: str | None, dtype: str | None, phi: str, **options: Any) -> LLM:
    gc.disable()  # importing torch and reading a model leave no garbage, but passes over them take long
    try:
        from flashdecpp import LLM

        return LLM(model, device=device, dtype=dtype, phi=phi, **options)
    finally:
        gc.freeze()
        gc.enable()


def _templated(llm: LLM, text: str, system: str | None, tools: list[Any] | None) -> list[int]:
    opening = [{"role": "system", "content": terminal.clean(system)}] if system else []
    return llm.tokenizer.encode_chat([*opening, {"role": "user", "content": text}], tools)
