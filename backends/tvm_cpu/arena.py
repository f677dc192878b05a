"""The memory in which a head works: one block, parts of which are given out and taken back while a kernel is written.

    alloc(1024) -> 0      alloc(256) -> 1024      free(0)      alloc(512) -> 0

What is small stays in the first cache, and nothing is allocated inside a loop.
"""

from __future__ import annotations

from typing import Any

LINE = 16  # numbers; what is given out begins at a cache line


class Scratch:
    """Offsets into a block of numbers, first fit. `size` is what the block has to hold in the end."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.size = 0
        self._taken: dict[int, int] = {}

    def alloc(self, count: int) -> int:
        """The first gap that holds so many numbers."""
        count = -(-max(count, 1) // LINE) * LINE
        at = 0
        for begin, end in sorted(self._taken.items()):
            if begin - at >= count:
                break
            at = end
        self._taken[at] = at + count
        self.size = max(self.size, at + count)
        return at

    def free(self, at: int) -> None:
        """What was taken there may be taken again."""
        del self._taken[at]
