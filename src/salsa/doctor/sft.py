"""Gates of SFT: did it learn, for too long, do its replies end, do the models differ, and can they be averaged."""

import math
from itertools import combinations

import numpy as np
from scipy import stats

from salsa.doctor.evidence import SFT
from salsa.doctor.findings import (
    FAULTY,
    SUSPICIOUS,
    Finding,
    Verdict,
    graded,
    p_below,
    p_mean_above,
    percent,
    worst,
)

FORGOTTEN = 0.1
"""Share of what the base knows of the next token, log V − its loss, whose loss is a fault."""
MEMORISED = 2.0
"""Where the loss on seen rows fell by more than twice what it fell on unseen ones, most of it is memory."""
ENDS_MARGIN = 0.1
"""Share of replies by which the ended ones may lie below the training replies without consequence."""
ENDS_LEAST = 0.2
"""Of the share that is expected: if fewer end, EOS is lost; if more do, the prompts may ask for longer replies."""


def learned(sft: SFT | None) -> Finding | None:
    """Whether the loss on replies fell, against the base, on rows that were not trained on (paired t test).

    Suspicious where it did not; faulty where a tenth of what the base knew of the next token (log V − loss) is lost.
    """
    if sft is None or not sft.trained:
        return None
    where = "unseen" if "unseen" in sft.base else "seen"
    gains = [sft.base[where].loss - model[where].loss for model in sft.models]
    worse = min(range(len(gains)), key=lambda i: gains[i].mean())
    gain = gains[worse]
    seen = sft.base["seen"].loss - sft.models[worse]["seen"].loss
    known = math.log(sft.vocabulary) - float(sft.base[where].loss.mean())
    verdict: Verdict = "suspicious" if p_mean_above(gain) > SUSPICIOUS else "sound"
    if p_mean_above(-gain, FORGOTTEN * max(known, 0.0)) < FAULTY:
        verdict = "faulty"
    word = "less" if gain.mean() >= 0 else "more"
    todo = ""
    if verdict != "sound":
        todo = (
            "It learns its rows by heart and not what they have in common: fewer sft.epochs, a lower "
            "sft.learning_rate or more rows."
            if seen.mean() > 0
            else "It got worse or did not move: lower sft.learning_rate if the loss diverged, raise it otherwise."
        )
    numbers = {f"gain on {where} rows, sft[{i}]": float(g.mean()) for i, g in enumerate(gains)}
    return Finding(
        "sft",
        "learned",
        verdict,
        f"sft[{worse}] has {abs(gain.mean()):.3f} nats per token {word} loss than the base on {where} replies"
        + (
            f", and {seen.mean():+.3f} gained on those it was trained on."
            if where == "unseen"
            else "."
        ),
        todo,
        numbers | {"gain on seen rows": float(seen.mean()), "known by the base": known},
    )


def overfitted(sft: SFT | None) -> Finding | None:
    """Whether most of what was gained is memory of the very rows: suspicious, since the model may still be the best.

    z test of gain on seen rows − 2·gain on unseen ones; they are different rows, so their variances add up.
    """
    if sft is None or not sft.trained or "unseen" not in sft.base:
        return None
    gains, p_values = [], []
    for model in sft.models:
        seen = sft.base["seen"].loss - model["seen"].loss
        unseen = sft.base["unseen"].loss - model["unseen"].loss
        variance = seen.var(ddof=1) / len(seen) + MEMORISED**2 * unseen.var(ddof=1) / len(unseen)
        z = (seen.mean() - MEMORISED * unseen.mean()) / max(math.sqrt(variance), 1e-12)
        gains.append((float(seen.mean()), float(unseen.mean())))
        p_values.append(float(stats.norm.sf(z)))
    which = int(np.argmin(p_values))
    verdict: Verdict = "suspicious" if p_values[which] < SUSPICIOUS else "sound"
    return Finding(
        "sft",
        "memory",
        verdict,
        f"sft[{which}] gained {gains[which][0]:+.3f} nats per token on rows it was trained on and "
        f"{gains[which][1]:+.3f} on others.",
        "" if verdict == "sound" else "Fewer sft.epochs, a lower sft.learning_rate, or more rows.",
        {"gain on seen rows": gains[which][0], "gain on unseen rows": gains[which][1]},
    )


