"""The streaming loop: read a few rows of every ingredient, add them up, round once, write.

Sums are taken in float64; a mean of two in float32, where that gives the same bits (`exact_in_single`).

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
from typing import Any, NamedTuple

import numpy as np

from salsa.errors import CheckpointError
from salsa.soup.diagnostics import Tally
from salsa.soup.files import FLOATS, WeightsWriter
from salsa.soup.ingredients import Ingredient
from salsa.soup.methods import Factors, Mix
from salsa.soup.rounding import Room, rounded

ELEMENTS_IN_FLIGHT = 1 << 21
"""Elements of one piece, all ingredients together: what threads hand to each other."""
BLOCK = 1 << 16
"""Elements that are computed with at once: few enough to stay in a core's cache."""
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
        self._values = np.empty((len(self.sources), BLOCK))
        self._deltas = np.empty((self.count, BLOCK))
        self._room = np.empty((2, BLOCK))
        self._half = np.empty(BLOCK, FLOATS["BF16"])
        self._rounding = Room.of(BLOCK)
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
        lanes = self._lanes()

        def load(lane: list[int], piece: _Piece) -> list[np.ndarray]:
            return [self.sources[n].load(piece.key, piece.start, piece.stop) for n in lane]

        waiting: deque[tuple[_Piece, list[Future[list[np.ndarray]]]]] = deque()
        for piece in chain(self._pieces(), [None] * AHEAD):
            if piece is not None:
                both = zip(readers, lanes, strict=True)
                waiting.append((piece, [r.submit(load, lane, piece) for r, lane in both]))
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
        if not self.mix.needs_gram and key not in self._factors:
            self._factors[key] = self.fixed.get(key) or self.rule(np.empty((0, 0)))
        count, kind = piece.stop - piece.start, FLOATS[stored]
        tally = self.tallies.setdefault(key, Tally.empty(self.count))
        room = next(self._results) if piece.write else np.empty(0, np.uint8)
        result = room[: count * kind.itemsize].view(kind)
        for start in range(0, count, BLOCK):
            block = slice(start, min(start + BLOCK, count))
            values = self._measured(piece, [raw[block] for raw in raws], tally)
            if piece.write:
                self._rounded_sum(key, values, tally, result[block])
        return result if piece.write else None

    def _measured(self, piece: _Piece, raws: Sequence[np.ndarray], tally: Tally) -> np.ndarray:
        """The values of all sources, (sources, n), in the arithmetic that is to be used; their sums go into `tally`."""
        stored = FLOATS[self.stored[piece.key]]
        single = exact_in_single(self._factors.get(piece.key), [raw.dtype for raw in raws], stored)
        for kind in (np.float32, np.float64) if single else (np.float64,):
            values = self._values.view(kind)[:, : len(raws[0])]
            deltas = self._deltas.view(kind)[:, : len(raws[0])]
            for row, raw in zip(values, raws, strict=True):
                row[:] = raw
            if not piece.measure:
                return values
            base = values[-1] if self.base is not None else None
            if tally.measure(values[: self.count], base, deltas):
                return values  # finite squares: no sum of two overflows
        for source, row in zip(self.sources, values, strict=True):
            source.check_finite(piece.key, row)
        return values

    def _rounded_sum(self, key: str, values: np.ndarray, tally: Tally, result: np.ndarray) -> None:
        """Σ factors · values into `result`, rounded once to its dtype; what bf16 loses goes into `tally`."""
        if key not in self._factors:
            self._factors[key] = self.fixed.get(key) or self.rule(tally.gram)
        soup, spare = self._room.view(values.dtype)[:, : len(result)]
        weighted_sum(values, self._factors[key], soup, spare)
        stored, rounding = self.stored[key], self._rounding.head(len(result))
        if soup.dtype == np.float32:
            rounding = rounding._replace(single=soup)
            np.copyto(result, soup, casting="unsafe")
        else:
            rounded(soup, stored, result, rounding)
        half = result
        if stored != "BF16":
            half = self._half[: len(result)]
            np.copyto(half, rounding.single, casting="unsafe")
        finite = tally.measure_rounding(rounding.single, half, rounding.spare)
        if (stored == "F16" or not finite) and not np.isfinite(result).all():
            raise CheckpointError(f"soup: {key} overflows {stored}. Choose a wider dtype.")


def exact_in_single(
    factors: Factors | None, dtypes: Sequence[np.dtype[Any]], stored: np.dtype[Any]
) -> bool:
    """Whether (a + b) / 2 is to be taken of numbers that float32 holds, to be rounded to their own dtype.

    float32 then gives what float64 would. Numbers in float32: it rounds the sum once, and halving is exact. In bf16:
    the sum is exact, unless one number is below 2⁻¹⁵ of the other, which is nearest to the sum then, as it is to what
    float32 makes of it.
    """
    if factors is None or factors.base or factors.divisor != 2:
        return False
    if sorted(factors.terms) != [0.0] * (len(factors.terms) - 2) + [1.0, 1.0]:
        return False
    return stored in (FLOATS["BF16"], FLOATS["F32"]) and set(dtypes) == {stored}


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
