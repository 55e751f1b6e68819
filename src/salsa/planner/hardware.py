"""What is planned for: cards, their numbers, and assumptions that a person may replace. No torch.

Memory, FLOP/s and bandwidths are the vendors' data sheets'; prices and utilisations are assumptions. All of them are
printed with a plan, and `--assume key=value` replaces each.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from salsa.errors import ConfigError
from salsa.planner.memory import Rank

GIB = 2**30
PRICED = "2025-06"
"""When the prices were usual for machines on demand, in US dollars an hour and card."""


@dataclass(frozen=True)
class Assumptions:
    """The numbers that a plan rests on; of one card, or one core of a CPU."""

    memory_gib: float
    """Memory of a card; of a CPU that of the machine."""
    tflops: float
    """Dense bf16 matrix products, 10^12 FLOP/s (a CPU: in the precision that is planned)."""
    bandwidth: float
    """Memory bandwidth, 10^9 bytes/s."""
    link: float
    """To other cards of the machine, one way, 10^9 bytes/s."""
    network: float
    """To other machines, a card's share, 10^9 bytes/s."""
    price: float
    """US dollars an hour."""
    utilisation: float = 0.35
    """Share of `tflops` that training and scoring reach."""
    decode_utilisation: float = 0.25
    """Share of `bandwidth` that decoding reaches."""
    usable: float = 0.92
    """Share of the memory that tensors may fill: the rest is the driver's, the libraries' and lost between tensors."""
    fill: float = 0.5
    """Share of the length limits that an average row has; memory is planned for rows at their limits."""
    replies: float = 3.0
    """Replies of an SFT conversation: each becomes a row."""
    cards_per_machine: float = 8


CARDS = {
    "A100-80GB": Assumptions(80, 312, 2039, 300, 25, 1.8),
    "A100-40GB": Assumptions(40, 312, 1555, 300, 25, 1.3),
    "H100-80GB": Assumptions(80, 989, 3350, 450, 50, 3.0),
    "H200-141GB": Assumptions(141, 989, 4800, 450, 50, 3.5),
    "48GB": Assumptions(48, 362, 864, 32, 12, 0.9),  # L40S
    "24GB": Assumptions(24, 165, 1008, 32, 12, 0.4),  # RTX 4090
}
_CPU = Assumptions(
    0, 0.05, 10, 10, 1, 0.04, utilisation=0.6, decode_utilisation=0.5, usable=0.9
)  # tflops: fp32 of one core of a Zen 4 as measured (docs/log.md); more in bf16 where the CPU has it


@dataclass(frozen=True)
class Hardware:
    """So many cards, or so many cores of a CPU."""

    text: str
    count: int
    assumed: Assumptions
    on_cpu: bool = False

    @property
    def ranks(self) -> int:
        """Processes that share the work: one a card; the cores of a CPU are threads of one."""
        return 1 if self.on_cpu else self.count

    @property
    def budget(self) -> float:
        """Bytes that the tensors of one rank may fill."""
        return self.assumed.memory_gib * GIB * self.assumed.usable

    @property
    def link(self) -> float:
        """Bytes/s between ranks: the network's where they are on several machines."""
        one_machine = self.count <= self.assumed.cards_per_machine
        return 1e9 * (self.assumed.link if one_machine else self.assumed.network)

    def rank(self, precision: str) -> Rank:
        """How a rank computes; `auto` is bf16 on a card and counted as fp32 on a CPU."""
        if precision == "auto":
            precision = "fp32" if self.on_cpu else "bf16"
        return Rank(precision, self.ranks, self.on_cpu)

    @property
    def single(self) -> "Hardware":
        """What one rank computes with: a card, or the CPU."""
        return self if self.on_cpu else replace(self, count=1)

    def times(self, factor: int) -> "Hardware":
        """So many times the cards."""
        count = self.count * factor
        return replace(self, text=self.text.replace(f"{self.count}x", f"{count}x", 1), count=count)


def hardware_of(text: str, assume: Sequence[str] = ()) -> Hardware:
    """What `--on` and `--assume` say.

    Raises:
        ConfigError: neither `<number>x<card>` nor `cpu:<cores>`, or an assumption that is none.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x(.+)|cpu:([1-9]\d{0,3})", text.strip())
    card = (
        {name.lower(): name for name in CARDS}.get(match[2].lower()) if match and match[2] else None
    )
    if match is None or (match[3] is None and card is None):
        raise ConfigError(
            f"--on {text!r}: write <number>x<card> with one of {', '.join(CARDS)}, or cpu:<cores>; "
            "e.g. 8xA100-80GB, 4xH100-80GB, 1x24GB, cpu:2. Other cards: the nearest, and --assume memory_gib=…"
        )
    if card is not None:
        return Hardware(f"{match[1]}x{card}", int(match[1]), _with(CARDS[card], assume))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    assumed = _with(replace(_CPU, memory_gib=memory), assume)
    return Hardware(f"cpu:{match[3]}", int(match[3]), assumed, on_cpu=True)


def _with(assumed: Assumptions, changes: Sequence[str]) -> Assumptions:
    known = [field.name for field in fields(Assumptions)]
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in known or not number > 0:
            raise ConfigError(
                f"--assume {change!r}: write key=number, above 0, with one of {', '.join(known)}."
            )
        changed: dict[str, Any] = {name: number}
        assumed = replace(assumed, **changed)
    return assumed
