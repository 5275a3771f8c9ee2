import heapq
from collections import Counter


class BlockAllocator:
    """Hands out cache blocks and counts their holders. Free + used = total, always.

    The lowest go first: a contiguous sequence can be read in place.
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
        """Allocate blocks, with one holder each."""
        assert count <= self.free, f"{count} blocks asked for, {self.free} free: admission must reserve first"
        allocated = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(allocated)
        return allocated

    def share(self, blocks: list[int]) -> list[int]:
        """Add a holder to each block."""
        assert all(block in self._holders for block in blocks)
        self._holders.update(blocks)
        return list(blocks)

    def release(self, blocks: list[int]) -> None:
        """Remove a holder from each block."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is released but not held"
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                heapq.heappush(self._free, block)

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost or doubled."""
        assert self.free + self.used == self.total
        assert set(self._free).isdisjoint(self._holders)
        assert len(set(self._free)) == self.free
        assert all(count > 0 for count in self._holders.values())
