"""The tokenizer in a GGUF file: byte-pair encoding of bytes ("gpt2") or of SentencePiece ("llama")."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from flashdecpp.errors import ModelError

from .gguf_header import Metadata
from .sentencepiece import CONTROL, NORMAL, UNKNOWN, Vocabulary, add_special_tokens
from .templates import Message, Tool, render_chat, template_renderer
from .tokenizer import BaseTokenizer, model_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "tokenizer.ggml."
NO_TOKEN = (-1, 0xFFFFFFFF)  # ids that stand for no token

# Tokens that end a turn in addition to the file's end-of-sequence token, as in llama.cpp.
TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<turn|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
)

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


@dataclass(frozen=True)
class PreTokenizer:
    """Splits text before byte-pair encoding. Each pattern splits the pieces that the previous ones left."""

    patterns: Sequence[str]
    whole_words: bool = False  # words of the vocabulary are tokens without any merge
    adds_bos: bool = False  # unless the file says otherwise
    composes: bool = False  # normalizes to NFC first

    def tokenizer(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=self.whole_words))
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        if self.composes:
            tokenizer.normalizer = normalizers.NFC()
        return tokenizer


# By their names in tokenizer.ggml.pre, as llama.cpp's converter writes them
PRE_TOKENIZERS = {
    name: rule
    for rule, names in (
        (
            PreTokenizer([r"[\p{P}$+<=>^~|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"]),
            "default",
        ),
        (
            PreTokenizer([_GPT2_SPLIT]),
            "gpt-2 phi-2 olmo mpt jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
        ),
        (
            PreTokenizer([r"\p{N}", _GPT2_SPLIT]),
            "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        ),
        (
            PreTokenizer([_LLAMA3_SPLIT], whole_words=True, adds_bos=True),
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        ),
        (
            PreTokenizer([_LLAMA3_SPLIT]),
            "dbrx smaug-bpe glm4 chatglm-bpe",
        ),
        (
            PreTokenizer([_QWEN2_SPLIT], composes=True),
            "qwen2 deepseek-r1-qwen kormo megrez",
        ),
        (
            PreTokenizer([_QWEN2_SPLIT]),
            "stablelm2 hunyuan solar-open grok-2",
        ),
    )
    for name in names.split()
}


class GGUFTokenizer(BaseTokenizer):
    """Built from a file's metadata. Raises a ModelError for an unsupported type or inconsistent values."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        model = metadata.typed(PREFIX + "model", str, None)
        if model is None or PREFIX + "tokens" not in metadata:
            raise ModelError(f"{metadata.path}: the GGUF file has no tokenizer")
        if model not in ("llama", "gpt2"):
            raise ModelError(
                f"{metadata.path}: GGUF tokenizer {model!r} is not supported, only 'llama' and 'gpt2'"
            )
        self._tokens: list[str] = metadata.listed(PREFIX + "tokens", str)
        self._templates = self._read_templates()
        kinds = self._each_token("token_type", int, NORMAL)
        turn_ends = self._turn_ends(kinds)
        for token in turn_ends:
            kinds[token] = CONTROL
        with model_error(f"{metadata.path}: the tokenizer is invalid"):
            if model == "llama":
                add_space = metadata.typed(PREFIX + "add_space_prefix", bool, True)
                scores = self._each_token("scores", float)
                self._tokenizer = Vocabulary(self._tokens, scores, kinds, add_space).tokenizer()
            else:
                rule = self._pre_tokenizer()
                self._tokenizer = rule.tokenizer(self._vocabulary, self._merges())
                add_special_tokens(self._tokenizer, self._tokens, kinds)
        add_bos = metadata.typed(PREFIX + "add_bos_token", bool, model == "llama" or rule.adds_bos)
        bos = self._special_id("bos")
        self._prefix = [bos] if add_bos and bos is not None else []
        named = (self._special_id(name) for name in ("eos", "eot", "eom"))
        self.eos_ids = tuple(dict.fromkeys(token for token in (*named, *turn_ends) if token is not None))
        self.special_tokens = {
            index: self._tokens[index] for index, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)
        }

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat_prompt(self, messages: Iterable[Message], tools: Iterable[Tool] | None = None) -> str:
        return render_chat(self._renderer, messages, tools)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids] if add_special_tokens else ids

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self._tokens)}

    @cached_property
    def _renderer(self) -> "PreTrainedTokenizerBase":
        ids = {
            name: self._special_id(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        texts = {f"{name}_token": self._tokens[index] for name, index in ids.items() if index is not None}
        named = len(self._templates) > 1
        return template_renderer(self._templates if named else self._templates.get("default"), **texts)

    def _read_templates(self) -> dict[str, str]:
        """The chat template and any others by name."""
        key = "tokenizer.chat_template"
        names = [name for name in self._metadata if name.startswith(key + ".")]
        found = {name.removeprefix(key + "."): self._metadata.typed(name, str) for name in names}
        default = self._metadata.typed(key, str, None)
        return found if default is None else found | {"default": default}

    def _turn_ends(self, kinds: Sequence[int]) -> list[int]:
        """Those of TURN_ENDS that are control tokens or occur in the chat template."""
        template = "".join(self._templates.values())
        found = [(self._vocabulary[text], text) for text in TURN_ENDS if text in self._vocabulary]
        return [index for index, text in found if kinds[index] == CONTROL or text in template]

    def _special_id(self, name: str) -> int | None:
        key = f"{PREFIX}{name}_token_id"
        index = self._metadata.typed(key, int, None)
        if index is None or index in NO_TOKEN:
            return None
        if not 0 <= index < len(self._tokens):
            raise ModelError(
                f"{self._metadata.path}: {key} is {index}, but there are {len(self._tokens)} tokens"
            )
        return index

    def _each_token(self, name: str, kind: type, *default: int) -> list[Any]:
        """A number per token."""
        if default and PREFIX + name not in self._metadata:
            return list(default) * len(self._tokens)
        values = self._metadata.listed(PREFIX + name, kind)
        if len(values) != len(self._tokens):
            raise ModelError(
                f"{self._metadata.path}: {PREFIX}{name} has {len(values)} values for "
                f"{len(self._tokens)} tokens"
            )
        return list(values)

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self._metadata.typed(PREFIX + "pre", str, "")
        if not name:
            warnings.warn(
                f"{self._metadata.path} names no pre-tokenizer (tokenizer.ggml.pre): text is split by "
                "llama.cpp's default, which may not be what the model was trained with; convert it again",
                stacklevel=2,
            )
            name = "default"
        if name not in PRE_TOKENIZERS:
            raise ModelError(
                f"{self._metadata.path}: pre-tokenizer {name!r} is not supported, only "
                + ", ".join(sorted(PRE_TOKENIZERS))
            )
        return PRE_TOKENIZERS[name]

    def _merges(self) -> list[tuple[str, str]]:
        merges, known = [], self._vocabulary
        for merge in self._metadata.listed(PREFIX + "merges", str, ()):
            left, _, right = merge.partition(" ")
            if not (left in known and right in known and left + right in known):
                raise ModelError(
                    f"{self._metadata.path}: merge {merge!r} is not of two tokens that make a third"
                )
            merges.append((left, right))
        return merges
