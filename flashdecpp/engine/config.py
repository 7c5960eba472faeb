"""The settings of an engine, checked once."""

from dataclasses import dataclass, replace

from flashdecpp._arguments import flag, integer, is_integer, require
from flashdecpp.models.decoder import PREFILL_CHUNK
from flashdecpp.models.kv_cache import blocks_for

MAX_BATCH = 4096  # rows of the tables on the device


@dataclass(frozen=True)
class EngineConfig:
    """Settings that `LLM` documents, under the same names. `max_len` None is the model's context."""

    max_len: int | None = None
    max_batch: int = 32
    cache_tokens: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    prefix_cache: bool = True
    cuda_graphs: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        checked = {
            "max_batch": integer("max_batch", self.max_batch, 1, MAX_BATCH),
            "prefill_chunk": integer("prefill_chunk", self.prefill_chunk, 1),
        }
        if self.cache_tokens is not None:
            checked["cache_tokens"] = integer("cache_tokens", self.cache_tokens, 1)
        for name in ("prefix_cache", "cuda_graphs", "batch_invariant"):
            checked[name] = flag(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def length_limit(self) -> int:
        """max_len, once `within` has filled it in."""
        if self.max_len is None:
            raise ValueError("max_len is not filled in yet")
        return self.max_len

    def within(self, context: int) -> "EngineConfig":
        """The same with max_len filled in, which must fit the model's context."""
        max_len = context if self.max_len is None else self.max_len
        fits = is_integer(max_len) and 0 < max_len <= context
        require(fits, "max_len", f"from 1 to the model's context of {context}", max_len)
        return replace(self, max_len=int(max_len))

    @property
    def cache_blocks(self) -> int | None:
        """The fixed size of the cache; None sizes it by need and by the free memory."""
        return None if self.cache_tokens is None else blocks_for(self.cache_tokens)
