"""Places on a line or a plane through models, and what a landscape's rows add up to. Numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from salsa.evaluate.results import rounded
from salsa.evaluate.winrate import clustered_mean
from salsa.runtime.tracking import round_metric


@dataclass(frozen=True)
class Place:
    """Where, and the models' weights in the sum there."""

    at: tuple[float, ...]
    """α; on a plane x and y."""
    weights: tuple[float, ...]
    """They sum to 1."""


@dataclass(frozen=True)
class Geometry:
    """How two or three models lie: θ_0 at the origin, θ_1 at x = 1."""

    count: int
    along: float
    """x of θ_2: (θ_2 − θ_0)·u / u·u."""
    height: float
    """Distance of θ_2 from the line, in lengths of u."""

    def place(self, *at: float) -> Place:
        """θ_0 + x·u + y·v, v as long as the distance of θ_2 from the line: θ_2 is at (along, height)."""
        if self.count == 2:
            (x,) = at
            return Place((x,), (1 - x, x))
        x, y = at
        third = y / self.height
        second = x - third * self.along
        return Place((x, y), (1 - second - third, second, third))

    def models(self) -> list[Place]:
        """Where the models are."""
        if self.count == 2:
            return [self.place(0.0), self.place(1.0)]
        return [self.place(0.0, 0.0), self.place(1.0, 0.0), self.place(self.along, self.height)]

    def places(self, alphas: Sequence[float]) -> list[Place]:
        """The models, then the line or the grid; on a plane y runs in heights of the third model."""
        grid = (
            [self.place(float(a)) for a in alphas]
            if self.count == 2
            else [self.place(float(x), float(y) * self.height) for y in alphas for x in alphas]
        )
        seen = {place.at: place for place in [*self.models(), *grid]}
        return list(seen.values())


def landscape(
    rows: Sequence[Mapping[str, Any]], models: Sequence[str], num_samples: int
) -> dict[str, Any]:
    """The content of `landscape.json`.

    Args:
        rows: of `places.jsonl`, the models' places first.
        models: their names.
        num_samples: replies per prompt.

    Every place has `columns`, means over prompts with 95 % intervals, and `minus_first`, the paired difference to the
    first model; every model also has all scores of its replies, for their distribution.
    """
    tables = [{n: _by_prompt(v, num_samples) for n, v in row["columns"].items()} for row in rows]
    losses = [row["loss"] for row in rows]
    if losses[0] is not None:
        tables = [t | {"loss": np.array(own)} for t, own in zip(tables, losses, strict=True)]
    places = [
        {
            "at": [round_metric(x) for x in row["at"]],
            "columns": {name: _mean(values) for name, values in table.items()},
            "minus_first": {name: _mean(v - tables[0][name]) for name, v in table.items()},
        }
        for row, table in zip(rows, tables, strict=True)
    ]
    return {
        "models": list(models),
        "columns": list(tables[0]),
        "num_prompts": len(next(iter(tables[0].values()))),
        "num_samples": num_samples,
        "places": places,
        "replies": {name: rows[i]["columns"] for i, name in enumerate(models)},
    }


def _by_prompt(values: Sequence[float], num_samples: int) -> np.ndarray:
    return np.asarray(values, dtype=float).reshape(-1, num_samples).mean(axis=1)


def _mean(values: np.ndarray) -> dict[str, Any]:
    return rounded(clustered_mean(values, range(len(values))))
