"""The model runner that users see."""

import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

import torch

from flashdecpp._arguments import flag, require, shown
from flashdecpp._gpu_support import gpu_problem
from flashdecpp._memory import available_bytes, gigabytes, peak_bytes
from flashdecpp._progress import progress_bar
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.loading.checkpoint import open_checkpoint
from flashdecpp.loading.formats import QUANTIZE
from flashdecpp.loading.generation_config import GenerationDefaults
from flashdecpp.loading.tokenizer import Message, Tool
from flashdecpp.loading.weights import load_weights
from flashdecpp.models.decoder import PREFILL_CHUNK, Decoder
from flashdecpp.models.phi import Phi, find_phi

from .config import EngineConfig
from .engine import Engine
from .prompts import Prompt, read_prompt, read_prompts
from .request import Request
from .results import Completion, Piece, Stats
from .sampling import SamplingParams
from .scheduler import Counts
from .surroundings import undisturbed

INVARIANT_SPLITS = 8  # splits of every sequence's keys if the batch must not affect their number


class LLM:
    """Loads a model and generates with it.

    model: "demo" (SmolLM2-135M-Instruct, fetched on first use), a Hugging Face folder, the name of a model on
        the Hugging Face Hub, or a GGUF file.
    device: default "cuda" if torch has a GPU that the op library can run on, else "cpu", with a warning if
        there is a GPU.
    dtype: a torch dtype or its name. The default is bfloat16 on the CPU; on a GPU it is the checkpoint's own
        half type, float16 for GGUF files, and bfloat16 for checkpoints in float32.
    max_len: maximum tokens of prompt and answer together. Default: the model's context.
    max_batch: maximum sequences that are decoded together. Other prompts wait.
    cache_tokens: size of the KV cache, which is reserved at once. By default, on a GPU it has room for a full
        batch of maximum length but leaves 600 MB free; on the CPU it has room for the call and at least one
        full context, of which only the used part occupies memory. If it is too small for all sequences, the
        youngest are moved to host memory and resume later.
    prefill_chunk: maximum prompt tokens that are computed between two decode steps.
    prefix_cache: reuse cached keys and values for a prompt with the same beginning as an earlier one (a
        conversation, a system message), unless their blocks have been reused. In half precision this may
        lead to another, equally good answer; without it, earlier calls have no effect on an answer.
    phi: the unified maximum of the softmax. "auto" reads the file that `flashdecpp calibrate` wrote next to
        the model, or is "carry" without one. "carry" uses the row maxima of each sequence's last step.
        "none" or None computes the online softmax. Otherwise the path of such a file, or float32 [q_heads]
        for each layer. phi affects the time, never the accuracy.
    quantize: the storage of the matrices. "auto" keeps Q4_0, Q4_1 and Q8_0 tensors of a GGUF file and stores
        everything else in dtype; "none" stores everything in dtype. "int8" (one scale per row) and "int4"
        (one scale per 32 weights) round float weights to nearest, except for the embedding and an lm_head
        tied to it, and keep tensors that a GGUF file has quantized. With "int4", weights whose rows are not
        a multiple of 32 stay in dtype. On a GPU, quantized weights are decoded in registers for up to 48
        rows, and dequantized first for more, as in prefill.
    cuda_graphs: on a GPU, capture decode steps at first use, one per power of two of sequences, and replay
        them. False launches every kernel of every step, to debug or profile.
    batch_invariant: make the bits of an answer independent of the other sequences, at the cost of steps that
        always compute max_batch rows and split all keys alike. With prefix_cache=False as well, a prompt
        always gets the same answer, even in half precision.
    generation_config: use the model's sampling defaults (generation_config.json) for values that
        SamplingParams leaves open; `defaults` holds them. False means greedy, with up to 256 tokens.

    Any number of threads may share an LLM, whose requests are decoded together. Their torch settings
    (autocast, default dtype and device, inference mode) do not affect the results. An error of a request is
    raised by the call that made it; other requests continue, and the LLM remains usable.

    Raises ModelError for anything wrong with the model or the arguments, OutOfMemory (a ModelError) if the
    weights or the cache do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        max_len: int | None = None,
        max_batch: int = 32,
        cache_tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        prefix_cache: bool = True,
        phi: Phi = "auto",
        quantize: str = "auto",
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
        generation_config: bool = True,
    ) -> None:
        if quantize not in QUANTIZE:
            raise ModelError(f"quantize must be one of {', '.join(QUANTIZE)}, got {quantize}")
        settings = EngineConfig(
            max_len=max_len,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
        )
        flag("generation_config", generation_config)
        self.device = resolve_device(device)
        with undisturbed(self.device, inference=False):
            checkpoint = open_checkpoint(model)
            self.name, self.path = checkpoint.name, checkpoint.path
            self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer
            self.dtype = resolve_dtype(dtype, self.device, self.config.dtype)
            if self.dtype == torch.float16 and not self.config.architecture.float16:
                raise ModelError(f"{self.config.architecture.name} overflows float16; run it in bfloat16")
            settings = settings.within(self.config.context)
            self.max_len = settings.length_limit
            self.defaults = checkpoint.defaults if generation_config else GenerationDefaults()
            plan = checkpoint.plan.quantized(quantize, checkpoint.source)
            if settings.cache_tokens is not None:
                self._check_room(plan.nbytes(self.dtype), settings.cache_tokens)
            source = find_phi(phi, checkpoint.path, self.config, self.device)
            weights = load_weights(plan, checkpoint.source, self.device, self.dtype)
            num_splits = INVARIANT_SPLITS if batch_invariant else 0
            self.decoder = Decoder(self.config, weights, self.max_len, source, num_splits)
            self._engine = Engine(self.decoder, checkpoint.eos_ids, settings)
        self.stats: Stats | None = None

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Answers prompts, in the order of the prompts.

        prompts: one or several. Each is a text or token ids: a list, an array, a 1-D tensor, or a mapping
            with input_ids, such as the output of a transformers tokenizer.
        params: for all prompts, or one per prompt. With params.n > 1, the answers to a prompt are adjacent.
        progress: show a bar, on stderr if it is a terminal or in a notebook.

        Up to max_batch sequences are decoded together, however many prompts there are. All arguments are
        checked before anything is computed. Raises ModelError for a prompt that cannot be answered.
        """
        answers = list(self.completions(prompts, params, progress=progress))
        return sorted(answers, key=lambda answer: (answer.index, answer.sample))

    def completions(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> Generator[Completion, None, None]:
        """As `generate`, but yields each answer as soon as it is complete. `index` and `sample` identify it.

        Errors in the arguments are raised by the call itself.
        """
        return self._completions(self._requests(prompts, params), progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Piece, None, None]:
        """Yields the answer to one prompt as it is generated.

        Errors in the arguments are raised by the call itself. Closing the generator ends the answer.
        """
        _need_one_answer(params)
        return self._pieces(self._requests([read_prompt(prompt)], params))

    @overload
    def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        tools: Iterable[Tool] | None = None,
        stream: Literal[False] = False,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        tools: Iterable[Tool] | None = None,
        stream: Literal[True],
    ) -> Generator[Piece, None, None]: ...

    @overload
    def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        tools: Iterable[Tool] | None = None,
        stream: bool,
    ) -> Completion | Generator[Piece, None, None]: ...

    def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        tools: Iterable[Tool] | None = None,
        stream: bool = False,
    ) -> Completion | Generator[Piece, None, None]:
        """Answers messages like {"role": "user", "content": "..."}.

        tools: functions, or JSON schemas of functions, that the chat template describes to the model.
        stream: return the generator of `stream` rather than a Completion.
        """
        _need_one_answer(params)
        ids = self.tokenizer.encode_chat(messages, tools, limit=self.max_len)
        return self.stream(ids, params) if stream else self.generate([ids], params)[0]

    def _completions(self, requests: list[Request], progress: bool) -> Generator[Completion, None, None]:
        with _AnswersBar(len(requests), progress) as bar:
            for request, piece in self._run(requests):
                bar.count(piece.token_id)
                if piece.token_id is None:
                    yield Completion.of(request)

    def _pieces(self, requests: list[Request]) -> Generator[Piece, None, None]:
        for _, piece in self._run(requests):
            yield piece

    def _run(self, requests: list[Request]) -> Iterator[tuple[Request, Piece]]:
        counts, fallbacks = replace(self._engine.scheduler.counts), int(self.decoder.fallbacks.item())
        try:
            yield from self._engine.run(requests)
        finally:
            self.stats = self._measure(requests, counts, fallbacks)

    def _requests(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None,
    ) -> list[Request]:
        """n requests per prompt, all of them checked."""
        texts = read_prompts(prompts)
        each = self._resolved(params, len(texts))
        pairs = enumerate(zip(texts, each, strict=True))
        return [request for index, (prompt, p) in pairs for request in self._samples(prompt, p, index)]

    def _resolved(
        self, params: SamplingParams | Iterable[SamplingParams] | None, prompts: int
    ) -> list[SamplingParams]:
        """The params of each prompt, with the model's defaults, checked against its vocabulary."""
        if params is None or isinstance(params, SamplingParams):
            single = (params or SamplingParams()).resolved(self.defaults)
            single.check_vocabulary(self.config.vocab)
            return [single] * prompts
        what = "SamplingParams, or one for each prompt"
        several = isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping)
        require(several, "params", what, params)
        given = list(params)
        for p in given:
            require(isinstance(p, SamplingParams), "params", what, p)
        if len(given) != prompts:
            raise ModelError(f"{prompts} prompts need as many SamplingParams, got {len(given)}")
        resolved = [p.resolved(self.defaults) for p in given]
        for p in resolved:
            p.check_vocabulary(self.config.vocab)
        return resolved

    def _samples(self, prompt: str | list[int], params: SamplingParams, index: int) -> list[Request]:
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(prompt, limit=self.max_len)
        else:
            text, ids = None, prompt
        outside = next((token for token in ids if not 0 <= token < self.config.vocab), None)
        if outside is not None:
            raise ModelError(f"token id {outside} is outside the vocabulary of {self.config.vocab}")
        if not ids:
            raise ModelError("the prompt is empty")
        if len(ids) >= self.max_len:
            remedy = "shorten it" if self.max_len == self.config.context else "shorten it or raise max_len"
            raise ModelError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer within {self.max_len}"
                f": {remedy}"
            )
        text = self.tokenizer.decode(ids) if text is None else text
        return Request.samples(text, ids, params, self.tokenizer, index)

    def _check_room(self, weight_bytes: int, cache_tokens: int) -> None:
        cache_bytes = self.config.cache_bytes_per_token(self.dtype) * cache_tokens
        free = available_bytes(self.device)
        if weight_bytes + cache_bytes > free:
            raise OutOfMemory(
                f"weights of {gigabytes(weight_bytes)} and a KV cache of {gigabytes(cache_bytes)} "
                f"({cache_tokens} tokens) don't fit {self.device}, where {gigabytes(free)} are free"
            )

    def _measure(self, requests: list[Request], before: Counts, fallbacks_before: int) -> Stats:
        engine, counts = self._engine, self._engine.scheduler.counts
        decoded = counts.decoded_tokens - before.decoded_tokens
        answers = [request.answer for request in requests]
        generated = sum(len(answer.token_ids) for answer in answers)
        begun = [request for request in requests if request.answer.first_token_at is not None]
        first = min((answer.first_token_at or 0.0 for answer in (r.answer for r in begun)), default=0.0)
        last = max((request.answer.last_token_at for request in begun), default=0.0)
        waits = (request.answer.time_to_first_token(request.started_at) for request in begun)
        return Stats(
            prompt_tokens=sum(len(request.prompt_ids) for request in requests if request.sample == 0),
            generated_tokens=generated,
            time_to_first_token=min(waits, default=0.0),
            tokens_per_second=(generated - 1) / (last - first) if last > first else 0.0,
            peak_memory=peak_bytes(self.device),
            softmax=self.decoder.phi.softmax,
            softmax_rows=decoded * self.config.layers * self.config.q_heads,
            softmax_fallbacks=int(self.decoder.fallbacks.item()) - fallbacks_before,
            weights=self.decoder.weights.storage_formats,
            weight_bytes=self.decoder.weights.nbytes,
            cached_prompt_tokens=counts.cached_prompt_tokens - before.cached_prompt_tokens,
            preemptions=counts.preemptions - before.preemptions,
            peak_blocks=engine.pool.peak_blocks,
            cache_blocks=engine.pool.num_blocks,
            cuda_graphs=engine.config.cuda_graphs,
            batch_invariant=engine.config.batch_invariant,
        )


