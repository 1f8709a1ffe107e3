"""Whole numbers of a cache's layout: bit widths, and slots of the exact buffer. Nothing heavy is imported."""

# Bits that are read together, by width: whole codes, few enough that a table of all their values is small.
WORD_BITS = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 7: 7, 8: 8, 16: 16}


def exact_slots(window: int, block: int) -> int:
    """Slots of the exact buffer: the window, and what gathers until a whole block leaves it."""
    return window + block if window else 0


def exact_layout(encoded: int, filled: int, window: int, sinks: int, block: int) -> "tuple[int, int]":
    """Slots for sinks and for the newest tokens of an exact buffer that grows.

    It grows token by token, as the source's cache does, until the tokens that stand in latents alone outweigh what of
    the whole buffer is not in use; from there on it stays as it is.

    Args:
        encoded: tokens in latents.
        filled: exact tokens, sinks not counted.
        window, sinks, block: the settings.
    """
    if encoded >= 2 * (block + sinks):
        return sinks, exact_slots(window, block)
    return min(sinks, encoded), filled


def leaving_slots(total: int, window: int, block: int) -> int:
    """How many of `total` exact slots are encoded: whole blocks, once window and one block are full."""
    return (total - window) // block * block if total >= window + block else 0
