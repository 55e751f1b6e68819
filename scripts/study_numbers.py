"""The numbers of docs/findings.md, from the study's finished sweeps.

    python scripts/study_numbers.py runs

Prints Markdown of every part that is there: its verdicts; Kendall's τ between what part A forecast and what part B
reached; the gap of every trained arm to the optimum at its own KL; arms with the soup against the same arms without
it; the best of two SFT models against the soup; and, of the pretrained model, arms against ppo run by run.
"""

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from salsa.analysis.gap import agreement, gaps
from salsa.analysis.verdicts import judge

PARTS = ("study-forecast", "study-rl", "study-landscape", "study-grid", "study-controls")
PRETRAINED = ("smollm2", "smollm2-arms")
"""Sweeps of part E: too few pairs for verdicts over pairs."""
REFERENCES = {"salsa": "soup", "shrunk": "shrink(sft[0], base, soup)"}
"""Arm of part B → the candidate of part A that is its reference."""
DIRECT = (("salsa_weak", "ppo_weak"), ("dpo_soup", "dpo"))
"""Arms of part C2: with the soup as reference, and the same without it."""


def main() -> None:
    """Print the tables."""
    home = Path(sys.argv[1])
    found = {p: _read(home / p / "sweep.json") for p in PARTS if (home / p / "sweep.json").exists()}
    for sweep in found.values():
        _verdicts(sweep)
    if found.keys() >= {"study-forecast", "study-rl"}:
        _agreements(found["study-forecast"], found["study-rl"])
        _gaps(home / "study-forecast", home / "study-rl")
    if "study-controls" in found:
        _direct(home / "study-controls")
    if found.keys() >= {"study-landscape", "study-controls"}:
        _best_of_two(home / "study-landscape", home / "study-controls")
    for part in PRETRAINED:
        if (home / part / "points").exists():
            _run_by_run(home / part)
    for part in PARTS:
        if part not in found:
            print(f"\n{part}: not run to its end")


def _verdicts(sweep: dict[str, Any]) -> None:
    others = [axis for axis in sweep["axes"] if sweep["verdicts"] and axis in sweep["verdicts"][0]]
    print(f"\n## {sweep['name']}\n")
    _row(*others, "subject", "against", "at", "measure", "effect", "95 %", "verdict", "clusters",
         "spread", "power", "needed")  # fmt: skip
    _row(*["---"] * (len(others) + 11))
    for v in sweep["verdicts"]:
        _row(*(v[axis] for axis in others), v["subject"], v["baseline"], v["at"], v["measure"],
             _number(v["effect"]), f"[{_number(v['low'])}, {_number(v['high'])}]", v["verdict"], v["clusters"],
             _number(v["spread"]), _number(v["power"]), v["clusters_needed"] or "–")  # fmt: skip


def _agreements(forecast: dict[str, Any], trained: dict[str, Any]) -> None:
    """Effects by pair, at equal β."""
    print("\n## Forecast against training, at equal β\n")
    _row("arm", "β", "measure", "τ", "p", "same sign", "pairs")
    _row(*["---"] * 7)
    for arm, reference in REFERENCES.items():
        for beta in trained["axes"]["rl.kl_coef"]:
            for measure in ("proxy", "gold"):
                ahead = _effects(forecast, reference, measure, {}, "equal beta")
                reached = _effects(trained, arm, measure, {"rl.kl_coef": beta}, "held-out prompts")
                pairs = sorted(ahead.keys() & reached.keys())
                if len(pairs) < 3:
                    continue
                made = agreement([ahead[p] for p in pairs], [reached[p] for p in pairs])
                _row(arm, beta, measure, f"{made.tau:+.2f}", f"{made.p_value:.2f}",
                     f"{made.same_sign:.0%}", made.count)  # fmt: skip


def _effects(
    sweep: dict[str, Any], subject: str, measure: str, axes: dict[str, str], at: str
) -> dict[str, float]:
    """Pair → effect of a subject against the baseline sft[0] or ppo."""
    return {
        row["pair"]: row["effect"]
        for row in sweep["rows"]
        if (row["subject"], row["measure"], row["at"]) == (subject, measure, at)
        and row["baseline"] in ("sft[0]", "ppo")
        and all(row[axis] == value for axis, value in axes.items())
    }


def _gaps(forecasts: Path, runs: Path) -> None:
    print("\n## Trained arms and the optimum at their own KL, mean over pairs\n")
    _row("β", "arm", "KL", "proxy", "gap", "share of the possible gain", "pairs known / all")
    _row(*["---"] * 7)
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted((runs / "points").glob("*/report.json")):
        pair, beta = file.parent.name.split("_", 1)
        forecast = forecasts / "points" / f"{pair}_sft" / "forecast.json"
        if forecast.exists():
            for row in gaps(_read(forecast), _read(file)):
                found[beta, row["arm"]].append(row)
    for (beta, arm), rows in found.items():
        known = [row for row in rows if row["gap"] is not None]
        means = [f"{np.mean([row[key] for row in rows]):.3f}" for key in ("kl", "reached")]
        means += [
            f"{np.mean([r[k] for r in known]):.3f}" if known else "–" for k in ("gap", "share")
        ]
        _row(beta, arm, *means, f"{len(known)} / {len(rows)}")


