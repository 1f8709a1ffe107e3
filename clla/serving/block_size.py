"""How large a block of the engine's memory is, so that pages of latents and of exact tokens fit into blocks alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

EXACT_BLOCK = 16  # tokens per page of exact keys and values
LARGEST_BLOCK = 512  # tokens per page of latents, unless one exact page is larger


class Window(NamedTuple):
    """Layers that keep exact tokens of a window of one size.

    Attributes:
        page_bytes: exact page of one layer.
        layers: how many each pipeline rank has.
        tokens: of the window.
        sinks: first tokens that stay.
    """

    page_bytes: int
    layers: list[int]
    tokens: int
    sinks: int = 0

    @classmethod
    def of(cls, layer: Any, layers: list[int], tokens: int, sinks: int = 0) -> Window:
        """The same from one of the engine's layers."""
        page = EXACT_BLOCK * layer.num_kv_heads * 2 * layer.head_size * layer.kv_cache_torch_dtype.itemsize
        return cls(page, layers, tokens, sinks)

    def blocks(self, more: int = 0) -> int:
        """Exact blocks of a sequence, with a number of tokens more than the window: they begin and end in one."""
        return -(-(self.tokens + more) // EXACT_BLOCK) + 1 + -(-self.sinks // EXACT_BLOCK)


def latent_block(row_bytes: int, windows: Sequence[Window]) -> tuple[int, list[int]]:
    """Tokens per block of latents, and in how many groups the layers of each window share such blocks.

    The engine's blocks all have the bytes of a latents' block; pages of exact tokens share a block by as many layers as
    fit. Larger blocks fit them better but leave more of a sequence's last block empty: the sum is made small.

    Args:
        row_bytes: latents of a token.
        windows: of the model; with none a block is no larger than it has to be.
    """

    def groups(block: int, window: Window) -> int:  # the engine looks at all ranks' layers and stores together
        return -(-sum(window.layers) // (len(window.layers) * block * row_bytes // window.page_bytes))

    def fits(block: int) -> bool:  # each rank's exact pages have room in a block, and each rank has some of each group
        return all(
            groups(block, w) <= min(w.layers)
            and -(-max(w.layers) // groups(block, w)) * w.page_bytes <= block * row_bytes
            for w in windows
        )

    def cost(block: int) -> float:
        return block * row_bytes * (sum(w.blocks() * groups(block, w) for w in windows) + 0.5)

    if not windows:
        return EXACT_BLOCK, []
    # At least as large as one exact page, beyond that not so large that prefixes are hardly ever shared.
    page_bytes = max(w.page_bytes for w in windows)
    smallest = -(-page_bytes // (row_bytes * EXACT_BLOCK)) * EXACT_BLOCK
    sizes = range(smallest, max(smallest, LARGEST_BLOCK) + 1, EXACT_BLOCK)
    fitting = [block for block in sizes if fits(block)] or [next(filter(fits, count(sizes[-1], EXACT_BLOCK)))]
    best = min(fitting, key=cost)
    return best, [groups(best, w) for w in windows]


def blocks_alone(windows: Sequence[Window], shares: Sequence[int], block: int, longest: int, in_flight: int) -> int:
    """Blocks that the longest request may need while it is the only one.

    Args:
        windows: of the model.
        shares: groups of each, from `latent_block`.
        block: tokens per block of latents.
        longest: tokens of a request.
        in_flight: most tokens that are computed at once.
    """
    found = -(-longest // block)
    for window, groups in zip(windows, shares, strict=True):
        computed = min(longest, window.tokens + in_flight)
        found += groups * window.blocks(computed - window.tokens)
    return found
