"""What an evaluation measured, of a run or of any checkpoints: one schema, the content of `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, read_jsonl, versions
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.benchmarks import Bench
from salsa.evaluate.judgments import Arms, NoVerdict, PairsSummary, PairSummary
from salsa.evaluate.mtbench import SinglesSummary
from salsa.evaluate.significance import holm, mcnemar
from salsa.evaluate.winrate import two_level_mean, two_level_win_rate
from salsa.runtime.tracking import round_metric
from salsa.stages.directory import Stage

DOUBTFUL_CONSISTENCY = 0.5
"""Below this share of verdicts that survive the swap the report warns."""


@dataclass(frozen=True)
class Arm:
    """One arm: a model for each training seed."""

    labels: Sequence[str]
    seeds: Sequence[int]
    policies: Sequence[str]
    """The models' digests."""
    init: str | None = None
    reference: str | None = None
    trained: bool | None = None
    """Whether this run trained it; None where that is not known."""


@dataclass(frozen=True)
class Results:
    """Everything that an evaluation did."""

    name: str
    baseline: str
    arms: Mapping[str, Arm]
    recipe: Mapping[str, Any]
    """What was asked for, every default written out."""
    samples: Mapping[str, Sequence[Checkpoint]] = field(default_factory=dict)
    """Arm → seed → the directory of `samples.jsonl`, where held-out prompts were answered."""
    scores: Sequence[str] = ()
    """What the samples are scored by."""
    kl_to: Sequence[str] = ()
    benches: Sequence[Bench] = ()
    judge: Mapping[str, Any] | None = None
    """The judge's name, parameters, tokens and cost."""
    remarks: Sequence[str] = ()
    """What a reader must know of how the models were made."""
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """Arm → seed → metrics of its training."""
    stages: Sequence[Stage] = ()

    @property
    def num_seeds(self) -> int:
        """Models per arm."""
        return len(next(iter(self.arms.values())).seeds)


def summarise(results: Results) -> dict[str, Any]:
    """The content of `report.json`. All that may differ between two equal runs lies under `times`."""
    tables = {name: _table(results, of_arm) for name, of_arm in results.samples.items()}
    models: Arms = {
        label: (name, seed)
        for name, arm in results.arms.items()
        for seed, label in enumerate(arm.labels)
    }
    judged = {bench.name: _bench(bench, models) for bench in results.benches}
    order = _baseline_first(results)
    return {
        "name": results.name,
        "baseline": results.baseline,
        "notes": [*results.remarks, *_notes(results, judged)],
        "num_seeds": results.num_seeds,
        "num_prompts": next(iter(tables.values()))["length"].shape[1] if tables else 0,
        "scores": list(results.scores),
        "kl_to": list(results.kl_to),
        "arms": {name: _arm(arm, tables.get(name, {})) for name, arm in results.arms.items()},
        "pairs": [pair for score in results.scores for pair in pairs_of(score, tables, order)],
        "ended": _ended(tables, order) if tables and results.num_seeds == 1 else [],
        "benchmarks": judged,
        "judge": results.judge,
        "recipe": results.recipe,
        "versions": versions(),
        "stages": [
            {"stage": s.label, "digest": s.digest, "output": s.record["output"]}
            for s in results.stages
        ],
        "times": {s.label: s.record["seconds"] for s in results.stages},
    }


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


def pairs_of(
    score: str, tables: Mapping[str, Mapping[str, np.ndarray]], arms: Sequence[str]
) -> list[dict[str, Any]]:
    """Every pair of arms by one score, with p-values that Holm corrected for the number of pairs.

    Args:
        score: which column decides.
        tables: arm → column → values [seeds, prompts].
        arms: in every pair the earlier is the baseline.
    """
    rows = []
    for baseline, candidate in combinations(arms, 2):
        own, other = tables[candidate][score], tables[baseline][score]
        rate = two_level_win_rate(own, other)
        rows.append(
            {"score": score, "candidate": candidate, "baseline": baseline}
            | _rate(rate)
            | {"difference": rounded(two_level_mean(own - other))}
            | {"by_seed": _by_seed(own, other)}
        )
    return _with_holm(rows, [row["p_value"] for row in rows])


def _by_seed(own: np.ndarray, other: np.ndarray) -> list[dict[str, Any]]:
    """The comparison in every seed alone, with intervals over its prompts; nothing where there is one seed."""
    rows = []
    for one, against in zip(own[:, None], other[:, None], strict=True):
        rate = rounded(two_level_win_rate(one, against))
        difference = rounded(two_level_mean(one - against))
        rows.append(
            {key: rate[key] for key in ("rate", "low", "high")}
            | {"difference": {key: difference[key] for key in ("mean", "low", "high")}}
        )
    return rows if len(rows) > 1 else []


def rounded(estimate: Any) -> dict[str, Any]:
    """The fields of an estimate, shortened to what compares runs."""
    return {
        key: round_metric(value) if isinstance(value, float) else value
        for key, value in asdict(estimate).items()
    }


