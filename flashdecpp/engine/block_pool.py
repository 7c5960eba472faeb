"""The blocks of the KV cache: sequences share them, and find them again by the tokens in them."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from flashdecpp.errors import OutOfMemory


class BlockPool:
    """Counts who uses each block, and remembers what is in those that nobody uses any more.

    A full block may be published under a key that stands for all tokens up to its end. Free blocks are reused
    in the order in which they were given back, those without a key first; until then they can be found.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.peak_blocks = 0  # most in use at once, since it was last set
        self._users = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to be reused first
        self._keys: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def is_shared(self, block: int) -> bool:
        return self._users[block] > 1

    def take(self, count: int) -> list[int]:
        """`count` blocks of the free ones, whatever was in them."""
        if count > len(self._free):
            raise OutOfMemory(f"{count} cache blocks are wanted, {len(self._free)} are free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._users[block] = 1
            if self._keys[block] is not None:
                self._published.pop(self._keys[block], None)
                self._keys[block] = None
        self._note_peak()
        return taken

    def share(self, blocks: Sequence[int]) -> list[int]:
        """The same blocks for one more user."""
        for block in blocks:
            self._free.pop(block, None)
            self._users[block] += 1
        self._note_peak()
        return list(blocks)

    def give_back(self, blocks: Sequence[int]) -> None:
        """One user's blocks, in the order of their tokens."""
        for block in reversed(blocks):  # a sequence's end is reused before its beginning
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Lets a block that is full be found; the first of several with the same key is."""
        if key not in self._published:
            self._published[key], self._keys[block] = block, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to one that isn't there."""
        found = []
        for key in keys:
            if key not in self._published:
                break
            found.append(self._published[key])
        return found

    def recount(self, held: Iterable[Sequence[int]]) -> None:
        """Makes these the uses of blocks, after an error that may have come before they were noted."""
        users = Counter(block for blocks in held for block in blocks)
        for block in range(self.num_blocks):
            if users[block]:
                self._free.pop(block, None)
            elif block not in self._free:
                self._users[block] = 1
                self.give_back([block])
            self._users[block] = users[block]

    def _note_peak(self) -> None:
        self.peak_blocks = max(self.peak_blocks, self.used_blocks)
