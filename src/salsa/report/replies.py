"""Every arm's reply to the same held-out prompt, side by side: what the page's table holds, kept small."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from salsa.report.figures import short

Rows = Sequence[Sequence[Mapping[str, Any]]]

PROMPTS = 200
"""Prompts of the table at most, drawn at random with a fixed seed."""

BYTES = 2_500_000
"""What replies may take of a page of 10 MB, of which plotly takes five."""


def side_by_side(
    rows: Mapping[str, Rows],
    scores: Sequence[str],
    seeds: Sequence[int],
    *,
    prompts: int = PROMPTS,
    limit: int = BYTES,
) -> dict[str, Any] | None:
    """The first seed of every arm, and further seeds as far as `limit` goes; fewer prompts where replies are long.

    Args:
        rows: arm → seed → samples, the same prompts in all of them.
        scores: the proxy first.
        seeds: the seeds' numbers.
        prompts: at most so many.
        limit: bytes of JSON.

    Returns:
        None where no prompt was answered; else `arms`, `scores`, `seeds` (those that are here), `left_out` (number of
        seeds that are not), `of` (how many prompts there were), `scale` (mean and sd of each score over all replies of
        the run), `prompts` ([place, text]), `texts`, each once, and `replies` [seed][prompt][arm] (text, score, …).
    """
    first = next(iter(rows.values()), ())
    if not first or not first[0]:
        return None
    asked = [row["prompt"] for row in first[0]]
    order = random.Random(0).sample(range(len(asked)), min(prompts, len(asked)))
    texts = _Texts()
    table = _table(rows, scores, 0, sorted(order), texts)
    while len(order) > 1 and _size(table, texts, [asked[i] for i in order]) > limit:
        order = order[: len(order) // 2]
        texts = _Texts()
        table = _table(rows, scores, 0, sorted(order), texts)
    chosen, tables = sorted(order), [table]
    for seed in range(1, len(seeds)):
        larger = _Texts(texts)
        table = _table(rows, scores, seed, chosen, larger)
        if _size([*tables, table], larger, [asked[i] for i in chosen]) > limit:
            break
        texts = larger
        tables.append(table)
    return {
        "arms": list(rows),
        "scores": list(scores),
        "seeds": list(seeds[: len(tables)]),
        "left_out": len(seeds) - len(tables),
        "of": len(asked),
        "scale": [_scale(rows, score) for score in scores],
        "prompts": [[i, asked[i]] for i in chosen],
        "texts": list(texts),
        "replies": tables,
    }


class _Texts(dict[str, int]):
    """Text → its number: replies that are equal are stored once."""

    def number(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _table(
    rows: Mapping[str, Rows],
    scores: Sequence[str],
    seed: int,
    chosen: Sequence[int],
    texts: _Texts,
) -> list[list[list[float]]]:
    return [
        [
            [
                texts.number(of_arm[seed][i]["response"]),
                *(short(of_arm[seed][i][score]) for score in scores),
            ]
            for of_arm in rows.values()
        ]
        for i in chosen
    ]


def _size(tables: Any, texts: _Texts, asked: Sequence[str]) -> int:
    """Bytes of it as JSON; `<` becomes six of them."""
    parts = [json.dumps(part) for part in (tables, list(texts), list(asked))]
    return sum(len(part) + 5 * part.count("<") for part in parts)


def _scale(rows: Mapping[str, Rows], score: str) -> list[float]:
    """Mean and sd of a score over all arms, seeds and prompts; an sd of 0 counts as 1."""
    values = np.array([row[score] for seeds in rows.values() for seed in seeds for row in seed])
    return [short(float(values.mean())), short(float(values.std())) or 1.0]