def _table(results: Results, samples: Sequence[Checkpoint]) -> dict[str, np.ndarray]:
    """Column → array [seeds, prompts]; a run's samples also have the KL to their own reference."""
    rows = [read_jsonl(one.path / "samples.jsonl") for one in samples]
    own = ["kl_reference"] if "kl_reference" in rows[0][0] else []
    columns = [*results.scores, *(f"kl_to_{m}" for m in results.kl_to), *own, "length", "ended"]
    return {c: np.array([[float(row[c]) for row in seed] for seed in rows]) for c in columns}


def _baseline_first(results: Results) -> list[str]:
    """The arms; what was not trained comes before the baseline, the others after it."""
    untrained = [name for name, arm in results.arms.items() if arm.trained is False]
    first = list(dict.fromkeys([*untrained, results.baseline]))
    return first + [name for name in results.arms if name not in first]


def _arm(arm: Arm, table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    columns = {"eos_rate" if name == "ended" else name: values for name, values in table.items()}
    return {
        "init": arm.init,
        "reference": arm.reference,
        "trained": arm.trained,
        "seeds": [
            {"seed": seed, "label": label, "policy": policy}
            | {name: round_metric(values[row].mean()) for name, values in columns.items()}
            for row, (seed, label, policy) in enumerate(
                zip(arm.seeds, arm.labels, arm.policies, strict=True)
            )
        ],
        "mean": {name: rounded(two_level_mean(values)) for name, values in columns.items()},
    }


def _ended(
    tables: Mapping[str, Mapping[str, np.ndarray]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """McNemar's test on ending by itself, every arm against the first."""
    ended = {name: table["ended"][0].tolist() for name, table in tables.items()}
    return [
        {"candidate": arm, "baseline": order[0]} | rounded(mcnemar(ended[arm], ended[order[0]]))
        for arm in order[1:]
    ]


def _notes(results: Results, judged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number."""
    notes = [_seeds_note(results.num_seeds), *_arithmetic_note(results.stages)]
    for name, bench in judged.items():
        notes += [f"{name}: {count} {what}." for what, count in bench["counts"].items()]
        for arm, one in (bench["singles"] or {"arms": {}})["arms"].items():
            if one["score"]["stderr"] == 0:
                notes.append(
                    f"{name}: every rating of {arm} is {one['score']['mean']:g}. A judge that rates everything alike "
                    "says nothing, and its interval has no width."
                )
        for pair in bench["pairs"]:
            consistency = pair["position"]["consistency"]
            if consistency is not None and consistency < DOUBTFUL_CONSISTENCY:
                notes.append(
                    f"{name}, {pair['candidate']} against {pair['baseline']}: only {consistency:.0%} of the verdicts "
                    "survive exchanging the answers' places. What does not survive counts as a tie, which pulls the "
                    "rate towards 50 %: this judge can hardly tell these answers apart."
                )
    return notes


def _seeds_note(count: int) -> str:
    if count == 1:
        return "One training seed per arm: the intervals cover prompts only and say nothing about another seed."
    few = " With so few seeds they are wide; more seeds narrow them faster than more prompts."
    return (
        f"{count} training seeds per arm: the intervals are Student's t over prompts or over seeds, whichever is wider."
        + (few if count < 4 else "")
    )


def _arithmetic_note(stages: Sequence[Stage]) -> list[str]:
    """A note if stages were computed differently."""
    computed: dict[str, list[str]] = {}
    for stage in stages:
        if (precision := stage.record.get("precision")) is not None:
            computed.setdefault(precision, []).append(stage.label)
    if len(computed) < 2:
        return []
    parts = "; ".join(f"{precision}: {', '.join(labels)}" for precision, labels in computed.items())
    return [
        f"Stages of this run were computed in different arithmetic ({parts}). Their difference is part of every "
        "comparison across that line."
    ]


def _bench(bench: Bench, arms: Arms) -> dict[str, Any]:
    """Rates and ratings of one benchmark; a judge that never gave a verdict is told, and the rest still stands."""
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
    return {
        "num_questions": len(bench.questions),
        "pairs": _with_holm([_pair(p) for p in pairs], [p.win_rate.p_value for p in pairs]),
        "singles": singles,
        "counts": counts,
    }


def _with_holm(rows: list[dict[str, Any]], p_values: Sequence[float]) -> list[dict[str, Any]]:
    adjusted = holm(p_values)
    return [row | {"p_holm": round_metric(p)} for row, p in zip(rows, adjusted, strict=True)]


def _rate(rate: Any) -> dict[str, Any]:
    return rounded(rate) | {"verdict": rate.verdict, "resolution": round_metric(rate.resolution)}


def _pair(pair: PairSummary) -> dict[str, Any]:
    position, length = pair.position, pair.length
    return {
        "candidate": pair.candidate,
        "baseline": pair.baseline,
        **_rate(pair.win_rate),
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


def _identity(row: Mapping[str, Any]) -> tuple[Any, int, str, str]:
    if "games" in row:
        return row["uid"], 1, row["model"], row["baseline"]
    return row["question_id"], row["turn"], row["model_1"], row["model_2"]


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Both games' judgments, the candidate first in the first of them."""
    if "games" in row:
        return [game["judgment"]["answer"] for game in row["games"]][::-1]
    return [row["g1_judgment"], row["g2_judgment"]]
