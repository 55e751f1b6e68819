"""The evaluated policies of a finished run, as `frontier` compares them: read from its stages' directories."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salsa.analysis.paths import START, Policy
from salsa.artifacts import read_jsonl
from salsa.config import Recipe, RLConfig
from salsa.config.expressions import parse_model, text_of
from salsa.errors import DataError
from salsa.stages.directory import policy_label, stage_path


def read_policies(
    recipe: Recipe, run: Path, report: Mapping[str, Any], *, point: str, cluster: str
) -> list[Policy]:
    """Every trained policy of a run with its samples and its learning curve, and the init models that were evaluated.

    An arm's init model is known if it is the model that the report shows as `sft` (the first of `eval.kl_to`). Its KL
    to the arm's own reference is known if that is one of `eval.kl_to`.

    Args:
        recipe: the run's.
        run: its directory.
        report: its report.json.
        point: what messages call it.
        cluster: what would be drawn anew, e.g. its SFT pair.

    Raises:
        DataError: the report names a stage whose samples are not there.
    """
    digests = {stage["stage"]: stage["digest"] for stage in report.get("stages", ())}
    seeds = list(recipe.rl.seeds)

    def directory(label: str) -> Path:
        path = stage_path(run, label, digests.get(label, ""))
        if not (path / "samples.jsonl").exists():
            raise DataError(
                f"{path}: the samples of {label} are not there. Run the sweep again to evaluate them anew."
            )
        return path

    shown = text_of(parse_model(recipe.eval.shown))
    policies = []
    for name, arm in recipe.rl.arms.items():
        config = recipe.rl.config_of(name)
        beta = config.kl_coef if isinstance(config, RLConfig) else config.beta
        if text_of(parse_model(arm.init)) == shown:
            own = _own_kl(recipe, name)
            policies += [
                _policy(
                    report, directory(f"eval sft seed {s}"), point, cluster, name, START, s, own
                )
                for s in seeds
            ]
        for seed in seeds:
            label = policy_label(name, seed)
            curve = stage_path(run, label, digests.get(label, "")) / "metrics.jsonl"
            policies.append(
                _policy(
                    report,
                    directory(f"eval {name} seed {seed}"),
                    point,
                    cluster,
                    name,
                    beta,
                    seed,
                    "kl_reference",
                    read_jsonl(curve) if curve.exists() else (),
                )
            )
    return policies


def _own_kl(recipe: Recipe, arm: str) -> str | None:
    """The column of the samples of `eval.shown` that is its KL to the arm's reference; None if nobody measured it."""
    rule = recipe.rl.arms[arm].rule
    if rule.moves or len(rule.models) != 1:
        return None
    reference = text_of(rule.models[0])
    measured = {text_of(parse_model(text)): f"kl_to_{text}" for text in recipe.eval.kl_to}
    return measured.get(reference)


def _policy(
    report: Mapping[str, Any],
    directory: Path,
    point: str,
    cluster: str,
    arm: str,
    beta: float,
    seed: int,
    own: str | None,
    curve: Sequence[Mapping[str, float]] = (),
) -> Policy:
    """From one directory of samples; `own` is the column that is the KL to the arm's reference."""
    rows = read_jsonl(directory / "samples.jsonl")
    inputs = json.loads((directory / "stage.json").read_text(encoding="utf-8"))["inputs"]
    scores = report["scores"]
    named = {name: name for name in (*scores, *(f"kl_to_{m}" for m in report["kl_to"]))}
    if own is not None and own in rows[0]:
        named["kl_own"] = own
    return Policy(
        point=point,
        cluster=cluster,
        arm=arm,
        beta=beta,
        seed=seed,
        prompts=tuple(row["prompt"] for row in rows),
        columns={to: np.array([float(row[name]) for row in rows]) for to, name in named.items()},
        rewards={score: inputs[f"score {score}"] for score in scores},
        curve=curve,
    )
