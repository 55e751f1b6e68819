"""Batches that hold little padding: rows of like length together, as many as a token budget allows."""

from bisect import bisect_left
from collections.abc import Sequence


def batches_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in batches of at most `max_tokens` tokens, padding to the longest included.

    Rows are sorted by length, longest first, and cut into as few batches as fit, as even in size as that allows; a
    row that is longer than the budget is a batch of its own. Which rows meet depends on the lengths only, so it is
    the same for every model that sees them.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    fewest = len(_cut(order, lengths, max_tokens))
    enough = bisect_left(
        range(max_tokens), True, key=lambda size: len(_cut(order, lengths, size)) <= fewest
    )
    return _cut(order, lengths, enough)


def _cut(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill batch after batch."""
    batches: list[list[int]] = []
    for row in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
