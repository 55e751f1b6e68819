"""The import rule: the doors stay light, the maths stays pure, the runtime knows no algorithm."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "salsa"
HEAVY = {"torch", "transformers", "trl"}


def modules_after(import_line: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter."""
    code = f"{import_line}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "salsa",
        "salsa.cli",
        "salsa.config",
        "salsa.artifacts",
        "salsa.soup",
        "salsa.runtime.plan",
        "salsa.errors",
        "salsa.evaluate.command",
        "salsa.evaluate.judge",
        "salsa.evaluate.games",
    ],
)
def test_doors_import_nothing_heavy(module):
    assert not modules_after(f"import {module}") & HEAVY


def test_make_soup_is_exported_without_torch():
    assert not modules_after("from salsa import make_soup, Recipe") & HEAVY


def test_objectives_import_torch_only():
    loaded = modules_after("import salsa.objectives")
    assert "torch" in loaded and not loaded & {"transformers", "trl", "datasets", "salsa.types"}


def test_only_the_runtime_imports_ray_or_vllm_and_it_imports_no_stage():
    stages = {f.stem for f in SOURCE.glob("*.py")} - {
        "artifacts",
        "config",
        "errors",
        "types",
        "__init__",
        "__main__",
    }
    for file in SOURCE.rglob("*.py"):
        names = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), flags=re.M))
        inside = file.parent.name == "runtime"
        assert inside or not any(n.split(".")[0] in {"ray", "vllm"} for n in names), file
        if inside:
            assert (
                not {
                    n.removeprefix("salsa.").split(".")[0] for n in names if n.startswith("salsa.")
                }
                & stages
            ), file
