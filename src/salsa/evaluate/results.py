"""What an evaluation measured, of a run or of any checkpoints: one schema, the content of `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, read_jsonl, versions
from salsa.config import Recipe, RLConfig
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.benchmarks import Bench
from salsa.evaluate.judgments import Arms, NoVerdict, PairsSummary, PairSummary, grouped
from salsa.evaluate.significance import holm, mcnemar
from salsa.evaluate.winrate import two_level_mean, two_level_win_rate
from salsa.runtime.tracking import round_metric
from salsa.stages.directory import Stage, policy_label

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


def results_of(
    recipe: Recipe, stages: Sequence[Stage], samples: Mapping[str, Sequence[Checkpoint]]
) -> Results:
    """What a finished run measured; `samples`: arm → seed → the directory of `samples.jsonl`."""
    policies = {
        s.path: s.record["inputs"]["policy"] for s in stages if "policy" in s.record["inputs"]
    }
    metrics = {stage.label: stage.metrics for stage in stages}
    seeds = recipe.rl.seeds
    arms = {}
    for name, of_arm in samples.items():
        arm = recipe.rl.arms.get(name)
        arms[name] = Arm(
            labels=[f"{name}-seed-{seed}" for seed in seeds],
            seeds=seeds,
            policies=[policies[one.path] for one in of_arm],
            init=arm.init if arm else recipe.eval.shown,
            reference=arm.reference if arm else recipe.eval.shown,
            trained=arm is not None,
        )
    return Results(
        name=recipe.name,
        baseline=recipe.eval.baseline,
        arms=arms,
        recipe=recipe.model_dump(mode="json"),
        samples=samples,
        scores=("proxy", *recipe.eval.score_names),
        kl_to=recipe.eval.kl_to,
        remarks=_remarks(recipe),
        curves={
            name: [metrics[policy_label(name, seed)] for seed in seeds] for name in recipe.rl.arms
        },
        stages=stages,
    )


def _remarks(recipe: Recipe) -> list[str]:
    """What a reader must know of how the models were made."""
    sentences = []
    if (preferences := recipe.preferences) is not None and preferences.labeller is not None:
        sentences.append(
            f"The preferences are synthetic. Two replies per prompt were sampled from the {recipe.sft.count} SFT "
            f"models and scored by {preferences.labeller.call}; reply a was labelled better with probability "
            f"sigmoid((score a − score b) / {preferences.noise:g}). No person compared them."
        )
    configs = {name: recipe.rl.config_of(name) for name in recipe.rl.arms}
    betas = {name: c.kl_coef for name, c in configs.items() if isinstance(c, RLConfig)}
    used = f"Every arm used the same β = {next(iter(betas.values()), recipe.rl.kl_coef):g}."
    if len(set(betas.values())) > 1:
        used = "β: " + ", ".join(f"{name} {beta:g}" for name, beta in betas.items()) + "."
    sentences.append(
        f"{used} The same β is another constraint once the reference moves, so compare arms at equal KL to "
        f"{recipe.eval.shown} (the reward–KL plot), not by reward alone."
    )
    sentences.append(
        "The proxy is what the policies were trained to raise. A proxy that rises while a held-out score does not is "
        "reward hacking, not improvement."
    )
    return sentences


def summarise(results: Results) -> dict[str, Any]:
    """The content of `report.json`. All that may differ between two equal runs lies under `times`."""
    tables = {name: _table(results, of_arm) for name, of_arm in results.samples.items()}
    arms = results.arms
    models = {label: (name, k) for name, arm in arms.items() for k, label in enumerate(arm.labels)}
    judged = {bench.name: _bench(bench, models) for bench in results.benches}
    untrained = [name for name, arm in arms.items() if arm.trained is False]
    order = list(dict.fromkeys([*untrained, results.baseline, *arms]))
    ended = {name: table["ended"][0].tolist() for name, table in tables.items()}
    return {
        "name": results.name,
        "baseline": results.baseline,
        "notes": [*results.remarks, *_notes(results, judged)],
        "num_seeds": results.num_seeds,
        "num_prompts": next(iter(tables.values()))["length"].shape[1] if tables else 0,
        "scores": list(results.scores),
        "kl_to": list(results.kl_to),
        "arms": {name: _arm(arm, tables.get(name, {})) for name, arm in arms.items()},
        "pairs": [pair for score in results.scores for pair in pairs_of(score, tables, order)],
        "ended": [  # McNemar's test on ending by itself, every arm against the first
            {"candidate": arm, "baseline": order[0]} | rounded(mcnemar(ended[arm], ended[order[0]]))
            for arm in (order[1:] if tables and results.num_seeds == 1 else ())
        ],
        "benchmarks": judged,
        "judge": results.judge,
        "recipe": results.recipe,
        "versions": versions(),
        "stages": [
            {"stage": s.label, "digest": s.digest, "output": s.record["output"]}
            for s in results.stages
        ],
        "usage": _usage(results),
        "times": {s.label: _seconds(s) for s in results.stages},
    }


def _usage(results: Results) -> dict[str, dict[str, Any]]:
    """Trained arm → its stages, and the tokens of all its seeds; `times` has their seconds."""
    return {
        name: {
            "stages": [policy_label(name, seed) for seed in results.arms[name].seeds],
            "tokens": {
                phase: sum(_tokens(row, phase) for rows in of_arm for row in rows)
                for phase in ("rollout", "update")
            },
        }
        for name, of_arm in results.curves.items()
    }


def _tokens(row: Mapping[str, Any], phase: str) -> int:
    """Tokens of one update's phase; 0 where that is not measured (DPO)."""
    return round(row.get(f"tokens_per_second_{phase}", 0) * row.get(f"seconds_{phase}", 0))


