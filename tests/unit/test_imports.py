"""The import rule, read off the syntax tree: doors stay light, the maths pure, the runtime knows no algorithm."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "salsa"
HEAVY = {"torch", "transformers", "trl", "peft", "datasets"}
LIGHT = (
    "salsa", "salsa.cli", "salsa.config", "salsa.artifacts", "salsa.errors", "salsa.soup", "salsa.resolve",
    "salsa.stages.graph", "salsa.stages.jobs", "salsa.stages.nodes", "salsa.stages.elsewhere",
    "salsa.stages.performing", "salsa.stages.placing", "salsa.runtime.executors", "salsa.runtime.store",
    "salsa.planner", "salsa.scale", "salsa.starter", "salsa.run", "salsa.pipeline",
    "salsa.data", "salsa.rewards", "salsa.evaluate.spec", "salsa.evaluate.judge",
    "salsa.evaluate.benchmarks", "salsa.evaluate.winrate", "salsa.evaluate.mtbench", "salsa.evaluate.arena_hard",
    "salsa.analysis.forecast", "salsa.analysis.verdicts", "salsa.analysis.sweep",
    "salsa.analysis.frontier", "salsa.analysis.policies",
    "salsa.report.page", "salsa.integrations", "salsa.doctor.examine", "salsa.doctor.terminal", "salsa.doctor.files",
)  # fmt: skip
ALGORITHM = {
    "rl", "rl_models", "references", "objectives", "sft", "reward", "rewards", "dpo", "preferences", "data", "alarms",
    "pipeline", "planner", "resolve", "cli", "config", "stages", "evaluate", "report", "models", "soup", "demo",
    "scale",
}  # fmt: skip


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in SOURCE.rglob("*.py")}


def imports(name: str, *, inside_functions: bool) -> set[str]:
    """Modules that a module imports; `from salsa import rl` is salsa.rl. Not what only type checkers read."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = (
                package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            )
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                targets.add(whole if whole in MODULES else module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return targets


def reached(name: str) -> set[str]:
    """Everything that importing a module imports of salsa, and by name of others; packages on the way included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in MODULES:
            waiting += imports(one, inside_functions=False)
            if "." in one:
                waiting.append(one.rpartition(".")[0])
    return seen


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("module", LIGHT)
def test_doors_import_nothing_heavy(module):
    assert not {top(name) for name in reached(module)} & HEAVY


@pytest.mark.parametrize(
    "module", ["salsa.cli", "salsa.pipeline", "salsa.soup", "salsa.report.page"]
)
def test_what_python_loads_agrees(module):
    """The rule is read off the source; the interpreter has the last word."""
    code = f"import {module}, sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {top(name) for name in done.stdout.split()} & HEAVY


def test_make_soup_is_exported_without_torch():
    code = "from salsa import make_soup, Recipe; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {top(name) for name in done.stdout.split()} & HEAVY


def test_objectives_import_torch_only():
    assert {top(name) for name in reached("salsa.objectives")} & HEAVY == {"torch"}
    assert not any(
        name.startswith("salsa.") for name in reached("salsa.objectives") - {"salsa.objectives"}
    )


@pytest.mark.parametrize("name", MODULES)
def test_only_the_runtime_imports_what_runs_elsewhere(name):
    outside = {top(target) for target in imports(name, inside_functions=True)}
    assert name.startswith("salsa.runtime") or not outside & {"ray", "submitit", "vllm"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("salsa.runtime")])
def test_the_runtime_imports_no_stage_and_no_algorithm(name):
    ours = {t.split(".")[1] for t in imports(name, inside_functions=True) if t.startswith("salsa.")}
    assert not ours & ALGORITHM


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("salsa.report")])
def test_the_report_imports_no_stage(name):
    targets = imports(name, inside_functions=True)
    assert not {
        t for t in targets if t.startswith("salsa.stages") and t != "salsa.stages.directory"
    }
    assert not {t.split(".")[1] for t in targets if t.startswith("salsa.")} & {
        "rl",
        "sft",
        "reward",
        "dpo",
        "models",
    }


def test_the_doctors_forward_passes_share_no_code_with_training():
    """Else a fault there would be computed the same way twice, and agree."""
    targets = imports("salsa.doctor.replay", inside_functions=True)
    assert not [target for target in targets if target.startswith("salsa")]


def test_the_walk_sees_every_way_to_import(tmp_path, monkeypatch):
    """`from salsa import rl`, relative imports, and imports inside functions."""
    file = SOURCE / "runtime" / "engine.py"
    code = "from salsa import rl\nfrom ..models import language\ndef f():\n    import ray\n"
    monkeypatch.setattr(Path, "read_text", lambda self: code if self == file else "")
    assert imports("salsa.runtime.engine", inside_functions=False) == {
        "salsa.rl",
        "salsa.models.language",
    }
    assert "ray" in imports("salsa.runtime.engine", inside_functions=True)


def test_the_integration_imports_nothing_of_trl():
    """A trainer is handed in, so no name that TRL may move is needed, and torch is loaded with it only."""
    assert not {top(t) for t in imports("salsa.integrations.trl", inside_functions=True)} & {"trl"}
    assert not {top(t) for t in reached("salsa")} & HEAVY
