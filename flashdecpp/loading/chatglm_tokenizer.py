"""The tokenizers of ChatGLM2 and ChatGLM3, which transformers doesn't have."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from flashdecpp.errors import ModelError

from .sentencepiece import CONTROL, UNKNOWN, read_vocabulary
from .templates import Message, Tool, check_messages
from .tokenizer import BaseTokenizer, model_error

BEHIND = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
PREFIX = ("[gMASK]", "sop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # ChatGLM3's, behind the others

# Files of which one says so if the roles are tokens. The code among them is only read.
TELLING = ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")


class ChatGLMTokenizer(BaseTokenizer):
    """A SentencePiece model, and tokens behind it that only its authors' code knows.

    Every prompt begins with two of these, and none is ever read from a text.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if not path.exists():
            raise ModelError(f"{folder} has no tokenizer.model; copy the model's tokenizer files into it")
        vocabulary = read_vocabulary(path)
        self._roles = ROLES if _has_roles(folder) else ()
        behind = (*BEHIND, *self._roles)
        size = len(vocabulary.pieces)
        # Only here, not in the tokenizers library's object: "sop" may be a piece, too.
        self._behind = {token: size + index for index, token in enumerate(behind)}
        self._names = [*vocabulary.pieces, *behind]
        with model_error(f"the tokenizer in {path} makes no sense"):
            self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = True  # as text, that is
        texts = enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
        special = {index: piece for index, (piece, kind) in texts if kind in (CONTROL, UNKNOWN)}
        self.special_tokens = special | {index: token for token, index in self._behind.items()}
        ends = [index for index, piece in enumerate(vocabulary.pieces) if piece == "</s>"]
        # The model of the third generation hands over to the user, or to a tool that it calls.
        self.eos_ids = (
            *ends,
            *(self._behind[role] for role in ("<|user|>", "<|observation|>") if self._roles),
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        hidden = self.special_tokens if skip_special_tokens else {}
        shown = (token for token in ids if token not in hidden and token < len(self._names))
        return self._tokenizer.decoder.decode([self._names[token] for token in shown])

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
        """ChatGLM2: rounds of questions and answers. ChatGLM3: as encode_chat, with the tokens' texts."""
        messages = self._check(messages, tools)
        if self._roles:
            turns = (f"{role}{metadata}\n {content}" for role, metadata, content in _turns(messages))
            return "".join((*PREFIX, *turns, "<|assistant|>"))
        parts, rounds = [], 0
        for message in messages:
            if message["role"] == "user":
                rounds += 1
                parts.append(f"[Round {rounds}]\n\n\u95ee\uff1a{message['content']}\n\n\u7b54\uff1a")
            else:
                parts.append(f"{message['content']}\n\n")
        return "".join(parts)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        limit: int | None = None,
    ) -> list[int]:
        if not self._roles:
            return self.encode(self.chat_prompt(messages, tools), limit=limit)
        ids = [self._behind[token] for token in PREFIX]
        for role, metadata, content in _turns(self._check(messages, tools)):
            texts = (f"{metadata}\n", content)
            encoded = (self.encode(text, add_special_tokens=False, limit=limit) for text in texts)
            ids += [self._behind[role], *chain.from_iterable(encoded)]
        return [*ids, self._behind["<|assistant|>"]]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        prefix = [self._behind[token] for token in PREFIX] if add_special_tokens else []
        return [*prefix, *ids]

    def _check(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[Message]:
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
                raise ModelError(f"{name}'s chat format has no messages whose content is not a string")
        return messages


def _turns(messages: Sequence[Message]) -> list[tuple[str, str, str]]:
    """Role, what stands beside it (the name of a tool that is called), and content."""
    return [(f"<|{m['role']}|>", m.get("metadata") or "", m["content"]) for m in messages]


def _has_roles(folder: Path) -> bool:
    for file in (folder / name for name in TELLING):
        if file.is_file():
            with file.open("rb") as opened:
                text = opened.read(1 << 20)
            if b"<|assistant|>" in text or b"chatglm3" in text.lower():
                return True
    return False
