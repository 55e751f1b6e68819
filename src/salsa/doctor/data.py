"""Gates of the data: what goes in, before anything is trained."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats
from scipy.special import expit

from salsa.doctor.evidence import SFT, Data
from salsa.doctor.findings import FAULTY, Finding, Verdict, graded, p_above, p_mean_above, percent

LONGER = 0.73
"""How often people agree on a comparison (73 %, Ouyang et al. 2022, section 3.4): labels that "the longer one wins"
predicts as well leave no room for what the replies say."""
FEW = 0.01
"""A hundredth of the rows may be odd without consequence: below it a finding is sound."""
MANY = 0.1
"""A tenth of the rows decides as much as a tenth of the gradient."""
CLUSTERED = 2.0
"""Rows per independent one from which on intervals over rows are √2 too narrow."""
SHORT = 12
"""Characters up to which a prompt is a greeting that anybody may repeat."""


def template_marks(data: Data) -> Finding | None:
    """Marks of the chat template inside a message: it was rendered before, and will be rendered again."""
    if not data.contents or not data.marks:
        return None
    marked = [text for text in data.contents if any(mark in text for mark in data.marks)]
    share = len(marked) / len(data.contents)
    return Finding(
        "data",
        "template marks",
        _by_share(share),
        f"{percent(share)} of {len(data.contents)} messages hold marks of the chat template ({', '.join(data.marks)}).",
        ""
        if not marked
        else "Give conversations as lists of messages, or prompts without the template's marks: the "
        "template is applied here, and what is rendered already would be rendered twice.",
        {"share": share},
        marked[:3],
    )


def template_known(sft: SFT | None) -> Finding | None:
    """Under which rendering SFT gained most on its rows: the chat template's, or another (paired t test over rows).

    Rows learned under one rendering get likelier under others too, but never by as much. Where they got likelier under
    none, the template is not what is wrong.
    """
    if sft is None or not sft.trained or "template" not in sft.renderings:
        return None
    gains = {name: sft.base_renderings[name] - loss for name, loss in sft.renderings.items()}
    others = {name: gain - gains["template"] for name, gain in gains.items() if name != "template"}
    p_values = {
        name: max(p_mean_above(more), p_mean_above(gains[name])) for name, more in others.items()
    }
    name = min(p_values, key=p_values.__getitem__)
    verdict = graded(p_values[name] * len(p_values))
    words = {"twice": "with the template applied twice", "bare": "without any template"}[name]
    means = {key: float(gain.mean()) for key, gain in gains.items()}
    return Finding(
        "data",
        "template of SFT",
        verdict,
        f"On its own rows sft[0] gained {means['template']:+.3f} nats per token under the chat template, and "
        f"{means[name]:+.3f} {words}.",
        ""
        if verdict == "sound"
        else f"The model was trained on text {words}, and everything later shows it the chat "
        "template. Look at one row as the trainer saw it.",
        {f"gain, {key}": value for key, value in means.items()},
    )


def truncated(data: Data) -> Finding | None:
    """Rows that are cut at the end (and so never show how a reply ends), or dropped as too long."""
    shares = {}
    if data.sft_tokens and data.sft_max_length:
        shares["SFT rows cut"] = float(np.mean(np.array(data.sft_tokens) > data.sft_max_length))
    if data.pairs is not None and data.pairs.tokens and data.pairs.max_length:
        tokens = np.array(data.pairs.tokens)
        shares["pairs dropped"] = float(np.mean(tokens > data.pairs.max_length))
    for source in data.sources:
        if source.role in ("rl", "eval") and source.prompts:
            total = len(source.prompts) + source.dropped
            shares[f"{source.role} prompts dropped"] = source.dropped / total
    if not shares:
        return None
    limits = {
        name: (_by_share(share) if "SFT" in name else _mild(share))
        for name, share in shares.items()
    }
    verdict: Verdict = max(limits.values(), key=("sound", "suspicious", "faulty").index)
    return Finding(
        "data",
        "length limits",
        verdict,
        f"At the length limits: {_listed(shares)}.",
        ""
        if verdict == "sound"
        else "Raise sft.max_length, reward.max_length or rl.max_prompt_tokens: a reply that "
        "is cut teaches the model not to end.",
        shares,
    )


def repeats(data: Data) -> Finding | None:
    """Rows that come again and again: n are worth n_eff = (Σ_k n_k)² / Σ_k n_k² different ones.

    A row is a prompt; of given preferences the whole pair, for one prompt may have many pairs of replies.
    """
    roles = ("rl", "eval", "preferences")
    texts = {one.role: one.prompts for one in data.sources if one.role in roles}
    pairs = data.pairs
    if given := pairs is not None and pairs.scores is None:
        whole = zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)
        texts["preferences"] = ["\n".join(pair) for pair in whole]
    found = {role: _clustering(rows) for role, rows in texts.items() if len(rows) > 1}
    if not found:
        return None
    role = max(found, key=found.__getitem__)
    factor, rows = found[role], len(texts[role])
    kind = "pairs" if given and role == "preferences" else "prompts"
    verdict: Verdict = (
        "faulty" if factor > CLUSTERED**2 else "suspicious" if factor > CLUSTERED else "sound"
    )
    often = Counter(texts[role]).most_common(3)
    return Finding(
        "data",
        "repeated prompts",
        verdict,
        f"{role}: {rows} {kind} are worth {rows / factor:.0f} different ones.",
        ""
        if verdict == "sound"
        else "Remove the repeats: an interval over rows is "
        f"{math.sqrt(factor):.1f} times too narrow, and training sees the same thing again and again.",
        {f"rows per different one, {name}": value for name, value in found.items()},
        [f"{count} × {text}" for text, count in often] if verdict != "sound" else (),
    )


def leaks(data: Data) -> Finding | None:
    """Held-out prompts that also train something, beyond what repeats by chance in data of this kind.

    The chance: how often a held-out prompt comes twice among the held-out ones themselves, as many draws later. Prompts
    of a few characters (greetings) are left out.
    """
    held_out = next((_long(s.prompts) for s in data.sources if s.role == "eval"), [])
    others = {s.role: _long(s.prompts) for s in data.sources if s.role != "eval" and s.prompts}
    if not held_out or not others:
        return None
    counts = Counter(held_out)
    again = sum(counts[text] > 1 for text in held_out)
    tests = {}
    for role, prompts in others.items():
        there = set(prompts)
        shared = sum(text in there for text in held_out)
        draws = len(prompts) / max(len(held_out) - 1, 1)
        chance = min(max((again + 1) / (len(held_out) + 1) * draws, FEW), 1.0)
        tests[role] = (shared, p_above(shared, len(held_out), chance))
    role = min(tests, key=lambda name: tests[name][1])
    shared, p_value = tests[role]
    verdict = graded(p_value * len(tests))
    there = set(others[role])
    return Finding(
        "data",
        "held-out prompts",
        verdict,
        f"{shared} of {len(held_out)} held-out prompts (of more than {SHORT} characters) are also among the {role} "
        "prompts.",
        ""
        if verdict == "sound"
        else f"Split {role} and eval by conversation, so that nothing that is evaluated was "
        "trained on.",
        {f"shared with {name}": float(count) for name, (count, _) in tests.items()},
        [text for text in held_out if text in there][:3] if verdict != "sound" else (),
    )


def empty_replies(data: Data) -> Finding | None:
    """SFT replies and preference replies without a word, and pairs of equal replies: they teach nothing."""
    shares, shown = {}, []
    if data.sft_replies:
        shares["empty SFT replies"] = float(np.mean([not r.strip() for r in data.sft_replies]))
    if (pairs := data.pairs) is not None and pairs.chosen:
        both = list(zip(pairs.chosen, pairs.rejected, strict=True))
        shares["pairs with an empty reply"] = float(
            np.mean([not (a.strip() and b.strip()) for a, b in both])
        )
        equal = [a for a, b in both if a.strip() == b.strip()]
        shares["pairs of equal replies"] = len(equal) / len(both)
        shown = equal[:3]
    if not shares:
        return None
    own = pairs is not None and pairs.scores is not None
    given = {n: s for n, s in shares.items() if not (own and n == "pairs with an empty reply")}
    verdict = _by_share(max(given.values(), default=0.0))
    if verdict == "sound" and _by_share(max(shares.values())) != "sound":
        verdict = "suspicious"
    return Finding(
        "data",
        "empty or equal replies",
        verdict,
        f"{_listed(shares)}." + (" Replies of pairs are the SFT models' own." if own else ""),
        "" if verdict == "sound" else "Remove these rows, and look at how they came about.",
        shares,
        shown,
    )


def length_labels(data: Data) -> Finding | None:
    """How often the chosen reply is the longer one (words; exact binomial test beyond a margin)."""
    if data.pairs is None or not data.pairs.chosen:
        return None
    longer, differ = longer_wins(data.pairs.chosen, data.pairs.rejected)
    share = longer / differ if differ else 0.5
    wins, rate = max(longer, differ - longer), max(share, 1 - share)
    verdict: Verdict = "sound"
    if p_above(wins, differ, LONGER) < FAULTY:
        verdict = "faulty"
    elif p_above(wins, differ, 0.5 + MANY) < 2 * FAULTY:
        verdict = "suspicious"
    word = "longer" if share >= 0.5 else "shorter"
    return Finding(
        "data",
        "labels and length",
        verdict,
        f"The {word} reply is chosen in {percent(rate)} of {differ} pairs of unequal length.",
        ""
        if verdict == "sound"
        else "A reward model can learn length from this and nothing else. Balance the pairs "
        "by length, or label them by what the replies say.",
        {"longer is chosen": share, "pairs": float(differ)},
    )


def labels_follow_labeller(data: Data) -> Finding | None:
    """Synthetic preferences: is the better-scored reply chosen as often as the noise says?

    A pair whose scores differ by d follows the labeller with probability σ(|d| / noise); the number of those that do is
    Poisson-binomial, here by its normal approximation.
    """
    pairs = data.pairs
    if pairs is None or pairs.scores is None:
        return None
    d = (pairs.scores[:, 0] - pairs.scores[:, 1]) / pairs.noise
    d = d[d != 0]
    if not len(d):
        return None
    chance = expit(np.abs(d))
    follow = d > 0
    z = (follow.sum() - chance.sum()) / math.sqrt(max((chance * (1 - chance)).sum(), 1e-9))
    verdict = graded(2 * stats.norm.sf(abs(z)))
    share, expected = float(follow.mean()), float(chance.mean())
    # with p of the labels flipped, agreement is (1 − p)·expected + p·(1 − expected)
    flipped = (expected - share) / (2 * expected - 1) if expected > 0.5 else math.nan
    shown = [
        f"chosen {c!r}, rejected {r!r}"
        for c, r, s in zip(pairs.chosen, pairs.rejected, pairs.scores, strict=False)
        if s[0] < s[1] - 2 * pairs.noise
    ]
    return Finding(
        "data",
        "labels and labeller",
        verdict,
        f"The reply that the labeller scores higher is chosen in {percent(share)} of {len(d)} pairs; its noise allows "
        f"for {percent(expected)}.",
        ""
        if verdict == "sound"
        else f"As if {percent(max(flipped, 0))} of the labels were flipped. Look at how "
        "chosen and rejected are assigned.",
        {"followed": share, "expected": expected, "flipped": flipped, "z": float(z)},
        shown[:3] if verdict != "sound" else (),
    )


def longer_wins(chosen: Sequence[str], rejected: Sequence[str]) -> tuple[int, int]:
    """(pairs whose chosen reply has more words, pairs of unequal length)."""
    lengths = [(len(a.split()), len(b.split())) for a, b in zip(chosen, rejected, strict=True)]
    return sum(a > b for a, b in lengths), sum(a != b for a, b in lengths)


def _clustering(prompts: Sequence[str]) -> float:
    counts = np.array(list(Counter(prompts).values()), dtype=float)
    return float((counts**2).sum() / counts.sum())


def _long(prompts: Sequence[str]) -> list[str]:
    return [text for text in prompts if len(text) > SHORT]


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in shares.items())


def _by_share(share: float) -> Verdict:
    return "faulty" if share > MANY else "suspicious" if share > FEW else "sound"


def _mild(share: float) -> Verdict:
    """What is only left out costs data and misleads nothing, unless most of it goes."""
    return "faulty" if share > 1 - MANY else "suspicious" if share > 0.5 else "sound"
