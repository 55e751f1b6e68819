"""What an evaluation of checkpoints found, as plain values: the content of its `report.json`, and rows to browse."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, versions
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.benchmarks import Bench
from salsa.evaluate.judge import Totals
from salsa.evaluate.judgments import Arms, NoVerdict, PairsSummary, PairSummary
from salsa.evaluate.mtbench import SinglesSummary
from salsa.evaluate.significance import holm, mcnemar
from salsa.evaluate.spec import EvalSpec
from salsa.evaluate.summary import pairs_of_score, rounded, tables
from salsa.evaluate.winrate import two_level_mean
from salsa.runtime.tracking import round_metric

DOUBTFUL_CONSISTENCY = 0.5
"""Below this share of verdicts that survive the swap the report warns."""


@dataclass(frozen=True)
class Results:
    """Everything that an evaluation did."""

    spec: EvalSpec
    models: Mapping[str, Sequence[str]]
    """Arm → its checkpoints' labels."""
    digests: Mapping[str, str]
    samples: Mapping[str, Sequence[Checkpoint]]
    """Arm → seed → scored responses to the held-out prompts."""
    benches: Sequence[Bench]
    totals: Totals

    @property
    def arms(self) -> Arms:
        """Label → (arm, seed)."""
        return {
            label: (arm, seed)
            for arm, labels in self.models.items()
            for seed, label in enumerate(labels)
        }


def summarise(results: Results) -> dict[str, Any]:
    """The content of `report.json`."""
    spec = results.spec
    judged = {bench.name: _bench(bench, results.arms) for bench in results.benches}
    samples = _samples(results) if results.samples else None
    return {
        "name": spec.name,
        "baseline": spec.against,
        "arms": list(results.models),
        "num_seeds": spec.num_seeds,
        "notes": notes(spec, judged),
        "judge": _judge(results) if spec.judge else None,
        "benchmarks": judged,
        "samples": samples,
        "models": {
            label: {"arm": arm, "seed": seed, "digest": results.digests[label]}
            for label, (arm, seed) in results.arms.items()
        },
        "spec": spec.model_dump(mode="json"),
        "versions": versions(),
    }


