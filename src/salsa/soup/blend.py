"""The streaming loop: read a few rows of every ingredient, add them up in float64, round once, write.

Threads, because most of the work is not arithmetic: one for each ingredient reads and hashes a few pieces ahead, one
writes and hashes the result. Memory holds AHEAD + 1 pieces of every ingredient, whatever the size of the model; more
ingredients mean smaller pieces. Where time goes is in docs/log.md: of what is computed once an element, rounding to
bf16 was the dearest, hashing next.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, cycle
from typing import NamedTuple

import numpy as np

from salsa.errors import CheckpointError
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, WeightsWriter
from salsa.soup.ingredients import Ingredient
from salsa.soup.methods import Factors, Mix, Room, rounded

ELEMENTS_IN_FLIGHT = 1 << 18
"""Elements of one piece, all ingredients together."""
AHEAD = 3
"""Pieces of each ingredient that are read before they are needed; as many results wait to be written."""

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
        self._half = np.empty(self.step, FLOATS["BF16"])
        self._rounding = Room.of(self.step)
        self._results = cycle(np.empty((AHEAD + 1, self.step * 8), np.uint8))

    @np.errstate(over="ignore", invalid="ignore")  # what must be finite is checked by name
    def run(self, writer: WeightsWriter | None, progress: Progress | None) -> dict[str, Tally]:
        """Average into `writer` (None: measure only); returns the sums over each tensor of floats.

        Raises:
            CheckpointError: a tensor holds NaN or Inf, or would after rounding, or integers differ.
        """
        total = sum(self.sources[0].tensors[key].size for key in self.stored)
        done = 0
        unwritten: deque[Future[None]] = deque()
        with ExitStack() as pools:
            writing = pools.enter_context(ThreadPoolExecutor(1))
            readers = [pools.enter_context(ThreadPoolExecutor(1)) for _ in self._lanes()]
            for piece, raws in self._read_ahead(readers):
                result = self._mix(piece, raws)
                if writer is not None and result is not None:
                    unwritten.append(writing.submit(writer.write, result))
                    if len(unwritten) == AHEAD:  # the next result's room must be free
                        unwritten.popleft().result()
                if progress is not None and piece.write:
                    done += piece.stop - piece.start
                    progress(done, total)
            for written in unwritten:
                written.result()
        for key, tally in self.tallies.items():
            tally.settle(self._factors[key], with_base=self.base is not None)
        return self.tallies

    def _lanes(self) -> list[list[int]]:
        """Which sources one thread reads: each alone, but together where adapters read from the base."""
        numbers = list(range(len(self.sources)))
        files = [weights for source in self.sources for weights in source.reads]
        return [[n] for n in numbers] if len({*map(id, files)}) == len(files) else [numbers]

    def _read_ahead(
        self, readers: Sequence[ThreadPoolExecutor]
    ) -> Iterator[tuple[_Piece, Sequence[np.ndarray]]]:
        """Pieces with the stored elements of every source, read AHEAD of who asks, each lane by its reader."""
        buffers = cycle(np.empty((AHEAD + 1, len(self.sources), self.step * 8), np.uint8))
        lanes = self._lanes()

        def load(lane: list[int], piece: _Piece, buffer: np.ndarray) -> list[np.ndarray]:
            where = piece.key, piece.start, piece.stop
            return [self.sources[n].load(*where, buffer[n]) for n in lane]

        waiting: deque[tuple[_Piece, list[Future[list[np.ndarray]]]]] = deque()
        for piece in chain(self._pieces(), [None] * AHEAD):
            if piece is not None:
                room = next(buffers)
                both = zip(readers, lanes, strict=True)
                waiting.append((piece, [r.submit(load, lane, piece, room) for r, lane in both]))
            if waiting and (piece is None or len(waiting) > AHEAD):
                this, loads = waiting.popleft()
                yield this, [raw for one in loads for raw in one.result()]

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
        rounding = self._rounding.head(len(soup))
        result = half = rounded(soup, stored, room.view(FLOATS[stored]), rounding)
        if stored != "BF16":
            half = self._half[: len(soup)]
            np.copyto(half, rounding.single, casting="unsafe")
        finite = tally.measure_rounding(rounding.single, half, rounding.spare)
        if (stored == "F16" or not finite) and not np.isfinite(result).all():
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
