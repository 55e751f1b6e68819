"""What a person should be told while RL runs: each alarm once, with what to try.

Alarms are a function of the rows of `metrics.jsonl`, so a resumed run does not repeat them. The thresholds are
ours; docs/metrics.md lists them. NaN and Inf are no alarm: they stop the run (`rl._require_finite`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Row = Mapping[str, float]

WINDOW = 5
"""Updates that are averaged, at the start and at the end."""
_STEADY = 3
"""Updates over which the length is averaged before it counts as collapsed."""
SHORT = 0.5
"""Length collapse: mean length below this share of the first update's."""
DEAD = 0.2
"""Entropy collapse: entropy below this share of the first update's."""
CLIPPED = 0.4
"""Share of clipped tokens that is too much."""
ERRORS = 3.0
"""Standard errors by which the mean KL must lie below 0: k1 is noisy, the KL itself is never negative."""
NOISE = 0.01
"""Nats by which it must lie below 0 besides: rounding alone makes differences between equal models."""
MISMATCH = 0.02
"""Nats per token between a server's distribution and the policy's: an honest server with the same weights, in bf16, is
expected well below."""
DRIFT = 2.0
"""Standard errors by which proxy must rise and gold fall between the first and the last window."""


class Alarms:
    """Which alarms have been raised so far."""

    def __init__(self, held_out: Iterable[str] = (), rows: Iterable[Row] = ()) -> None:
        """Watch the scores `held_out` besides; `rows` were logged before a kill; what they raised is not repeated."""
        self.held_out = tuple(held_out)
        self.raised: dict[str, str] = {}
        self._rows: list[Row] = []
        for row in rows:
            self.observe(row)

    def observe(self, row: Row) -> list[str]:
        """Messages that this update calls for, for the first time."""
        self._rows.append(row)
        new = {
            name: f"alarm: {name} at update {int(row['step'])}: {text}."
            for name, text in self._calls()
            if name not in self.raised
        }
        self.raised |= new
        return list(new.values())

    def _calls(self) -> Iterator[tuple[str, str]]:
        """(name, message) of every alarm that holds now."""
        first, last, num = self._rows[0], self._rows[-1], len(self._rows)
        length = np.mean([row["length"] for row in self._rows[-_STEADY:]])
        if num >= _STEADY and length < SHORT * first["length"]:
            yield (
                "KL-Hack",
                f"responses fell from {first['length']:.1f} to {length:.1f} tokens. Where the policy leaves its "
                "reference every token costs KL, so a high β makes silence cheapest. Lower rl.learning_rate, "
                "raise rl.rollout_size, or lower rl.kl_coef until the score counts again",
            )
        if last["kl"] + ERRORS * last["kl_stderr"] < 0 and last["kl"] < -NOISE:
            yield (
                "negative KL",
                f"{last['kl']:.3g} ± {last['kl_stderr']:.2g} nats. A KL is never negative: the responses were not "
                "drawn from the distribution that was scored. Check temperature, padding and precision",
            )
        if last["entropy"] < DEAD * first["entropy"]:
            yield (
                "entropy collapse",
                f"from {first['entropy']:.3g} to {last['entropy']:.3g} nats per token: the policy says the same thing "
                "again and again. Raise rl.kl_coef or rl.temperature, or lower rl.learning_rate",
            )
        if last.get("clip_fraction", 0.0) > CLIPPED:
            yield (
                "clip fraction",
                f"{last['clip_fraction']:.0%} of the tokens are clipped: the steps are too large. Lower "
                "rl.learning_rate or rl.num_epochs",
            )
        if last.get("sampler_kl", 0.0) > MISMATCH:
            yield (
                "sampler mismatch",
                f"the server's distribution is {last['sampler_kl']:.2g} nats per token from the policy's, and "
                f"{last['importance_capped']:.0%} of the tokens have a capped weight. Check that it serves this model "
                "in the policy's precision, without quantization",
            )
        for name in self.held_out:
            proxy, gold = _drift(self._rows, "score"), _drift(self._rows, name)
            if proxy > DRIFT and gold < -DRIFT:
                yield (
                    f"reward hacking ({name})",
                    f"the trained score rises by {proxy:.1f} standard errors and {name} falls by {-gold:.1f}. Raise "
                    "rl.kl_coef, stop earlier, or mend the reward",
                )


def _drift(rows: Sequence[Row], name: str) -> float:
    """Last window minus first, in standard errors of that difference; 0 before there are two windows."""
    if len(rows) < 2 * WINDOW:
        return 0.0
    first, last = ([row[name] for row in part] for part in (rows[:WINDOW], rows[-WINDOW:]))
    error = math.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / WINDOW)
    difference = float(np.mean(last) - np.mean(first))
    if error > 0:
        return difference / error
    return math.copysign(math.inf, difference) if difference else 0.0