def ends(sft: SFT | None) -> Finding | None:
    """Whether the models know where a reply ends: the loss of the end token, and how many replies end."""
    if sft is None:
        return None
    where = "unseen" if "unseen" in sft.base else "seen"
    verdicts: list[Verdict] = []
    falls = []
    if sft.trained:
        for model in sft.models:
            fall = model[where].end - sft.base[where].end  # above 0: the end became less likely
            gain = sft.base["seen"].loss - model["seen"].loss
            falls.append(float(fall.mean()))
            # the end belongs to the reply: where the words got likelier it may not get less likely
            verdicts.append(graded(p_mean_above(fall)) if gain.mean() > 0 else "sound")
    says = []
    if falls:
        word = "less" if max(falls) > 0 else "more"
        says = [
            f"the end of a reply is {abs(max(falls)):.2f} nats {word} likely than under the base"
        ]
    numbers = {"loss of the end, minus the base's": max(falls)} if falls else {}
    if sft.ended is not None and len(sft.ended):
        count, total = int(sft.ended.sum()), len(sft.ended)
        below = lambda share: graded(p_below(count, total, share))
        few = below(max(sft.expected_ends - ENDS_MARGIN, 0.0)) != "sound"
        hardly_any = below(ENDS_LEAST * sft.expected_ends) == "faulty"
        verdicts.append("faulty" if few and hardly_any else "suspicious" if few else "sound")
        says.append(
            f"{percent(count / total)} of sft[0]'s replies end by themselves ({percent(sft.expected_ends)} of the "
            "training replies would at that length)"
        )
        numbers |= {"ended": count / total, "expected": sft.expected_ends}
    if not says:
        return None
    verdict = worst(verdicts)
    text = "; ".join(says)
    return Finding(
        "sft",
        "ends its replies",
        verdict,
        f"{text[0].upper()}{text[1:]}.",
        ""
        if verdict == "sound"
        else "See that EOS ends every training reply and counts in the loss, and that "
        "sft.max_length does not cut it off.",
        numbers,
    )


def differ(sft: SFT | None) -> Finding | None:
    """Whether models of different seeds are different models."""
    if sft is None or len(sft.digests) < 2:
        return None
    same = [
        (i, j)
        for i, j in combinations(range(len(sft.digests)), 2)
        if sft.digests[i] == sft.digests[j]
    ]
    unmoved = [i for i, digest in enumerate(sft.digests) if digest == sft.base_digest]
    verdict: Verdict = "faulty" if same or unmoved else "sound"
    says = f"The {len(sft.digests)} SFT models are different models."
    if same:
        says = f"sft[{same[0][0]}] and sft[{same[0][1]}] are the same model: their average is one of them."
    if unmoved:
        says = f"sft[{unmoved[0]}] is the base itself: it was not trained."
    return Finding(
        "sft",
        "seeds differ",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "See that every seed reaches the order of the data, and that each model is "
        "written where it is read.",
        {"equal pairs": float(len(same))},
    )


def barrier(sft: SFT | None) -> Finding | None:
    """The loss half-way between two ingredients, against the mean of theirs (Frankle et al. 2020): paired t test.

    Suspicious if it is higher; faulty if even the worse ingredient is better than their average.
    """
    if sft is None or sft.midpoint is None:
        return None
    where = "unseen" if "unseen" in sft.midpoint else "seen"
    one, two = (sft.models[i][where].loss for i in sft.ends)
    middle = sft.midpoint[where].loss
    rise, over = middle - (one + two) / 2, middle - (one if one.mean() > two.mean() else two)
    verdict: Verdict = "sound"
    if p_mean_above(rise) < SUSPICIOUS:
        verdict = "suspicious"
    if p_mean_above(over) < FAULTY:
        verdict = "faulty"
    i, j = sft.ends
    return Finding(
        "sft",
        "close enough to average",
        verdict,
        f"Half-way between sft[{i}] and sft[{j}] the loss is {rise.mean():+.3f} nats per token against the mean of "
        "the two.",
        ""
        if verdict == "sound"
        else "The models lie in different basins: a smaller sft.learning_rate or fewer "
        "epochs keeps them near their base. The average of these is no model to pull towards.",
        {"barrier": float(rise.mean()), "against the worse of the two": float(over.mean())},
    )
