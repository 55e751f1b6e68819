"""Gates of the KL penalty: towards which model, with which sign, and whether its weight leaves anything to be seen."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from salsa.doctor.evidence import Episodes, RLRun
from salsa.doctor.findings import POWER_Z, Finding, Verdict, graded
from salsa.doctor.rollout import gap, limit_of, nearest


def reference_named(runs: Sequence[RLRun]) -> Finding | None:
    """Whether each run was pulled towards the very model that the recipe names, by digest."""
    known = [r for r in runs if r.reference_digest is not None and r.expected_digest is not None]
    if not known:
        return None
    wrong = [r for r in known if r.reference_digest != r.expected_digest]
    says = f"All of {len(known)} runs record the digest of the reference that the recipe names."
    if wrong:
        says = f"{wrong[0].name} was pulled towards another model than {wrong[0].named_reference} as it is now."
    return Finding(
        "kl",
        "reference by digest",
        "faulty" if wrong else "sound",
        says,
        ""
        if not wrong
        else "The reference was made anew or exchanged after RL: run the recipe again.",
        {"wrong": float(len(wrong))},
    )


def reference_used(episodes: Sequence[Episodes]) -> Finding | None:
    """Whether the reference's log-probabilities are those of the model on disk, by an independent forward pass."""
    known = [e for e in episodes if "ref_logprobs" in e.again]
    if not known:
        return None
    gaps = {
        id(e): gap(e.ref_logprobs, e.again["ref_logprobs"]) / limit_of(e.precision) for e in known
    }
    off = max(known, key=lambda e: gaps[id(e)])
    verdict: Verdict = "faulty" if gaps[id(off)] > 1 else "sound"
    value = gap(off.ref_logprobs, off.again["ref_logprobs"])
    says = f"{off.run}: the reference's log-probabilities, in training and anew, differ by {value:.2g} nats per token."
    if verdict == "faulty":
        others = {"the policy itself": off.logprobs} | dict(off.other_references)
        found = nearest(off.ref_logprobs, others, off.precision)
        says += (
            f" They are those of {found}." if found else " They are those of no model of this run."
        )
    return Finding(
        "kl",
        "reference in use",
        verdict,
        says,
        ""
        if verdict == "sound"
        else "Look at what is loaded as the reference, and whether it moves with the policy.",
        {"difference": value},
    )


def sign(episodes: Sequence[Episodes]) -> Finding | None:
    """β as the token rewards show it: the median of −reward / kl over tokens that do not end their reply.

    Exact up to rounding where the KL is in the reward, so a ratio that is off by a tenth is another formula. A median,
    since a score that stands at a wrong token is another gate's business.
    """
    slopes = {}
    for one in episodes:
        if one.config.get("kl_in") != "reward" or one.kl_coef == 0:
            continue
        kl = np.concatenate([k[:-1] for k in penalties(one)])
        reward = np.concatenate([r[:-1] for r in one.rewards])
        large = np.abs(kl) > 10 * limit_of(one.precision)
        if large.any():
            slope = float(np.median(-reward[large] / kl[large])) / one.kl_coef
            slopes[f"{one.run}, update {one.update}"] = slope
    if not slopes:
        return None
    name = max(slopes, key=lambda key: abs(slopes[key] - 1))
    slope = slopes[name]
    verdict: Verdict = "faulty" if abs(slope - 1) > 0.1 else "sound"
    word = "the sign is turned round" if slope < 0 else "the weight is another"
    return Finding(
        "kl",
        "sign and weight",
        verdict,
        f"{name}: the token rewards hold {slope:+.2f}·β of the KL"
        + ("." if verdict == "sound" else f", and should hold +1: {word}."),
        ""
        if verdict == "sound"
        else "r_t = −β·(log π − log π_reference): look at the order of the difference and "
        "at β where the rewards are made.",
        {"share of β": slope},
    )


def penalties(one: Episodes) -> list[np.ndarray]:
    """The KL estimate of every token, as the settings say, by its formula."""
    kind = one.config.get("kl_kind", "k1")
    found = []
    for ours, reference in zip(one.logprobs, one.ref_logprobs, strict=True):
        d = ours - reference
        found.append(d if kind == "k1" else d**2 / 2 if kind == "k2" else np.exp(-d) - 1 + d)
    return found


