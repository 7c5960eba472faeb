"""The tokenizers of ChatGLM2 and ChatGLM3, which transformers does not support."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from flashdecpp.errors import ModelError

from .sentencepiece import CONTROL, UNKNOWN, read_vocabulary
from .templates import Message, Tool, check_messages
from .tokenizer import BaseTokenizer, model_error

ADDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
PREFIX = ("[gMASK]", "sop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # ChatGLM3's, with ids after ADDED

# Files that mention the roles if these are tokens. The code is only searched, never run.
ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")


class ChatGLMTokenizer(BaseTokenizer):
    """A SentencePiece model, followed by tokens that only its authors' code defines.

    Every prompt begins with two of them, and text is never encoded to them.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if not path.exists():
            raise ModelError(f"{folder} has no tokenizer.model; copy the model's tokenizer files into it")
        vocabulary = read_vocabulary(path)
        self._roles = ROLES if _has_roles(folder) else ()
        added = (*ADDED, *self._roles)
        size = len(vocabulary.pieces)
        # Not added to the tokenizers library's object, since "sop" may also be a piece.
        self._added = {token: size + index for index, token in enumerate(added)}
        self._names = [*vocabulary.pieces, *added]
        with model_error(f"the tokenizer in {path} is invalid"):
            self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = True  # as plain text
        texts = enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
        special = {index: piece for index, (piece, kind) in texts if kind in (CONTROL, UNKNOWN)}
        self.special_tokens = special | {index: token for token, index in self._added.items()}
        ends = [index for index, piece in enumerate(vocabulary.pieces) if piece == "</s>"]
        # ChatGLM3 hands over to the user, or to a tool that it calls.
        self.eos_ids = (
            *ends,
            *(self._added[role] for role in ("<|user|>", "<|observation|>") if self._roles),
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        hidden = self.special_tokens if skip_special_tokens else {}
        shown = (token for token in ids if token not in hidden and token < len(self._names))
        return self._tokenizer.decoder.decode([self._names[token] for token in shown])

    def chat_prompt(self, messages: Iterable[Message], tools: Iterable[Tool] | None = None) -> str:
        """ChatGLM2: rounds of questions and answers. ChatGLM3: the text of encode_chat's tokens."""
        messages = self._check(messages, tools)
        if self._roles:
            turns = (f"{role}{metadata}\n {content}" for role, metadata, content in _turns(messages))
            return "".join((*PREFIX, *turns, "<|assistant|>"))
        texts, rounds = [], 0
        for message in messages:
            if message["role"] == "user":
                rounds += 1
                texts.append(f"[Round {rounds}]\n\n\u95ee\uff1a{message['content']}\n\n\u7b54\uff1a")
            else:
                texts.append(f"{message['content']}\n\n")
        return "".join(texts)

    def encode_chat(
        self,
        messages: Iterable[Message],
        tools: Iterable[Tool] | None = None,
        *,
        limit: int | None = None,
    ) -> list[int]:
        if not self._roles:
            return self.encode(self.chat_prompt(messages, tools), limit=limit)
        ids = [self._added[token] for token in PREFIX]
        for role, metadata, content in _turns(self._check(messages, tools)):
            texts = (f"{metadata}\n", content)
            encoded = (self.encode(text, add_special_tokens=False, limit=limit) for text in texts)
            ids += [self._added[role], *chain.from_iterable(encoded)]
        return [*ids, self._added["<|assistant|>"]]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        prefix = [self._added[token] for token in PREFIX] if add_special_tokens else []
        return [*prefix, *ids]

    def _check(self, messages: Iterable[Message], tools: Iterable[Tool] | None) -> list[Message]:
        name = "ChatGLM3" if self._roles else "ChatGLM2"
        roles = [role.strip("<|>") for role in self._roles] or ["user", "assistant"]
        if tools:
            raise ModelError(f"{name}'s chat format has no tools")
        messages = check_messages(messages)
        for message in messages:
            if message["role"] not in roles:
                raise ModelError(
                    f"{name}'s chat format has no role {message['role']!r}, only {', '.join(roles)}"
                )
            if not isinstance(message.get("content"), str):
                raise ModelError(f"{name}'s chat format has only messages whose content is a string")
        return messages


def _turns(messages: Iterable[Message]) -> list[tuple[str, str, str]]:
    """Role, metadata (the name of the called tool) and content of each message."""
    return [(f"<|{m['role']}|>", m.get("metadata") or "", m["content"]) for m in messages]


def _has_roles(folder: Path) -> bool:
    """Whether the roles are tokens, as in ChatGLM3."""
    for file in (folder / name for name in ROLE_FILES):
        if file.is_file():
            with file.open("rb") as opened:
                text = opened.read(1 << 20)
            if b"<|assistant|>" in text or b"chatglm3" in text.lower():
                return True
    return False
