"""LLM: a model that generates text."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from flashdecpp._arguments import flag, require, shown
from flashdecpp._library import gpu_library
from flashdecpp._memory import available_bytes, gigabytes, peak_bytes
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

INVARIANT_SPLITS = 8  # of every sequence's keys, where the number mustn't depend on the batch


class LLM:
    """Loads a model and generates with it.

    model: "demo" (SmolLM2-135M-Instruct, fetched on first use), a Hugging Face folder, or a .gguf file.
    device: None takes "cuda" where torch has a GPU and the CUDA library is loaded, else "cpu".
    dtype: a torch dtype or its name. Default: bfloat16 on the CPU; on a GPU the checkpoint's own half type,
        float16 for GGUF files, and bfloat16 for checkpoints in float32.
    max_len: most tokens of prompt and answer together; the model's context if None.
    max_batch: sequences that are decoded together; more prompts than that take turns.
    cache_tokens: size of the KV cache, reserved at once. None makes it, on a GPU, as large as a full batch
        can ever need, but leaves 600 MB free; on the CPU as large as the call can need, at least one whole
        context, of which only what is used takes memory. If it is too small for all, the youngest
        sequences wait in the host's memory and go on later.
    prefill_chunk: tokens of prompts that are computed between two decode steps, at most.
    prefix_cache: a prompt that begins like an earlier one (a conversation, a system message) finds that
        beginning in the cache, as long as its blocks were not needed for others. In half precision the answer
        may then be another, equally good one; without it, it is the same whatever came before.
    phi: the unified maximum of the softmax. "auto": from the file that `flashdecpp calibrate` wrote beside
        the model if it's there, else "carry". "carry": every sequence and head takes the row maximum of its
        last step. "none" or None: online softmax. Else the path of such a file, or float32 [q_heads] for
        each layer. It changes the time, never the result.
    quantize: what the matrices are stored in. "auto": the Q4_0, Q4_1 and Q8_0 tensors of a GGUF file as they
        are, everything else in dtype. "none": everything in dtype. "int8" (a scale a row) and
        "int4" (a scale for 32 weights): float weights are rounded to the nearest, but for the embedding, and
        so an lm_head that is tied to it; tensors that a GGUF file has quantised so stay as they are. Weights
        whose rows are not a multiple of 32 stay in dtype with "int4". On a GPU quantised weights are decoded
        in registers for up to 48 rows; for more, in prefill, they are dequantised first.
    cuda_graphs: on a GPU, decode steps are captured at first use, one for each power of two of sequences, and
        replayed; False launches every kernel of every step, to debug or profile.
    batch_invariant: the bits of an answer don't depend on what else is decoded, at the price of steps that
        always compute max_batch rows and split keys alike. Together with prefix_cache=False a prompt then
        gets the same answer always, in half precision too.
    generation_config: what the model says of its sampling (generation_config.json: temperature, top_k and
        more) holds where SamplingParams say nothing; `defaults` has it. False is greedy, up to 256 tokens.

    Any number of threads may use it at once, and their requests are decoded together. What they have set in
    torch (autocast, default dtype and device, inference mode) doesn't change what it computes. An error in
    one request is raised by its own call and ends no other's; the LLM stays usable.
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
            self.max_len = settings.max_len
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
        """Answers to prompts, in the order of the prompts.

        prompts: one or several, each a text or token ids: a list, an array, a 1-D tensor, or a mapping with
            input_ids, such as transformers' tokenizers return. A single one gives a list of one.
        params: for all, or one for each prompt; where params.n is more than one, the answers to a prompt
            follow each other.
        progress: a bar on stderr, where that's a terminal.

        Any number of prompts keeps up to max_batch sequences decoding together. Raises ModelError for what
        can't be answered: all arguments are checked before anything is computed.
        """
        answers = list(self.completions(prompts, params, progress=progress))
        return sorted(answers, key=lambda answer: (answer.index, answer.sample))

    def completions(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> Iterator[Completion]:
        """What generate gives, each answer as soon as it has ended: `index` and `sample` say which it is.

        The call itself raises errors of its arguments.
        """
        return self._completions(self._requests(prompts, params), progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The answer to one prompt as it is generated. The call itself raises errors of its arguments."""
        _need_one_answer(params)
        return self._pieces(self._requests([read_prompt(prompt)], params))

    def chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        stream: bool = False,
    ) -> Completion | Iterator[Piece]:
        """The model's answer to messages like {"role": "user", "content": "..."}.

        tools: functions, or JSON schemas of functions, that the chat template tells the model of.
        """
        _need_one_answer(params)
        ids = self.tokenizer.encode_chat(messages, tools, limit=self.max_len)
        return self.stream(ids, params) if stream else self.generate([ids], params)[0]

    def _completions(self, requests: list[Request], progress: bool) -> Iterator[Completion]:
        with _ProgressBar(len(requests), progress) as bar:
            for request, piece in self._run(requests):
                bar.count(piece.token_id)
                if piece.token_id is None:
                    yield Completion.of(request)

    def _pieces(self, requests: list[Request]) -> Iterator[Piece]:
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
        """n requests for each prompt, once nothing is wrong with any of them."""
        texts = read_prompts(prompts)
        each = self._resolved(params, len(texts))
        pairs = enumerate(zip(texts, each, strict=True))
        return [request for index, (prompt, p) in pairs for request in self._samples(prompt, p, index)]

    def _resolved(
        self, params: SamplingParams | Iterable[SamplingParams] | None, prompts: int
    ) -> list[SamplingParams]:
        """A prompt's params for each, with the model's defaults, checked against its vocabulary."""
        single = params is None or isinstance(params, SamplingParams)
        what = "SamplingParams, or as many as there are prompts"
        several = isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping)
        require(single or several, "params", what, params)
        given = [SamplingParams() if params is None else params] if single else list(params)
        for p in given:
            require(isinstance(p, SamplingParams), "params", what, p)
        if not single and len(given) != prompts:
            raise ModelError(f"{prompts} prompts need as many SamplingParams, got {len(given)}")
        resolved = [p.resolved(self.defaults) for p in given]
        for p in resolved:
            p.check_vocabulary(self.config.vocab)
        return resolved * prompts if single else resolved

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
            raise ModelError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer within {self.max_len}"
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
        first = min((request.answer.first_token_at for request in begun), default=0.0)
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


class _ProgressBar(tqdm):
    """Finished answers of many, with the tokens a second so far."""

    def __init__(self, answers: int, shown: bool) -> None:
        self._tokens, self._started = 0, time.perf_counter()
        super().__init__(
            total=answers,
            unit=" answers",
            desc="generating",
            file=sys.stderr,
            leave=False,
            miniters=0,  # tokens alone move its figure
            disable=None if shown else True,
        )

    def count(self, token: int | None) -> None:
        """A token of any answer; None at the end of one."""
        if self.disable:
            return
        self._tokens += token is not None
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self.update(token is None)


def _need_one_answer(params: SamplingParams | None) -> None:
    require(params is None or isinstance(params, SamplingParams), "params", "SamplingParams", params)
    if params is not None and params.n > 1:
        raise ModelError(f"stream and chat give one answer, got n={params.n}")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: the one that is named, else the GPU if there is one. ModelError for others."""
    if device is None:
        usable = torch.cuda.is_available() and gpu_library().loaded
        return torch.device("cuda" if usable else "cpu")
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
    return chosen


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device, checkpoint: torch.dtype
) -> torch.dtype:
    """The dtype to run in: the one that is named, else LLM's default. ModelError for what can't be run in."""
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
