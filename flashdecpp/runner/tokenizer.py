"""Text to token ids and back: a Hugging Face folder's tokenizer, or one built from a GGUF's vocabulary."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .errors import ModelError
from .sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary

Message = Mapping[str, str]  # {"role": ..., "content": ...}

# The rules that split text before byte-pair encoding, by GGUF's tokenizer.ggml.pre
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
BYTE_LEVEL_RULES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


class BaseTokenizer:
    """What the runner asks of a tokenizer."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        raise NotImplementedError

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The messages in the model's chat format, up to where its answer begins."""
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of chat_prompt, whose template writes the special tokens itself."""
        return self.encode(self.chat_prompt(messages), add_special_tokens=False)


class FolderTokenizer(BaseTokenizer):
    """The tokenizer files of a Hugging Face folder, through transformers."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ModelError(f"{folder} has no tokenizer.json; copy the model's tokenizer files into it")
        from transformers import AutoTokenizer  # late: slow to import

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise ModelError(f"the tokenizer in {folder} can't be loaded: {_first_line(error)}") from error
        eos = self._tokenizer.eos_token_id
        self.eos_ids = () if eos is None else (eos,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        if not self._tokenizer.chat_template:
            raise ModelError("the model has no chat template; use generate with a plain prompt")
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise ModelError(f"the chat template refuses these messages: {_first_line(error)}") from error


class ChatGLMTokenizer(BaseTokenizer):
    """ChatGLM2's: a SentencePiece model, and tokens behind it that only its authors' code knows.

    Every prompt begins with two of these, and none is ever read from a text.
    """

    BEHIND = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    PREFIX = ("[gMASK]", "sop")

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if not path.exists():
            raise ModelError(f"{folder} has no tokenizer.model; copy the model's tokenizer files into it")
        vocabulary = read_vocabulary(path)
        self._tokenizer = vocabulary.tokenizer()
        size = len(vocabulary.pieces)
        self._prefix = [size + self.BEHIND.index(token) for token in self.PREFIX]
        texts = (kind not in (CONTROL, UNKNOWN) for kind in vocabulary.kinds)
        self._texts = {index for index, is_text in enumerate(texts) if is_text}
        self.eos_ids = (vocabulary.pieces.index("</s>"),)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([token for token in ids if token in self._texts])

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """Rounds of questions and answers."""
        parts, rounds = [], 0
        for message in messages:
            if message["role"] == "user":
                rounds += 1
                parts.append(f"[Round {rounds}]\n\n\u95ee\uff1a{message['content']}\n\n\u7b54\uff1a")
            elif message["role"] == "assistant":
                parts.append(f"{message['content']}\n\n")
            else:
                raise ModelError(f"ChatGLM2's chat format has no role {message['role']!r}")
        return "".join(parts)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.chat_prompt(messages))


class GGUFTokenizer(BaseTokenizer):
    """Byte-pair encoding out of GGUF metadata: byte-level ("gpt2") or SentencePiece's ("llama")."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
        if "tokenizer.ggml.tokens" not in metadata:
            raise ModelError("the GGUF file has no tokenizer")
        if kind != "llama" and (kind != "gpt2" or rule not in BYTE_LEVEL_RULES):
            raise ModelError(
                f"GGUF tokenizer {kind!r} with pre-tokenizer {rule!r} is not supported, "
                "only 'llama', and 'gpt2' with " + ", ".join(BYTE_LEVEL_RULES)
            )
        self._metadata = metadata
        self._tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(self._tokens))
        if kind == "llama":
            add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
            scores = metadata["tokenizer.ggml.scores"]
            self._tokenizer = Vocabulary(self._tokens, scores, kinds, add_space).tokenizer()
        else:
            self._tokenizer = _byte_level_bpe(metadata, rule)
        self._tokenizer.add_tokens(
            [
                AddedToken(token, special=its == CONTROL, normalized=False)
                for token, its in zip(self._tokens, kinds, strict=True)
                if its in (CONTROL, USER_DEFINED)
            ]
        )
        self._bos: int | None = metadata.get("tokenizer.ggml.bos_token_id")
        # llama.cpp prepends the first token for these two where the file doesn't say.
        first = kind == "llama" or rule == "llama-bpe"
        self._add_bos: bool = metadata.get("tokenizer.ggml.add_bos_token", first)
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        self.eos_ids = () if eos is None else (eos,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids] if add_special_tokens and self._add_bos and self._bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        template = self._metadata.get("tokenizer.chat_template")
        if not template:
            raise ModelError("the model has no chat template; use generate with a plain prompt")

        def token(name: str) -> str:
            index = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
            return "" if index is None else self._tokens[index]

        return _render(template, messages=messages, bos_token=token("bos"), eos_token=token("eos"))


class TextStream:
    """Turns tokens into text as they come, never a broken character, and stops at a stop string.

    What could be the beginning of a stop string is held back until it's known not to be one.
    """

    def __init__(self, tokenizer: BaseTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # ids [start, read) have been decoded; they go along so that the joint to the next token is right.
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        longer = self._tokenizer.decode(self._ids[self._start :])
        if len(longer) <= len(known) or longer.endswith("\ufffd"):
            return ""  # a special token, or the first bytes of a character
        self._start, self._read = self._read, len(self._ids)
        return self._emit(longer[len(known) :], final=False)

    def finish(self) -> str:
        """The rest, once no token will follow."""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        rest = self._tokenizer.decode(self._ids[self._start :])[len(known) :]
        self._start = self._read = len(self._ids)
        return self._emit(rest, final=True)

    def _emit(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + piece
        cut = min((at for at in (held.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            sure, self._held = held[:cut], ""
        else:
            keep = 0 if final else self._possible_stop(held)
            sure, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += sure
        return sure

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _byte_level_bpe(metadata: Mapping[str, Any], rule: str) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])

    if rule == "llama-bpe":
        return split(LLAMA3_SPLIT)
    if rule == "qwen2":
        return split(QWEN2_SPLIT)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _render(template: str, **variables: Any) -> str:
    """Chat templates come with the model, so they run in jinja's sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    try:
        return environment.from_string(template).render(add_generation_prompt=True, **variables)
    except TemplateError as error:
        raise ModelError(f"the chat template refuses these messages: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