def notes(spec: EvalSpec, judged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number."""
    sentences = []
    if spec.num_seeds == 1:
        sentences.append(
            "One checkpoint per arm: the intervals cover prompts only and say nothing about another training seed."
        )
    else:
        sentences.append(
            f"{spec.num_seeds} checkpoints per arm: intervals are Student's t over prompts or over seeds, whichever is "
            "wider."
        )
    for name, bench in judged.items():
        for what, count in bench["counts"].items():
            sentences.append(f"{name}: {count} {what}.")
        for arm, one in (bench["singles"] or {"arms": {}})["arms"].items():
            if one["score"]["stderr"] == 0:
                sentences.append(
                    f"{name}: every rating of {arm} is {one['score']['mean']:g}. A judge that rates everything alike "
                    "says nothing, and its interval has no width."
                )
        for pair in bench["pairs"]:
            consistency = pair["position"]["consistency"]
            if consistency is not None and consistency < DOUBTFUL_CONSISTENCY:
                sentences.append(
                    f"{name}, {pair['candidate']} against {pair['baseline']}: only {consistency:.0%} of the verdicts "
                    "survive exchanging the answers' places. What does not survive counts as a tie, which pulls the "
                    "rate towards 50 %: this judge can hardly tell these answers apart."
                )
    return sentences


def verdict_rows(bench: Bench) -> list[dict[str, Any]]:
    """Rows for the verdict browser: question, both answers, both games' judgments and what came of them."""
    try:
        comparisons = pairs_summary(bench, {}).comparisons
    except NoVerdict:
        return []
    known = {question.id: question for question in bench.questions}
    raw = {_identity(row): row for row in bench.pairs}
    rows = []
    for comparison in comparisons:
        question = known[comparison.question]
        names = (comparison.candidate, comparison.baseline)
        row = raw.get((comparison.question, comparison.turn, *names))
        own, other = (bench.answers[name][question.id][: comparison.turn] for name in names)
        rows.append(
            {
                "bench": bench.name,
                "question": str(question.id),
                "category": question.category,
                "turn": comparison.turn,
                "candidate": names[0],
                "baseline": names[1],
                "outcome": comparison.outcome,
                "games": list(comparison.games),
                "asked": list(question.turns[: comparison.turn]),
                "answers": [list(own), list(other)],
                "judgments": _texts(row) if row else ["", ""],
                "lengths": comparison.lengths,
            }
        )
    return rows


def pairs_summary(bench: Bench, arms: Arms) -> PairsSummary:
    """Rates of a benchmark's pairs, with lengths."""
    lengths = {
        model: {q: [len(text) for text in texts] for q, texts in own.items()}
        for model, own in bench.answers.items()
    }
    if bench.pairs and "games" in bench.pairs[0]:
        return arena_hard.summarise_pairs(bench.pairs, lengths=lengths, arms=arms)
    categories = {question.id: question.category for question in bench.questions}
    return mtbench.summarise_pairs(bench.pairs, categories=categories, lengths=lengths, arms=arms)


def _bench(bench: Bench, arms: Arms) -> dict[str, Any]:
    """Figures of one benchmark; a judge that never gave a verdict is told, and the rest still stands."""
    pairs: list[PairSummary] = []
    singles, counts = None, {}
    try:
        summary = pairs_summary(bench, arms)
        pairs, counts = list(summary.pairs.values()), dict(summary.counts)
    except NoVerdict as error:
        counts[f"comparisons and no verdict at all ({error})"] = len(bench.pairs)
    if bench.singles:
        categories = {question.id: question.category for question in bench.questions}
        try:
            ratings = mtbench.summarise_singles(bench.singles, categories=categories, arms=arms)
            singles = _singles(ratings)
            counts |= {f"(ratings) {name}": count for name, count in ratings.counts.items()}
        except NoVerdict as error:
            counts[f"judgments and no rating at all ({error})"] = len(bench.singles)
    adjusted = holm([pair.win_rate.p_value for pair in pairs])
    return {
        "num_questions": len(bench.questions),
        "pairs": [
            _pair(one) | {"p_holm": round_metric(p)} for one, p in zip(pairs, adjusted, strict=True)
        ],
        "singles": singles,
        "counts": counts,
    }


def _pair(pair: PairSummary) -> dict[str, Any]:
    position, length = pair.position, pair.length
    return {
        "candidate": pair.candidate,
        "baseline": pair.baseline,
        **rounded(pair.win_rate),
        "verdict": pair.win_rate.verdict,
        "resolution": round_metric(pair.win_rate.resolution),
        "sign_test": rounded(pair.sign),
        "position": asdict(position)
        | {"consistency": position.consistency, "first_rate": position.first_rate},
        "length": asdict(length) | {"longer_rate": length.longer_rate} if length else None,
        "by_category": {name: rounded(rate) for name, rate in pair.by_category.items()},
        "by_turn": {str(turn): rounded(rate) for turn, rate in pair.by_turn.items()},
    }


def _singles(singles: SinglesSummary) -> dict[str, Any]:
    return {
        "arms": {
            arm: {
                "score": rounded(one.score),
                "by_category": {name: rounded(e) for name, e in one.by_category.items()},
                "by_turn": {str(turn): rounded(e) for turn, e in one.by_turn.items()},
                "n": one.n,
                "dropped": one.dropped,
            }
            for arm, one in singles.models.items()
        },
        "differences": [
            {"a": a, "b": b, **rounded(difference)}
            for (a, b), difference in singles.differences.items()
        ],
    }


def _samples(results: Results) -> dict[str, Any]:
    """Means of every figure of the held-out prompts, pairs by reward, and McNemar on ending by itself."""
    spec = results.spec
    metrics = [*spec.rewards, *([f"kl_to_{spec.kl_to}"] if spec.kl_to else []), "length", "ended"]
    values = {arm: tables(of_arm, metrics) for arm, of_arm in results.samples.items()}
    order = [spec.against, *(arm for arm in values if arm != spec.against)]
    first = {arm: np.concatenate(list(own["ended"])) for arm, own in values.items()}
    return {
        "num_prompts": next(iter(values.values()))["length"].shape[1],
        "rewards": list(spec.rewards),
        "kl_to": spec.kl_to,
        "arms": {
            arm: {name: rounded(two_level_mean(table)) for name, table in own.items()}
            for arm, own in values.items()
        },
        "pairs": [pair for name in spec.rewards for pair in pairs_of_score(name, values, order)],
        "ended": [
            {"candidate": arm, "baseline": spec.against}
            | rounded(mcnemar(first[arm].tolist(), first[spec.against].tolist()))
            for arm in order[1:]
        ]
        if spec.num_seeds == 1
        else [],
    }


def _judge(results: Results) -> dict[str, Any]:
    config = results.spec.judge
    assert config is not None
    cost = results.totals.cost(config.price)
    return {
        "model": config.model or config.path or config.replay,
        "parameters": config.request,
        "prompt_tokens": results.totals.prompt_tokens,
        "completion_tokens": results.totals.completion_tokens,
        "refused": results.totals.refused,
        "cut": results.totals.cut,
        "cost": None if cost is None else round_metric(cost),
    }


def _identity(row: Mapping[str, Any]) -> tuple[Any, int, str, str]:
    if "games" in row:
        return row["uid"], 1, row["model"], row["baseline"]
    return row["question_id"], row["turn"], row["model_1"], row["model_2"]


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Both games' judgments, the candidate first in the first of them."""
    if "games" in row:
        return [game["judgment"]["answer"] for game in row["games"]][::-1]
    return [row["g1_judgment"], row["g2_judgment"]]