def negative(runs: Sequence[RLRun]) -> Finding | None:
    """The mean KL over a run is not below 0 (z test; k1 is noisy, the KL itself is never negative)."""
    found = {}
    for run in runs:
        kl = np.array([row["kl"] for row in run.rows])
        error = math.sqrt(sum(row["kl_stderr"] ** 2 for row in run.rows)) / max(len(kl), 1)
        if len(kl):
            z = (kl.mean() + limit_of(run.precision)) / error if error > 0 else 0.0
            found[run.name] = (float(kl.mean()), float(error), z)
    if not found:
        return None
    name = min(found, key=lambda key: found[key][2])
    mean, error, z = found[name]
    verdict = graded(stats.norm.cdf(z) * len(found)) if z < 0 else "sound"
    return Finding(
        "kl",
        "never negative",
        verdict,
        f"{name}: the KL to its reference is {mean:.3g} ± {error:.2g} nats per reply over the run.",
        ""
        if verdict == "sound"
        else "The replies were not drawn from the distribution that was scored: check "
        "temperature, padding and precision.",
        {"mean": mean, "standard error": error},
    )


def weight(runs: Sequence[RLRun], num_eval: int) -> Finding | None:
    """Whether β allows an effect that can be seen, and whether it holds anything back.

    Too strong: at the optimum π* ∝ ρ·e^(r/β) the score's mean rises by about σ²/β (Gaussian scores of deviation σ);
    faulty where that is less than the evaluation sees with power 0.8, 2.8·σ·√(2/n) of n replies an arm.
    Too weak: a reply that the reference finds no likelier than noise costs β·L·log V (L tokens out of V); where even
    that is less than σ, no policy is held back. Faulty if the recipe compares references, which are one experiment
    then; suspicious if it does not. Suspicious as well where the penalty that was paid, averaged over the
    run, is smaller than the standard error of the run's mean score: so far nobody could tell it from none.
    """
    pulling = [run for run in runs if run.pulls and run.rows and run.rows[0]["kl_coef"] > 0]
    room, bound, felt = {}, {}, {}
    for run in pulling:
        sigma, beta = run.rows[0]["score_std"], run.rows[0]["kl_coef"]
        if sigma > 0:
            room[run.name] = (sigma / beta) / (POWER_Z * math.sqrt(2 / max(num_eval, 1)))
            bound[run.name] = beta * run.rows[0]["length"] * math.log(run.vocabulary) / sigma
        sizes = np.array([row["score_std"] for row in run.rows])
        error = math.sqrt((sizes**2).sum() / int(run.config["rollout_size"])) / len(sizes)
        felt[run.name] = float(np.mean([row["kl_coef"] * row["kl"] for row in run.rows])) / max(
            error, 1e-12
        )
    if not room:
        return None
    tight, loose = min(room, key=room.__getitem__), max(bound, key=bound.__getitem__)
    most = max(felt, key=felt.__getitem__)
    compared = len({run.named_reference for run in pulling}) > 1
    verdict: Verdict = "sound"
    says = f"{most}: the penalty was {felt[most]:.2g} times the noise of the run's mean score."
    todo = ""
    if room[tight] < 1:
        verdict = "faulty"
        says = f"{tight}: the best policy at this β gains {room[tight]:.2g} of the least effect that can be seen."
        todo = "Lower rl.kl_coef: the penalty forbids whatever could be noticed."
    elif bound[loose] < 1:
        verdict = "faulty" if compared else "suspicious"
        says = f"{loose}: a reply of mere noise costs {bound[loose]:.2g} deviations of the score: nothing is held back."
        todo = "Raise rl.kl_coef, or say `reference: none` if that is what is wanted."
    elif felt[most] < 1:
        verdict = "suspicious"
        says = f"The penalty was at most {felt[most]:.2g} of the noise of a run's mean score: too little to tell."
        todo = "Train longer, or raise rl.kl_coef."
    numbers = {
        "possible gain over what can be seen": room[tight],
        "cost of noise in deviations of the score": bound[loose],
        "penalty over the noise of the mean score": felt[most],
    }
    return Finding("kl", "weight", verdict, says, todo, numbers)
