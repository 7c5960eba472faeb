"""Log-probabilities of tokens, of the model's own distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashdecpp._host_copy import upload


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability: log_softmax of the logits as the model gives them, in float32.

    Penalties, biases, masks, temperature and filters come after. `top`: the most likely tokens of its place
    and their log-probabilities, most likely first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def pack(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """What `unpack` reads, for a row of logits [rows, vocab] each and its token, int64 [rows].

    float64 [rows, 1 + 2 * count], which holds token ids exactly: the token's, then the `count` best, then
    their ids. On the device of logits, without waiting for it.
    """
    logits = logits.float()
    log_sum = logits.logsumexp(1, keepdim=True)
    best, ids = logits.topk(count, dim=1)
    own = logits.gather(1, tokens[:, None])
    return torch.cat([(own - log_sum).double(), (best - log_sum).double(), ids.double()], dim=1)


def unpack(token: int, row: Sequence[float], count: int) -> TokenLogprob:
    """The first `count` of the best that are in a row of `pack`'s."""
    own, best = row[0], row[1:]
    ids = best[len(best) // 2 :]
    pairs = zip(ids[:count], best[:count], strict=True)
    return TokenLogprob(token, own, tuple((int(index), value) for index, value in pairs))


class PromptScores:
    """Puts the log-probabilities of a prompt's tokens into `scores`, as the prompt is computed.

    None for the first, which nothing comes before.
    """

    def __init__(self, scores: list[TokenLogprob | None], prompt_ids: Sequence[int], count: int) -> None:
        self._scores, self._prompt_ids, self._count = scores, prompt_ids, count

    def add(self, start: int, logits: torch.Tensor) -> None:
        """What the logits [rows, vocab] of the tokens from `start` on say of those that follow."""
        self._scores[start + 1 :] = []  # of a prompt that is computed again
        if start == 0:
            self._scores[:] = [None]
        following = self._prompt_ids[start + 1 : start + 1 + len(logits)]
        packed = pack(logits[: len(following)], upload(following, torch.int64, logits.device), self._count)
        rows = zip(following, packed.tolist(), strict=True)
        self._scores.extend(unpack(token, row, self._count) for token, row in rows)
