"""Runs with and without faults at the quickstart's size, what the doctor says of them, and the table of both.

Every run is a directory below `out`; what a fault leaves as it was is linked from the healthy run with the number 0, so
that a fault of RL costs one RL. A verdict is a file below `out/verdicts`: what is there is not done again.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from salsa.config import Recipe
from salsa.doctor.examine import examine_run
from salsa.doctor.findings import STAGES
from salsa.pipeline import run_recipe
from tests.faults.kinds import FAULTS, ORDER, Fault

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
ARMS = '{ppo: {init: "sft[0]", reference: "sft[0]"}, salsa: {init: "sft[0]", reference: soup}}'
COMMON = (f"rl.arms={ARMS}", "rl.seeds=[0]", "model.precision=fp32")
"""The quickstart with two arms and one RL seed. In fp32, so that one run is like another on any machine."""
SIZES: tuple[tuple[str, ...], ...] = (
    (),
    ("rl.num_updates=8",),
    ("sft.dataset.limit=800",),
    ("rl.rollout_size=64", "rl.num_updates=8"),
    ("rl.kl_coef=0.05",),
    ("preferences.prompts.limit=700",),
    ("rl.rollout_size=16", "rl.num_updates=20"),
    ("rl.kl_coef=0.2",),
    ("rl.num_updates=20",),
    ("rl.temperature=1.0", "preferences.temperature=1.0"),
)
"""What healthy runs differ in besides their seeds, in turn."""


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """The quickstart, smaller by two thirds of its RL runs, with overrides."""
    return Recipe.load(QUICKSTART, [*COMMON, *overrides])


def healthy(number: int) -> tuple[str, ...]:
    """What the healthy run of that number changes: every seed, and a size."""
    if number == 0:
        return ()
    seeds = (
        f"sft.seeds=[{10 * number}, {10 * number + 1}]", f"preferences.seed={number}", f"reward.seeds=[{number}]",
        f"reward.split_seed={number}", f"rl.seeds=[{number}]", f"eval.seed={1000 + number}",
        f"sft.dataset.shuffle_seed={number}", f"preferences.prompts.shuffle_seed={number}",
        f"eval.prompts.shuffle_seed={number}",
    )  # fmt: skip
    return (*seeds, *SIZES[number % len(SIZES)])


def link_unaffected(source: Path, target: Path, begins: str) -> None:
    """Link the finished stages of a healthy run that a fault which begins at `begins` leaves as they are."""
    target.mkdir(parents=True, exist_ok=True)
    kept = ORDER[: ORDER.index(begins)]
    for stage in source.iterdir():
        kind = stage.name.partition("-")[0]
        kind = {
            "soup": "sft",
            "eval": "eval" if not stage.name.startswith("eval-sft-") else "rl",
        }.get(kind, kind)
        whose = "reward" if stage.name.startswith("eval-sft-") and begins == "rl" else kind
        if (
            whose in kept
            and not stage.name.endswith(".partial")
            and not (target / stage.name).exists()
        ):
            os.symlink(stage.resolve(), target / stage.name)


def examine(out: Path, name: str, fault: Fault | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Run and diagnose one recipe, with the fault or without; a run that the product itself stops is told as such."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    file, run = out / "verdicts" / f"{slug}.json", out / "runs" / slug
    if file.exists():
        return json.loads(file.read_text())
    started, stopped = time.time(), None
    if fault is not None:
        link_unaffected(out / "runs" / "healthy-0" / "stages", run / "stages", fault.begins)
    try:
        if fault is None:
            run_recipe(recipe_of(overrides), out=run, until="eval")
        else:
            with fault.planted():
                run_recipe(recipe_of(overrides), out=run, until="eval")
    except Exception as error:
        if fault is None:
            raise
        stopped = f"{type(error).__name__}: {error}"
    found = examine_run(run).as_json() | {
        "kind": name, "stage": fault.stage if fault else None, "stopped": stopped, "seconds": time.time() - started,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def everything(out: Path, only: str, num_healthy: int) -> Iterator[dict[str, Any]]:
    """Verdicts of all kinds that match `only`, and of healthy runs; number 0, from which faults start, always."""
    yield examine(out, "healthy 0", None, ())
    for fault in FAULTS:
        if fnmatch(fault.name, only):
            yield examine(out, fault.name, fault, fault.overrides)
    for number in range(1, num_healthy):
        if fnmatch(f"healthy {number}", only):
            yield examine(out, f"healthy {number}", None, healthy(number))


def table(verdicts: Sequence[dict[str, Any]]) -> str:
    """The confusion table in Markdown: which stage was broken, which one the doctor named."""
    faults = [v for v in verdicts if v["stage"]]
    well = [v for v in verdicts if not v["stage"]]
    right = [v for v in faults if v["verdict"] == "faulty" and v["culprit"] == v["stage"]]
    named = lambda v: v["culprit"] if v["verdict"] == "faulty" else "none"
    columns = [*STAGES, "none"]
    lines = [
        f"{len(right)} of {len(faults)} faults are put where they are; "
        f"{sum(v['verdict'] == 'faulty' for v in well)} of {len(well)} healthy runs are called faulty.",
        "",
        f"| broken | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for stage in [*STAGES, None]:
        own = [v for v in verdicts if v["stage"] == stage]
        if own:
            counts = [sum(named(v) == column for v in own) for column in columns]
            cells = " | ".join(str(count) if count else "" for count in counts)
            lines.append(f"| {stage or 'nothing'} ({len(own)}) | {cells} |")
    lines += ["", "| kind | named | by the gate |", "|---|---|---|"]
    for v in faults:
        first = next(
            (f for f in v["findings"] if f["verdict"] == v["verdict"]), {"gate": "", "says": ""}
        )
        mark = "" if v in right else " **(not its stage)**"
        word = (
            v["culprit"]
            if v["verdict"] == "faulty"
            else f"none faulty (first {v['verdict']}: {v['culprit']})"
        )
        lines.append(f"| {v['kind']} | {word}{mark} | {first['gate']}: {first['says']} |")
    odd: dict[str, int] = {}
    for v in well:
        for f in v["findings"]:
            if f["verdict"] != "sound":
                key = f"{f['stage']}, {f['gate']}: {f['verdict']}"
                odd[key] = odd.get(key, 0) + 1
    if odd:
        lines += ["", f"What is not sound in healthy runs (of {len(well)}):", ""]
        lines += [
            f"- {key}: {count}" for key, count in sorted(odd.items(), key=lambda item: -item[1])
        ]
    return "\n".join(lines) + "\n"
