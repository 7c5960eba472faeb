"""Bookkeeping of KV cache blocks: reference counts, and a lookup of blocks by the tokens they hold."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from flashdecpp._arguments import integer
from flashdecpp.errors import OutOfMemory


class BlockPool:
    """Hands out the block ids 0 to num_blocks - 1 of a paged KV cache and counts the users of each.

    It holds no keys or values: a block id indexes dim 0 of every tensor of a `KVCache`, and the ids that
    `allocate` returns are a row of a block table::

        pool = BlockPool(num_blocks=64)
        blocks = pool.allocate(3)  # room for 48 tokens in blocks of 16
        table = torch.tensor([blocks], dtype=torch.int32)
        pool.free(blocks)

    Sequences with a common beginning may `share` its blocks. A full block may be registered under a key that
    stands for all tokens up to its end; `find` then returns it, even after its last user has freed it, until
    `allocate` reuses it. Free blocks are reused in the order in which they were freed, those without a key
    first. Every operation takes time linear in the number of its blocks; none is thread-safe.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = integer("num_blocks", num_blocks, 0)
        self.peak_blocks = 0  # most blocks in use at once since it was last set
        self._users = [0] * self.num_blocks
        self._unused = OrderedDict.fromkeys(range(self.num_blocks))  # the next to be reused first
        self._keys: list[bytes | None] = [None] * self.num_blocks
        self._registered: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._unused)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._unused)

    def users(self, block: int) -> int:
        """How many users a block has: 0 if it is free, several if it is shared."""
        return self._users[block]

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks for one user; their previous contents can no longer be found.

        Raises OutOfMemory, and allocates nothing, if fewer are free.
        """
        if count > len(self._unused):
            raise OutOfMemory(f"{count} cache blocks are wanted, {len(self._unused)} are free")
        blocks = [self._unused.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            if (key := self._keys[block]) is not None:
                self._registered.pop(key, None)
                self._keys[block] = None
        self._note_peak()
        return blocks

    def share(self, blocks: Sequence[int]) -> list[int]:
        """The same blocks for one more user, who frees them as well."""
        for block in blocks:
            self._unused.pop(block, None)
            self._users[block] += 1
        self._note_peak()
        return list(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """Ends one user's use of blocks, given in the order of their tokens.

        Raises ValueError for a block that is not in use.
        """
        for block in reversed(blocks):  # the end of a sequence is reused before its beginning
            if not (0 <= block < self.num_blocks and self._users[block]):
                raise ValueError(f"block {block} of {self.num_blocks} is not in use")
            self._users[block] -= 1
            if self._users[block] == 0:
                self._unused[block] = None
                if self._keys[block] is None:
                    self._unused.move_to_end(block, last=False)

    def register(self, block: int, key: bytes) -> None:
        """Lets `find` return a full block. If several have the same key, the first registered is found."""
        if key not in self._registered:
            self._registered[key], self._keys[block] = block, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks registered under the first keys, up to the first key that is unknown.

        They may be free: `share` them before the next `allocate`.
        """
        found = []
        for key in keys:
            if key not in self._registered:
                break
            found.append(self._registered[key])
        return found

    def recount(self, held: Iterable[Sequence[int]]) -> None:
        """Makes `held` the users of blocks, after an error that may have interrupted their bookkeeping."""
        users = Counter(block for blocks in held for block in blocks)
        for block in range(self.num_blocks):
            if users[block]:
                self._unused.pop(block, None)
            elif block not in self._unused:
                self._users[block] = 1
                self.free([block])
            self._users[block] = users[block]

    def _note_peak(self) -> None:
        self.peak_blocks = max(self.peak_blocks, self.used_blocks)
