"""Ctrl-C and SIGTERM: one line that says how to go on, and the exit code of the signal. It imports nothing slow."""

import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

_received: list[int] = []


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, unless they are ignored (as nohup and shells do for jobs)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def stopped() -> NoReturn:
    """Say how to go on, and exit: 130 after Ctrl-C, 143 after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it is stopping
    command = " ".join(["salsa", *map(shlex.quote, sys.argv[1:])])
    print(f"stopped; finished work is kept. Go on with: {command}", file=sys.stderr)
    sys.exit(128 + (_received[0] if _received else signal.SIGINT))


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
