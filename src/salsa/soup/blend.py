"""The streaming loop: read a few rows of every ingredient, add them up in float64, round once, write.

Three threads, because two of the three jobs are not arithmetic: one reads and hashes a piece ahead, one writes and
hashes the result. Memory holds two pieces of every ingredient, whatever the size of the model; more ingredients mean
smaller pieces.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, cycle, pairwise
from typing import NamedTuple

import numpy as np

from salsa.errors import CheckpointError
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, WeightsWriter
from salsa.soup.ingredients import Ingredient
from salsa.soup.methods import Factors, Mix, rounded

ELEMENTS_IN_FLIGHT = 1 << 18
"""Elements of one piece, all ingredients together."""

Progress = Callable[[int, int], None]
"""Called with (elements done, elements in all)."""


class _Piece(NamedTuple):
    key: str
    start: int
    stop: int
    measure: bool
    write: bool


@dataclass(eq=False)
class Blend:
    """One pass over the ingredients: buffers, sums, and the factors of each tensor."""

    ingredients: Sequence[Ingredient]
    base: Ingredient | None
    stored: Mapping[str, str]
    """Key → dtype name of the result, in the order of writing."""
    mix: Mix
    fixed: Mapping[str, Factors]
    """Key → factors that hold there whatever the mix's rule says."""

    def __post_init__(self) -> None:
        self.sources = [*self.ingredients] + ([self.base] if self.base is not None else [])
        self.count = len(self.ingredients)
        self.rule = self.mix.rule(self.count)
        self.step = max(ELEMENTS_IN_FLIGHT // len(self.sources) // 4096, 1) * 4096
        self.tallies: dict[str, Tally] = {}
        self._factors: dict[str, Factors] = {}
        self._values = np.empty((len(self.sources), self.step))
        self._deltas = np.empty((self.count, self.step))
        self._room = np.empty((2, self.step))
        self._single = np.empty(self.step, np.float32)
        self._half = np.empty(self.step, FLOATS["BF16"])
        self._results = cycle(np.empty((2, self.step * 8), np.uint8))  # one is still being written

    @np.errstate(over="ignore", invalid="ignore")  # what must be finite is checked by name
    def run(self, writer: WeightsWriter | None, progress: Progress | None) -> dict[str, Tally]:
        """Average into `writer` (None: measure only); returns the sums over each tensor of floats.

        Raises:
            CheckpointError: a tensor holds NaN or Inf, or would after rounding, or integers differ.
        """
        total = sum(self.sources[0].tensors[key].size for key in self.stored)
        done = 0
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            written: Future[None] = writing.submit(lambda: None)
            for piece, raws in self._read_ahead(reading):
                result = self._mix(piece, raws)
                if writer is not None and result is not None:
                    written.result()
                    written = writing.submit(writer.write, result)
                if progress is not None and piece.write:
                    done += piece.stop - piece.start
                    progress(done, total)
            written.result()
        for key, tally in self.tallies.items():
            tally.settle(self._factors[key], with_base=self.base is not None)
        return self.tallies

    def _read_ahead(
        self, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Piece, Sequence[np.ndarray]]]:
        """Pieces with the stored elements of every source, read one ahead of who asks."""
        buffers = cycle(np.empty((2, len(self.sources), self.step * 8), np.uint8))

        def load(piece: _Piece, buffer: np.ndarray) -> list[np.ndarray]:
            return [
                source.load(piece.key, piece.start, piece.stop, row)
                for source, row in zip(self.sources, buffer, strict=True)
            ]

        loads = ((piece, pool.submit(load, piece, next(buffers))) for piece in self._pieces())
        for this, _ in pairwise(chain(loads, [None])):  # the next one has been submitted by now
            assert this is not None
            yield this[0], this[1].result()

    def _pieces(self) -> Iterator[_Piece]:
        """Whole rows where a row is no longer than a piece."""
        for key, stored in self.stored.items():
            tensor = self.sources[0].tensors[key]
            row = math.prod(tensor.shape[1:])
            step = self.step // row * row if 0 < row <= self.step else self.step
            twice = self.mix.needs_gram and stored in FLOATS and key not in self.fixed
            for measure, write in [(True, False), (False, True)] if twice else [(True, True)]:
                for start in range(0, tensor.size, step):
                    yield _Piece(key, start, min(start + step, tensor.size), measure, write)

    def _mix(self, piece: _Piece, raws: Sequence[np.ndarray]) -> np.ndarray | None:
        """The result's elements of a piece, in their final dtype; None if it was only measured."""
        key, stored = piece.key, self.stored[piece.key]
        if stored not in FLOATS:
            for source, raw in zip(self.ingredients, raws, strict=False):
                if not np.array_equal(raw, raws[0]):
                    raise CheckpointError(
                        f"{source.path}: {key} holds integers that differ from those in {self.sources[0].path}; "
                        "they have no average."
                    )
            return raws[0].copy()
        values = self._values[:, : piece.stop - piece.start]
        for row, raw in zip(values, raws, strict=True):
            row[:] = raw
        tally = self.tallies.setdefault(key, Tally.empty(self.count))
        if piece.measure:
            base = values[-1] if self.base is not None else None
            tally.measure(values[: self.count], base, self._deltas[:, : values.shape[1]])
            if not (np.isfinite(tally.gram).all() and np.isfinite(tally.squares).all()):
                for source, row in zip(self.sources, values, strict=True):
                    source.check_finite(key, row)
        if not piece.write:
            return None
        if key not in self._factors:
            self._factors[key] = self.fixed.get(key) or self.rule(tally.gram)
        soup, spare = self._room[:, : values.shape[1]]
        weighted_sum(values, self._factors[key], soup, spare)
        room = next(self._results)[: len(soup) * FLOATS[stored].itemsize]
        result = rounded(soup, stored, room.view(FLOATS[stored]))
        tally.measure_rounding(soup, self._single[: len(soup)], self._half[: len(soup)])
        if not np.isfinite(result).all():
            raise CheckpointError(f"soup: {key} overflows {stored}. Choose a wider dtype.")
        return result


def weighted_sum(
    values: np.ndarray, factors: Factors, total: np.ndarray, spare: np.ndarray
) -> None:
    """Into `total`: Σ terms_i θ_i (+ base · θ_base), divided. Zero factors add nothing, not even a sign to a zero."""
    terms = [*factors.terms] + ([factors.base] if len(values) > len(factors.terms) else [])
    used = [(row, term) for row, term in zip(values, terms, strict=True) if term != 0]
    if len(used) > 1 and used[0][1] == used[1][1] == 1:
        # the common case, in one pass instead of three
        np.add(used[0][0], used[1][0], out=total)
        used = used[2:]
    elif used:
        np.multiply(*used[0], out=total)
        used = used[1:]
    else:
        total[:] = 0.0
    for row, term in used:
        total += np.multiply(row, term, out=spare)
    if factors.divisor == 2:
        total *= 0.5  # as exact as the division, and faster
    elif factors.divisor != 1:
        total /= factors.divisor
