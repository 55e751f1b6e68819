"""Recipes of 0.1: old keys become new ones, with a line that says which. To go in 0.3."""

import copy
from typing import Any


def upgraded(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe's values under present names, and what was renamed."""
    values, renamed = copy.deepcopy(values), []
    reward, evaluation, engine = (_section(values, name) for name in ("reward", "eval", "engine"))
    if "dataset" in reward:
        values["preferences"] = {"dataset": reward.pop("dataset")}
        renamed.append("reward.dataset is now preferences.dataset")
    if "preferences" in reward:
        values["preferences"] = reward.pop("preferences")
        renamed.append("reward.preferences is now a section of its own, preferences")
    if "anchor" in evaluation:
        evaluation["kl_to"] = [evaluation.pop("anchor")]
        renamed.append(f"eval.anchor is now eval.kl_to: {evaluation['kl_to']}".replace("'", ""))
    if "kind" in engine:
        del engine["kind"]
        renamed.append("engine.kind is gone: engine.jobs says how many stages run at once")
    return values, renamed


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}
