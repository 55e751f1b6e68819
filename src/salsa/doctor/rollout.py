"""Gates of the rollout: are the replies what the trainer takes them for, token by token."""

from collections.abc import Mapping, Sequence

import numpy as np

from salsa.doctor.evidence import Episodes, Ragged, RLRun
from salsa.doctor.findings import Finding, Verdict

_LOGIT = 30.0
"""A large logit: its unit roundoff is that of a log-probability."""
ROUNDING = {
    # between the two arithmetics' unit roundoffs 2^-24 and 2^-9, in the geometric middle
    "fp32": _LOGIT * 2.0**-16.5,
    # twice that of one logit in bf16: both sides round
    "bf16": 2 * _LOGIT * 2.0**-9,
}
"""Mean |difference| of log-probabilities per token, in nats, that rounding may make."""


def limit_of(precision: str) -> float:
    """What rounding may make in a run of that arithmetic."""
    return ROUNDING.get(precision, ROUNDING["bf16"])


def gap(ours: Ragged, theirs: Ragged) -> float:
    """Mean |difference| over all tokens; inf if the shapes differ."""
    if any(len(a) != len(b) for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    a, b = np.concatenate(list(ours)), np.concatenate(list(theirs))
    return float(np.abs(a - b).mean()) if len(a) else 0.0


def ends(episodes: Sequence[Episodes], runs: Sequence[RLRun]) -> Finding | None:
    """Where replies end: one shorter than the limit ends in EOS, none goes on after it; a logical must, no test.

    Also from the learning curve alone: a reply without EOS is as long as the limit, so
    mean length ≥ (1 − eos_rate)·limit.
    """
    if not episodes and not any(run.rows for run in runs):
        return None
    open_, beyond, shown, total = 0, 0, [], 0
    for one in episodes:
        limit, stops = int(one.config["max_new_tokens"]), set(one.eos_ids)
        for tokens, text in zip(one.responses, one.texts, strict=True):
            total += 1
            if any(token in stops for token in tokens[:-1]):
                beyond += 1
                shown.append(f"{one.run}: goes on after its end, {len(tokens)} tokens: {text!r}")
            elif len(tokens) < limit and (not tokens or tokens[-1] not in stops):
                open_ += 1
                shown.append(f"{one.run}: {len(tokens)} tokens and no end: {text!r}")
    short = [
        run.name
        for run in runs
        for row in run.rows
        if row["length"] < (1 - row["eos_rate"]) * int(run.config["max_new_tokens"]) - 1e-3
    ]
    wrong = open_ + beyond
    verdict: Verdict = "faulty" if wrong or short else "sound"
    says = f"All of {total} replies end where their mask ends."
    if not total:
        says = "By length and share of ended replies, none is cut before its end."
    if beyond:
        says = f"{beyond} of {total} replies go on after their end: the mask counts padding."
    elif open_ or short:
        says = (
            f"{open_} of {total} replies are shorter than the limit and have no end: the mask leaves EOS out."
            if open_
            else f"{short[0]}: replies without an end are shorter than the limit."
        )
    return Finding(
        "rollout",
        "ends of replies",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "Masks come from lengths and cover EOS; padding may equal EOS. Look at "
        "response_mask where the sampler makes it.",
        {"without an end": float(open_), "after their end": float(beyond)},
        shown[:3],
    )


def prompts(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether the prompts that were answered are the recipe's, as the chat template renders them."""
    if not episodes:
        return None
    unknown = [e.run for e in episodes if not e.known_prompts]
    return Finding(
        "rollout",
        "prompts",
        "faulty" if unknown else "sound",
        f"{unknown[0]} answered prompts that the recipe does not render."
        if unknown
        else "They are the recipe's.",
        "" if not unknown else "Look at one prompt's tokens, and at the chat template.",
        {"runs": float(len(set(unknown)))},
    )


def sampler(runs: Sequence[RLRun]) -> Finding | None:
    """Whether sampler and trainer agree on the log-probability of what was sampled (`sampler_gap`)."""
    known = [run for run in runs if run.rows and "sampler_gap" in run.rows[0]]
    if not known:
        return None
    ratio = {
        run.name: max(row["sampler_gap"] for row in run.rows) / limit_of(run.precision)
        for run in known
    }
    run = max(known, key=lambda one: ratio[one.name])
    gaps = [row["sampler_gap"] for row in run.rows]
    verdict: Verdict = "faulty" if ratio[run.name] > 1 else "sound"
    todo = ""
    if verdict == "faulty":
        first_fine = gaps[0] <= limit_of(run.precision)
        todo = (
            "It agreed at the start and does not later: the sampler holds old weights. Push the policy's to it after "
            "every update."
            if first_fine
            else "They compute differently from the start: another arithmetic (bf16 against fp32), another "
            "temperature, or another template."
        )
    return Finding(
        "rollout",
        "sampler against trainer",
        verdict,
        f"{run.name}: their log-probabilities differ by up to {max(gaps):.2g} nats per token; rounding makes at most "
        f"{limit_of(run.precision):.1g} in {run.precision}.",
        todo,
        {"largest": max(gaps), "first": gaps[0]},
    )


def old_logprobs(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether the policy's log-probabilities are those that its weights give, by an independent forward pass."""
    known = [e for e in episodes if "logprobs" in e.again]
    if not known:
        return None
    gaps = {id(e): gap(e.logprobs, e.again["logprobs"]) / limit_of(e.precision) for e in known}
    off = max(known, key=lambda e: gaps[id(e)])
    verdict: Verdict = "faulty" if gaps[id(off)] > 1 else "sound"
    value = gap(off.logprobs, off.again["logprobs"])
    like = nearest(off.logprobs, off.other_temperatures, off.precision)
    says = f"{off.run}: the policy's log-probabilities, in training and anew, differ by {value:.2g} nats per token."
    if like:
        says += (
            f" They are those at temperature {like}; the recipe says {off.config['temperature']:g}."
        )
    return Finding(
        "rollout",
        "log-probabilities",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "The temperature divides the logits of policy and reference alike, in sampling "
        "and in training; logits belong to the token that follows.",
        {"difference": value},
    )


def nearest(ours: Ragged, others: Mapping[str, Ragged], precision: str) -> str | None:
    """The one among `others` that `ours` is, to rounding."""
    close = {name: gap(ours, other) for name, other in others.items()}
    name = min(close, key=close.__getitem__, default=None)
    return name if name is not None and close[name] <= limit_of(precision) else None
