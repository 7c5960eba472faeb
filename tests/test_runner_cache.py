"""The pool of cache blocks: who uses a block, what can be found in it, and what is reused first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from runner_models import save_model

from flashdecpp import LLM, OutOfMemory
from flashdecpp.engine.block_pool import BlockPool
from flashdecpp.engine.request import Request
from flashdecpp.models.kv_cache import BLOCK_SIZE, KVCache

BLOCKS = 6


def key(number: int) -> bytes:
    return bytes([number])


class PoolMachine(RuleBasedStateMachine):
    """Users take, share, publish and give back blocks at random; a plain model says what must come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.users: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what can be found in which block
        self.given_back: list[int] = []  # free blocks, those that were given back last at the end

    def is_free(self, block: int) -> bool:
        return not any(block in user for user in self.users)

    @rule(count=st.integers(1, BLOCKS))
    def take(self, count: int) -> None:
        free = [block for block in range(BLOCKS) if self.is_free(block)]
        if count > len(free):
            with pytest.raises(OutOfMemory, match=f"{count} cache blocks are wanted, {len(free)} are free"):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert len(set(taken)) == count and set(taken) <= set(free)
        # Blocks with something in them go last, and then in the order in which they were given back.
        empty = [block for block in free if block not in self.content]
        full = [block for block in self.given_back if block in self.content]
        assert set(taken[: len(empty)]) <= set(empty)
        assert taken[len(empty) :] == full[: max(0, count - len(empty))]
        for block in taken:
            self.content.pop(block, None)
        self.given_back = [block for block in self.given_back if block not in taken]
        self.users.append(taken)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data) -> None:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.content.values())), unique=True))
        found = self.pool.find(wanted)
        assert [self.content[block] for block in found] == wanted
        assert self.pool.find([b"nowhere", *wanted]) == []
        self.users.append(self.pool.share(found))
        self.given_back = [block for block in self.given_back if block not in found]

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), number=st.integers(0, 9))
    def publish(self, data, number: int) -> None:
        fresh = {block for user in self.users for block in user} - self.content.keys()
        if fresh:
            block = data.draw(st.sampled_from(sorted(fresh)))
            self.pool.publish(block, key(number))
            if key(number) not in self.content.values():
                self.content[block] = key(number)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def give_back(self, data) -> None:
        blocks = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.pool.give_back(blocks)
        self.given_back += [block for block in reversed(blocks) if self.is_free(block)]

    @invariant()
    def uses_are_counted(self) -> None:
        used = {block for user in self.users for block in user}
        assert self.pool.used_blocks == len(used) <= self.pool.peak_blocks
        assert self.pool.free_blocks == BLOCKS - len(used)
        for block in range(BLOCKS):
            assert self.pool.is_shared(block) == (sum(block in user for user in self.users) > 1)

    @invariant()
    def content_is_found_until_its_block_is_taken(self) -> None:
        for block, published in self.content.items():
            assert self.pool.find([published]) == [block]
        for number in range(10):
            if key(number) not in self.content.values():
                assert self.pool.find([key(number)]) == []


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestPool = PoolMachine.TestCase


def test_blocks_are_copied_saved_and_restored(tmp_path):
    save_model(tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    cache = KVCache(llm.config, 5, llm.device, llm.dtype)
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


def test_keys_stand_for_all_tokens_before_their_end(tmp_path):
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
    assert not set(keys(tokens)) & set(keys(changed))  # though the last two blocks have the same tokens
    assert not set(keys(tokens)) & set(keys(tokens, rotation=48))
    (request,) = llm._requests([tokens[:20]], None)
    assert isinstance(request, Request)
    request.token_ids += tokens[20:]  # an answer's tokens count like a prompt's
    assert request.block_keys(3, 0) == keys(tokens)