def _direct(runs: Path) -> None:
    """Arms of part C2 that are to be compared with each other and not with ppo."""
    print("\n## With the soup against without it\n")
    _row("arm", "against", "measure", "effect", "95 %", "verdict")
    _row(*["---"] * 6)
    reports = [_read(file) for file in sorted((runs / "points").glob("*/report.json"))]
    for (arm, other), score in itertools.product(DIRECT, ("proxy", "gold")):
        made = judge([100 * (_rate(r, arm, other, score) - 0.5) for r in reports], margin=3)
        _row(arm, other, f"{score} win rate", f"{made.effect:+.2f}", f"[{made.low:+.2f}, {made.high:+.2f}]",
             made.verdict)  # fmt: skip


def _best_of_two(landscapes: Path, runs: Path) -> None:
    """Salsa against plain PPO from the better of the pair's two SFT models, by their proxy before RL."""
    print("\n## salsa against PPO on the best of two SFT models\n")
    _row("measure", "effect", "95 %", "verdict", "sft[1] was better in")
    _row(*["---"] * 5)
    better = {
        file.parent.name: _proxy(file, 1.0) > _proxy(file, 0.0)
        for file in (landscapes / "points").glob("*/landscape.json")
    }
    for score in ("proxy", "gold"):
        effects = []
        for pair, second in better.items():
            report = _read(runs / "points" / pair / "report.json")
            effects.append(
                100 * (_rate(report, "salsa", "other" if second else "ppo", score) - 0.5)
            )
        made = judge(effects, margin=3)
        _row(f"{score} win rate", f"{made.effect:+.2f}", f"[{made.low:+.2f}, {made.high:+.2f}]",
             made.verdict, f"{sum(better.values())} of {len(better)} pairs")  # fmt: skip


def _proxy(landscape: Path, alpha: float) -> float:
    places = _read(landscape)["places"]
    return next(p["columns"]["proxy"]["mean"] for p in places if p["at"] == [alpha])


def _rate(report: dict[str, Any], arm: str, other: str, score: str) -> float:
    """Win rate of one arm over another, over all seeds."""
    return _rates(report, arm, other, score)[0]


def _rates(report: dict[str, Any], arm: str, other: str, score: str) -> list[float]:
    """Win rates of one arm over another, whichever the report names first: over all seeds, then seed by seed."""
    for pair in report["pairs"]:
        if pair["score"] == score and {pair["candidate"], pair["baseline"]} == {arm, other}:
            rates = [pair["rate"], *(one["rate"] for one in pair.get("by_seed", []))]
            return rates if pair["candidate"] == arm else [1 - rate for rate in rates]
    raise KeyError(f"{report['name']}: no pair of {arm} and {other}")


def _run_by_run(sweep: Path) -> None:
    """Each arm's k-th seed over ppo's k-th on the same prompts, and the mean of all comparisons at one β."""
    print(f"\n## {sweep.name}: win rates over ppo in points above 50 %, run by run\n")
    _row("β", "arm", "measure", "effect", "95 %", "verdict", "spread", "runs")
    _row(*["---"] * 8)
    found: dict[tuple[float, str, str], dict[str, float]] = defaultdict(dict)
    for file in sorted((sweep / "points").glob("*/report.json")):
        report, pair = _read(file), file.parent.name.split("_")[0]
        beta = report["recipe"]["rl"]["kl_coef"]
        arms = [arm for arm in report["recipe"]["rl"]["arms"] if arm != "ppo"]
        for arm, score in itertools.product(arms, ("proxy", "human")):
            for seed, rate in enumerate(_rates(report, arm, "ppo", score)[1:]):
                found[beta, arm, score][f"{pair}/{seed}"] = 100 * (rate - 0.5)
    for (beta, arm, score), effects in sorted(found.items()):
        made = judge(list(effects.values()), margin=3)
        runs = ", ".join(f"{name} {effect:+.1f}" for name, effect in effects.items())
        _row(beta, arm, f"{score} win rate", _number(made.effect), f"[{_number(made.low)}, {_number(made.high)}]",
             made.verdict, _number(made.spread), runs)  # fmt: skip


def _number(value: float | None) -> str:
    """A dash where one cluster says nothing of a spread."""
    return "–" if value is None else f"{value:+.3f}"


def _row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
