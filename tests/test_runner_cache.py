"""The pool of cache blocks: their users, their contents, and the order of reuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from runner_models import save_model

from flashdecpp import LLM, BlockPool, KVCache, ModelError, OutOfMemory
from flashdecpp.engine.request import Request
from flashdecpp.models.kv_cache import BLOCK_SIZE

BLOCKS = 6


def key(number: int) -> bytes:
    return bytes([number])


class PoolMachine(RuleBasedStateMachine):
    """Users allocate, share, register and free blocks at random; a simple model predicts every result."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.users: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # the key registered for each block
        self.freed: list[int] = []  # free blocks, in the order in which they were freed

    def is_free(self, block: int) -> bool:
        return not any(block in user for user in self.users)

    @rule(count=st.integers(1, BLOCKS))
    def allocate(self, count: int) -> None:
        free = [block for block in range(BLOCKS) if self.is_free(block)]
        if count > len(free):
            with pytest.raises(OutOfMemory, match=f"{count} cache blocks are wanted, {len(free)} are free"):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count and set(taken) <= set(free)
        # Registered blocks are reused last, oldest first.
        empty = [block for block in free if block not in self.content]
        full = [block for block in self.freed if block in self.content]
        assert set(taken[: len(empty)]) <= set(empty)
        assert taken[len(empty) :] == full[: max(0, count - len(empty))]
        for block in taken:
            self.content.pop(block, None)
        self.freed = [block for block in self.freed if block not in taken]
        self.users.append(taken)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data) -> None:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.content.values())), unique=True))
        found = self.pool.find(wanted)
        assert [self.content[block] for block in found] == wanted
        assert self.pool.find([b"nowhere", *wanted]) == []
        self.users.append(self.pool.share(found))
        self.freed = [block for block in self.freed if block not in found]

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), number=st.integers(0, 9))
    def register(self, data, number: int) -> None:
        fresh = {block for user in self.users for block in user} - self.content.keys()
        if fresh:
            block = data.draw(st.sampled_from(sorted(fresh)))
            self.pool.register(block, key(number))
            if key(number) not in self.content.values():
                self.content[block] = key(number)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def free(self, data) -> None:
        blocks = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.pool.free(blocks)
        self.freed += [block for block in reversed(blocks) if self.is_free(block)]

    @invariant()
    def uses_are_counted(self) -> None:
        used = {block for user in self.users for block in user}
        assert self.pool.used_blocks == len(used) <= self.pool.peak_blocks
        assert self.pool.free_blocks == BLOCKS - len(used)
        for block in range(BLOCKS):
            assert self.pool.users(block) == sum(block in user for user in self.users)

    @invariant()
    def content_is_found_until_its_block_is_allocated(self) -> None:
        for block, registered in self.content.items():
            assert self.pool.find([registered]) == [block]
        for number in range(10):
            if key(number) not in self.content.values():
                assert self.pool.find([key(number)]) == []


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize("block", [-1, 0, 1, BLOCKS])
def test_a_block_that_is_not_in_use_cannot_be_freed(block):
    pool = BlockPool(BLOCKS)
    kept = pool.allocate(2)
    pool.free([0, 1])
    with pytest.raises(ValueError, match=f"block {block} of {BLOCKS} is not in use"):
        pool.free([block])
    assert kept == [0, 1] and pool.free_blocks == BLOCKS


def test_a_cache_is_built_from_plain_sizes():
    cache = KVCache(
        layers=2, kv_heads=3, head_dim=24, num_blocks=5, block_size=8, dtype=torch.float16, device="cpu"
    )
    assert len(cache.layers) == 2 and (cache.num_blocks, cache.block_size) == (5, 8)
    for k, v in cache.layers:
        assert k.shape == v.shape == (5, 8, 3, 24) and k.dtype == v.dtype == torch.float16
        assert k.is_contiguous() and v.is_contiguous() and k.data_ptr() != v.data_ptr()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"block_size": 12}, "block_size must be 1 or a multiple of 8, got 12"),
        ({"head_dim": 20}, "head_dim must be a multiple of 8, got 20"),
        ({"head_dim": 264}, "head_dim must be at most 256, got 264"),
        ({"kv_heads": 1.5}, "kv_heads must be an integer, got 1.5"),
    ],
    ids=str,
)
def test_sizes_of_a_cache_are_checked(wrong, match):
    sizes = {"layers": 2, "kv_heads": 1, "head_dim": 16, "num_blocks": 4} | wrong
    with pytest.raises(ModelError, match=match):
        KVCache(**sizes, dtype=torch.float32, device="cpu")


def test_blocks_are_copied_saved_and_restored(tmp_path):
    save_model(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    cache = KVCache.for_model(llm.config, 5, llm.device, llm.dtype)
    for k, v in cache.layers:
        k.copy_(torch.randn_like(k))
        v.copy_(torch.randn_like(v))
    before = [(k.clone(), v.clone()) for k, v in cache.layers]
    cache.copy(0, 2)
    saved = cache.save([4, 1])
    cache.restore([1, 3], saved)
    for after, was in zip(cache.layers, before, strict=True):
        for now, then in zip(after, was, strict=True):
            assert torch.equal(now, then[[0, 4, 0, 1, 4]])


def test_a_blocks_key_covers_all_tokens_up_to_its_end(tmp_path):
    save_model(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")

    def keys(tokens: list[int], rotation: int = 0) -> list[bytes]:
        (request,) = llm._requests([tokens], None)
        return request.block_keys(len(tokens) // BLOCK_SIZE, rotation)

    tokens = list(range(3 * BLOCK_SIZE))
    changed = [99, *tokens[1:]]
    later = [*tokens[:-1], 99]
    assert len(set(keys(tokens))) == 3
    assert keys(tokens)[:2] == keys(later)[:2] and keys(tokens)[2] != keys(later)[2]
    assert not set(keys(tokens)) & set(keys(changed))  # although the last two blocks hold the same tokens
    assert not set(keys(tokens)) & set(keys(tokens, rotation=48))
    (request,) = llm._requests([tokens[:20]], None)
    assert isinstance(request, Request)
    request.token_ids += tokens[20:]  # an answer's tokens count like a prompt's
    assert request.block_keys(3, 0) == keys(tokens)


def test_caches_share_no_storage():
    """torch.compile clones aliased arguments that are updated in place: the whole cache, every step."""
    cache = KVCache(layers=3, kv_heads=2, head_dim=16, num_blocks=4, dtype=torch.float32, device="cpu")
    tensors = [x for layer in cache.layers for x in layer]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 2 * 3
