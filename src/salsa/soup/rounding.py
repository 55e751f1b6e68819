"""Sums in float64, rounded once to the dtype that is stored, ties to even."""

from typing import NamedTuple

import numpy as np

from salsa.soup.files import FLOATS


class Room(NamedTuple):
    """What `rounded` works in, kept from chunk to chunk: fresh memory would cost more than the arithmetic."""

    single: np.ndarray
    """float32 (n,); the values rounded to it are left there."""
    spare: np.ndarray
    """float32 (n,), free again afterwards."""
    inexact: np.ndarray
    """bool (n,), as is the next."""
    wrong: np.ndarray

    @classmethod
    def of(cls, size: int) -> "Room":
        """For `size` elements."""
        kinds = (np.float32, np.float32, np.bool_, np.bool_)
        return cls(*(np.empty(size, kind) for kind in kinds))

    def head(self, size: int) -> "Room":
        """The first `size` elements of it."""
        return Room(*(part[:size] for part in self))


def rounded(
    values: np.ndarray, dtype: str, out: np.ndarray | None = None, room: Room | None = None
) -> np.ndarray:
    """float64 values, rounded once to a safetensors dtype, ties to even; into `out` if it is given."""
    if out is None:
        out = np.empty(values.shape, FLOATS[dtype])
    room = room or Room.of(values.size)
    flat = values.reshape(-1)
    with np.errstate(over="ignore", under="ignore"):
        np.copyto(room.single, flat, casting="same_kind")
        if dtype == "BF16":
            _round_to_half(room, flat, out.reshape(-1))
        else:
            np.copyto(out.reshape(-1), room.single if dtype == "F32" else flat, casting="unsafe")
    return out


def _round_to_half(room: Room, values: np.ndarray, out: np.ndarray) -> None:
    """To bf16 from the float32 in `room`, as if the float64 `values` were rounded once.

    ml_dtypes goes through float32, and rounding twice can land on the wrong side of a tie: where the float32 is a tie
    that the float64 is not, it is moved by a bit to the side where the float64 lies, and moved back afterwards. The
    average of two bf16 numbers is a tie every other time, but then float32 holds it exactly and there is nothing to do:
    only ties among the inexact ones are few.
    """
    single, bits, lower = room.single, room.single.view(np.uint32), room.spare.view(np.uint32)
    np.not_equal(single, values, out=room.inexact)
    np.bitwise_and(bits, 0xFFFF, out=lower)
    np.equal(lower, 0x8000, out=room.wrong)
    where = np.flatnonzero(np.logical_and(room.wrong, room.inexact, out=room.wrong))
    before = single[where]
    if len(where):
        size, near = np.abs(values[where]), np.abs(before.astype(np.float64))
        bits[where] += size > near
        bits[where] -= size < near
    np.copyto(out, single, casting="unsafe")
    single[where] = before
