"""Batches that hold little padding: rows of like length together, as many as a token budget allows."""

from collections.abc import Sequence


def batches_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in batches of at most `max_tokens` tokens, padding to the longest included.

    Rows are sorted by length, longest first, and cut greedily; a row that is longer than the budget is a batch of its
    own. Which rows meet depends on the lengths only, so it is the same for every model that sees them.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    for row in order:
        width = lengths[batches[-1][0]] if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