class _AnswersBar:
    """A progress bar of complete answers that also shows the tokens per second."""

    def __init__(self, answers: int, shown: bool) -> None:
        self._tokens, self._started = 0, time.perf_counter()
        # miniters=0: redrawn for tokens, too, although only answers advance it.
        self._bar = progress_bar(total=answers, desc="generating", unit=" answers", shown=shown, miniters=0)

    def __enter__(self) -> "_AnswersBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, token: int | None) -> None:
        """Counts a token of any answer, or with None the end of one."""
        if self._bar.disable:
            return
        self._tokens += token is not None
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(token is None)


def _need_one_answer(params: SamplingParams | None) -> None:
    require(params is None or isinstance(params, SamplingParams), "params", "SamplingParams", params)
    if params is not None and params.n > 1:
        raise ModelError(f"stream and chat give one answer, got n={params.n}")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: the named one, else the GPU if it can be used. ModelError for an unusable one."""
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        problem = gpu_problem(torch.cuda.current_device())
        if problem is None:
            return torch.device("cuda")
        warnings.warn(f"the model runs on the CPU: {problem}", stacklevel=3)
        return torch.device("cpu")
    if not isinstance(device, str | torch.device):
        raise ModelError(f"device must be a name such as cpu or cuda, got {shown(device)}")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device {device!r} is not known; cpu and cuda are") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ModelError(f"device must be cpu or cuda, got {device}")
    if not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for, but torch finds no GPU here")
    count = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= count:
        last = f"cuda:{count - 1} is the last"
        raise ModelError(f"device {device} was asked for, but torch finds {count} GPUs here; {last}")
    problem = gpu_problem(torch.cuda.current_device() if chosen.index is None else chosen.index)
    if problem is not None:
        raise ModelError(f"device {device} was asked for, but {problem}")
    return chosen


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device, checkpoint: torch.dtype
) -> torch.dtype:
    """The dtype to run in: the named one, else LLM's default. ModelError for an unsupported one."""
    if dtype is None:
        own_half = device.type == "cuda" and checkpoint in (torch.float16, torch.bfloat16)
        return checkpoint if own_half else torch.bfloat16
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    allowed = (torch.float16, torch.bfloat16) + ((torch.float32,) if device.type == "cpu" else ())
    if named not in allowed:
        names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
        got = dtype if isinstance(dtype, str) else shown(dtype)
        raise ModelError(f"dtype on {device.type} must be one of {names}, got {got}")
    return named
