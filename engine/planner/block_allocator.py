"""Which blocks of the key/value cache are whose. Integers only."""

import heapq
from collections import Counter


class BlockAllocator:
    """Hands out block numbers 0..blocks-1 and counts who holds them. Free + used = total, always.

    The lowest free numbers go first, so that a sequence's blocks mostly lie side by side: those can be read in place.
    """

    def __init__(self, blocks: int):
        self.total = blocks
        self._free = list(range(blocks))  # a heap
        self._holders: Counter[int] = Counter()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._holders)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder each. The caller has seen that they are free."""
        assert count <= self.free, f"{count} blocks asked for, {self.free} free: admission must reserve first"
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(taken)
        return taken

    def share(self, blocks: list[int]) -> list[int]:
        """The same blocks for one more holder."""
        assert all(block in self._holders for block in blocks)
        self._holders.update(blocks)
        return list(blocks)

    def release(self, blocks: list[int]) -> None:
        """One holder gives the blocks up; those nobody holds any more are free."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is released but not held"
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                heapq.heappush(self._free, block)

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost, doubled, or both free and held."""
        assert self.free + self.used == self.total
        assert set(self._free).isdisjoint(self._holders)
        assert len(set(self._free)) == self.free
        assert all(count > 0 for count in self._holders.values())
