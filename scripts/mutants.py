"""Do the fast tests notice when a line is broken? A sample of mutants of the modules that decide results.

    python scripts/mutants.py [--count 40] [--seed 0] [--only 'objectives*'] [--out runs/mutants.json]

`make mutants` installs cosmic-ray, which makes the mutants, and runs this. Each mutant is one change of one module in a
copy of the package, judged by the fast tests of the files in MODULES: `killed` if one fails or takes three times as
long as without the change. All mutants would take days: `--count` of each module are drawn, type hints and the `strict`
of zip left out. What is in the file is not done again. Prints a table and the diffs that survived.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.forked import python  # noqa: E402

SOUP = [
    f"soup/test_{name}"
    for name in ("requirements", "methods", "lora", "hard", "streaming", "fuzz", "command")
]
MODULES = {
    "objectives": ["test_objectives", "test_rl_steps", "test_algorithms"],
    "rl": ["test_rl", "test_rl_steps", "test_algorithms", "test_checkpoints", "test_vllm"],
    "references": ["test_references", "test_rl_steps"],
    "evaluate/winrate": ["test_winrate", "test_coverage"],
    "evaluate/significance": ["test_significance"],
    "evaluate/bias": ["test_significance"],
    "soup/average": SOUP,
    "soup/blend": SOUP,
    "soup/diagnostics": SOUP,
    "soup/methods": SOUP,
    "soup/rounding": SOUP,
    "soup/lora": SOUP,
    "analysis/forecast": ["test_forecast"],
    "analysis/frontier": ["test_frontier", "test_sweep"],
    "analysis/gap": ["test_gap"],
    "analysis/landscape": ["test_landscape"],
    "analysis/verdicts": ["test_verdicts", "test_planted_worlds"],
}
"""Module → its test files below tests/unit, those first that fail soonest."""
SLOWER = 3.0
"""Times the unchanged tests' seconds after which a mutant counts as killed."""


def mutants(module: Path, count: int, seed: int) -> list[Any]:
    """A sample of what cosmic-ray would change in a module."""
    lines = module.read_text(encoding="utf-8").splitlines()
    every = [
        item.mutations[0]
        for item in _all_work_items([module], {})
        if "BinaryOperator_BitOr" not in item.mutations[0].operator_name  # `int | None`
        and not lines[item.mutations[0].start_pos[0] - 1][
            item.mutations[0].start_pos[1] - 7 :
        ].startswith("strict=")
        and item.mutations[0].definition_name is not None
    ]
    return random.Random(seed).sample(every, min(count, len(every)))


def tested(source: Path, names: list[str], timeout: float) -> tuple[bool, float]:
    """Whether the fast tests pass with the package in `source`, and their seconds; too long is no pass."""
    files = [f"tests/unit/{name}.py" for name in names]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow"]
    imported_before = "ignore::pytest.PytestAssertRewriteWarning"
    options += ["-W", imported_before]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    try:
        done = python("-m", "pytest", *options, *files, cwd=ROOT, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, time.monotonic() - started
    return done.returncode == 0, time.monotonic() - started


def judged(
    source: Path, name: str, known: dict[str, Any], count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The verdict of each mutant of a module."""
    file = source / "salsa" / f"{name}.py"
    original = file.read_text(encoding="utf-8")
    seconds = None
    for one in mutants(file, count, seed):
        key = f"{name}:{one.operator_name}:{one.occurrence}"
        if key not in known:
            if seconds is None:
                passes, seconds = tested(source, MODULES[name], 600.0)
                if not passes:
                    sys.exit(f"{name}: its tests fail without a change")
            changed = mutate_code(original, get_operator(one.operator_name)(), one.occurrence)
            if changed is None or changed == original:
                continue
            file.write_text(changed, encoding="utf-8")
            try:
                survived, _ = tested(source, MODULES[name], SLOWER * seconds)
            finally:
                file.write_text(original, encoding="utf-8")
            line = one.start_pos[0]
            known[key] = {
                "module": name, "line": line, "operator": one.operator_name, "survived": survived,
                "before": original.splitlines()[line - 1].strip(), "after": changed.splitlines()[line - 1].strip(),
            }  # fmt: skip
        yield known[key]


def main() -> None:
    """Judge what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="pattern of modules")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.json"))
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = shutil.copytree(ROOT / "src", Path(folder) / "src")
        for name in filter(lambda name: fnmatch(name, args.only), MODULES):
            for _ in judged(source, name, known, args.count, args.seed):
                args.out.write_text(json.dumps(known, indent=1) + "\n")
            print(row(name, known), flush=True)
    print(row("all", known))
    for one in known.values():
        if one["survived"]:
            print(
                f"\n{one['module']}.py:{one['line']} {one['operator']}\n- {one['before']}\n+ {one['after']}"
            )


def row(name: str, known: dict[str, Any]) -> str:
    """A module's mutants and how many were killed."""
    own = [one for one in known.values() if name in ("all", one["module"])]
    killed = sum(not one["survived"] for one in own)
    return f"{name}: {killed} of {len(own)} killed ({killed / max(1, len(own)):.0%})"


if __name__ == "__main__":
    main()