def _seconds(stage: Stage) -> float:
    """How long a stage took; of one that was interrupted at least what its updates took."""
    rows = stage.metrics
    phases = sum(v for row in rows for name, v in row.items() if name.startswith("seconds_"))
    return max(stage.record["seconds"], round(phases, 2))


def verdict_rows(bench: Bench) -> list[dict[str, Any]]:
    """Rows for the verdict browser: question, both answers, both games' judgments and what came of them."""
    try:
        comparisons = pairs_summary(bench, {}).comparisons
    except NoVerdict:
        return []
    known = {question.id: question for question in bench.questions}
    texts = {}
    for row in bench.pairs:
        if "games" in row:  # the candidate is second in Arena-Hard's first game
            key = (row["uid"], 1, row["model"], row["baseline"])
            texts[key] = [game["judgment"]["answer"] for game in row["games"]][::-1]
        else:
            key = (row["question_id"], row["turn"], row["model_1"], row["model_2"])
            texts[key] = [row["g1_judgment"], row["g2_judgment"]]
    rows = []
    for one in comparisons:
        question, names = known[one.question], (one.candidate, one.baseline)
        rows.append(
            {
                "bench": bench.name,
                "question": str(question.id),
                "category": question.category,
                "turn": one.turn,
                "candidate": one.candidate,
                "baseline": one.baseline,
                "outcome": one.outcome,
                "games": list(one.games),
                "asked": list(question.turns[: one.turn]),
                "answers": [list(bench.answers[m][question.id][: one.turn]) for m in names],
                "judgments": texts.get((one.question, one.turn, *names), ["", ""]),
                "lengths": one.lengths,
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
    """Every pair of arms by the column `score` of `tables`, arm → column → values [seeds, prompts].

    The earlier arm is the baseline; p-values are also corrected by Holm for the number of pairs.
    """
    rows = []
    for baseline, candidate in combinations(arms, 2):
        own, other = tables[candidate][score], tables[baseline][score]
        rows.append(
            {"score": score, "candidate": candidate, "baseline": baseline}
            | _rate(two_level_win_rate(own, other))
            | {"difference": rounded(two_level_mean(own - other))}
            | {"by_seed": _by_seed(own, other)}
        )
    return _with_holm(rows, [row["p_value"] for row in rows])


def _by_seed(own: np.ndarray, other: np.ndarray) -> list[dict[str, Any]]:
    """The comparison in every seed alone, with intervals over its prompts; nothing where there is one seed."""
    rows = []
    for one, against in zip(own[:, None], other[:, None], strict=True):
        rate = rounded(two_level_win_rate(one, against))
        mean = rounded(two_level_mean(one - against))
        difference = {key: mean[key] for key in ("mean", "low", "high")}
        rows.append(
            {key: rate[key] for key in ("rate", "low", "high")} | {"difference": difference}
        )
    return rows if len(rows) > 1 else []


def rounded(estimate: Any) -> dict[str, Any]:
    """The fields of an estimate, or of several, shortened to what compares runs; keys become text."""
    return _shortened(asdict(estimate))


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _shortened(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(each) for each in value]
    return round_metric(value) if isinstance(value, float) else value


def _table(results: Results, samples: Sequence[Checkpoint]) -> dict[str, np.ndarray]:
    """Column → array [seeds, prompts]; a run's samples also have the KL to their own reference."""
    rows = [read_jsonl(one.path / "samples.jsonl") for one in samples]
    own = ["kl_reference"] if "kl_reference" in rows[0][0] else []
    columns = [*results.scores, *(f"kl_to_{m}" for m in results.kl_to), *own, "length", "ended"]
    return {c: np.array([[float(row[c]) for row in seed] for seed in rows]) for c in columns}


def _arm(arm: Arm, table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    columns = {"eos_rate" if name == "ended" else name: values for name, values in table.items()}
    each = enumerate(zip(arm.seeds, arm.labels, arm.policies, strict=True))
    return {
        "init": arm.init,
        "reference": arm.reference,
        "trained": arm.trained,
        "seeds": [
            {"seed": seed, "label": label, "policy": policy}
            | {name: round_metric(values[row].mean()) for name, values in columns.items()}
            for row, (seed, label, policy) in each
        ],
        "mean": {name: rounded(two_level_mean(values)) for name, values in columns.items()},
    }


def _notes(results: Results, judged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number."""
    count = results.num_seeds
    seeds = (
        "One training seed per arm: the intervals cover prompts only and say nothing about another seed."
        if count == 1
        else f"{count} training seeds per arm: the intervals are Student's t over prompts or over seeds, whichever is "
        "wider."
    )
    few = " With so few seeds they are wide; more seeds narrow them faster than more prompts."
    notes = [seeds + (few if 1 < count < 4 else "")]
    computed = grouped((stage.record.get("precision"), stage.label) for stage in results.stages)
    computed.pop(None, None)
    if len(computed) > 1:
        parts = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in computed.items())
        notes.append(
            f"Stages of this run were computed in different arithmetic ({parts}). Their difference is part of every "
            "comparison across that line."
        )
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


def _bench(bench: Bench, arms: Arms) -> dict[str, Any]:
    """Rates and ratings of one benchmark; a judge that never gave a verdict is told, and the rest still stands."""
    singles: dict[str, Any] | None = None
    try:
        summary = pairs_summary(bench, arms)
        pairs, counts = list(summary.pairs.values()), dict(summary.counts)
    except NoVerdict as error:
        pairs, counts = [], {f"comparisons and no verdict at all ({error})": len(bench.pairs)}
    if bench.singles:
        categories = {question.id: question.category for question in bench.questions}
        try:
            ratings = mtbench.summarise_singles(bench.singles, categories=categories, arms=arms)
            singles = {
                "arms": {arm: rounded(one) for arm, one in ratings.models.items()},
                "differences": [
                    {"a": a, "b": b, **rounded(difference)}
                    for (a, b), difference in ratings.differences.items()
                ],
            }
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
    short = rounded(pair)
    return {
        "candidate": pair.candidate,
        "baseline": pair.baseline,
        **_rate(pair.win_rate),
        "sign_test": short["sign"],
        "position": rounded(pair.position),
        "length": rounded(pair.length) if pair.length else None,
        "by_category": short["by_category"],
        "by_turn": short["by_turn"],
        "by_seed": [
            {"seed": int(seed)} | {key: one[key] for key in ("rate", "low", "high")}
            for seed, one in short["by_seed"].items()
        ],
    }
