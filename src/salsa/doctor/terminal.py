"""`salsa doctor` at the terminal: plain text or JSON. Torch-free until there is something to look at."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import typer

from salsa.doctor.findings import STAGES, Diagnosis, worst
from salsa.errors import ConfigError

FAULTY_EXIT = 3
"""Exit code where a stage is faulty."""
WIDTH = 100


def run_doctor(what: Path, overrides: Sequence[str], *, before: bool, as_json: bool) -> int:
    """Look at a run directory, or `before` at a recipe's inputs; print what was found, and return the exit code.

    Raises:
        ConfigError: `what` is no run directory, or no recipe.
    """
    from salsa.config import Recipe
    from salsa.doctor.examine import examine_recipe, examine_run

    if overrides and not before:
        raise ConfigError(f"{overrides[0]}: a run is as it is. Overrides go with --before RECIPE.")
    if what.is_file() and not before:
        raise ConfigError(
            f"{what}: is a file. Give a run directory, or --before {what} for a recipe alone."
        )
    recipe = Recipe.load(what, overrides) if before else None
    found = examine_recipe(recipe) if recipe is not None else examine_run(what)
    text = (
        json.dumps(found.as_json(), indent=1, ensure_ascii=False)
        if as_json
        else "\n".join(lines(found))
    )
    typer.echo(text)
    return FAULTY_EXIT if found.verdict == "faulty" else 0


def lines(found: Diagnosis) -> list[str]:
    """A diagnosis as plain text: a line a stage, then what is not sound, then what could not be looked at."""
    out = [found.headline, ""]
    for stage in STAGES:
        own = [finding for finding in found.findings if finding.stage == stage]
        if own:
            verdict = worst(finding.verdict for finding in own)
            gates = ", ".join(f.gate for f in own if f.verdict == verdict or verdict == "sound")
            out.append(
                f"{stage:<13} {verdict:<11} {textwrap.shorten(gates, WIDTH - 26, placeholder=' …')}"
            )
    rows = [row for row in found.as_json()["findings"] if row["verdict"] != "sound"]
    for row in rows:
        tail = " (follows from a stage before it, perhaps)" if row["consequence"] else ""
        out += ["", f"{row['verdict']}: {row['stage']}, {row['gate']}{tail}"]
        out += textwrap.wrap(row["says"], WIDTH, initial_indent="  ", subsequent_indent="  ")
        out += textwrap.wrap(
            f"→ {row['todo']}", WIDTH, initial_indent="  ", subsequent_indent="    "
        )
        out += [f"    · {textwrap.shorten(sample, WIDTH - 6)}" for sample in row["samples"]]
    if found.not_measured:
        out += ["", "Not looked at: " + "; ".join(found.not_measured) + "."]
    return out
