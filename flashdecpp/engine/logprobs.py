"""Log-probabilities of tokens under the model's own distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashdecpp._host_copy import upload


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability: log_softmax in float32 of the model's unmodified logits.

    It ignores penalties, biases, masks, temperature and filters. `top`: the requested number of likeliest
    tokens at its position and their log-probabilities, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def pack(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probabilities of `tokens`, int64 [rows], under logits [rows, vocab], for `unpack`.

    Returns float64 [rows, 1 + 2 * count], which holds token ids exactly: the token's log-probability, the
    `count` highest ones, and their ids. Runs on the device of logits without synchronizing.
    """
    logits = logits.float()
    log_sum = logits.logsumexp(1, keepdim=True)
    best, ids = logits.topk(count, dim=1)
    own = logits.gather(1, tokens[:, None])
    return torch.cat([(own - log_sum).double(), (best - log_sum).double(), ids.double()], dim=1)


def unpack(token: int, row: Sequence[float], count: int) -> TokenLogprob:
    """Reads a row of `pack`'s result, with the first `count` of its likeliest tokens."""
    own, best = row[0], row[1:]
    ids = best[len(best) // 2 :]
    pairs = zip(ids[:count], best[:count], strict=True)
    return TokenLogprob(token, own, tuple((int(index), value) for index, value in pairs))


class PromptScores:
    """Appends the log-probabilities of a prompt's tokens to `scores` while the prompt is computed.

    The first token, which has no predecessor, gets None.
    """

    def __init__(self, scores: list[TokenLogprob | None], prompt_ids: Sequence[int], count: int) -> None:
        self._scores, self._prompt_ids, self._count = scores, prompt_ids, count

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Scores the tokens that follow those of logits [rows, vocab], the first of which is at `start`."""
        self._scores[start + 1 :] = []  # a preempted prompt is computed again
        if start == 0:
            self._scores[:] = [None]
        following = self._prompt_ids[start + 1 : start + 1 + len(logits)]
        packed = pack(logits[: len(following)], upload(following, torch.int64, logits.device), self._count)
        rows = zip(following, packed.tolist(), strict=True)
        self._scores.extend(unpack(token, row, self._count) for token, row in rows)
