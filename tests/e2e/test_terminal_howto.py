"""docs/how-to/terminal.md and python.md, run as they stand, on the tiny run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def blocks(repository: Path, name: str, language: str) -> list[str]:
    text = (repository / "docs" / "how-to" / name).read_text()
    text = text.replace("runs/quickstart", "runs/tiny").replace(
        "recipes/quickstart.yaml", "tiny.yaml"
    )
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture
def shell(tmp_path, finished):
    """Run a shell script beside the finished run; `salsa` is this checkout's."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "salsa"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m salsa "$@"\n')
    program.chmod(0o755)

    def run(script: str, stdin: str = "") -> subprocess.CompletedProcess:
        """The `:` keeps bash there while the last command runs: completion asks which shell called it."""
        path = f"{program.parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-c", f"{script}\n:"], cwd=finished.parents[1], input=stdin, text=True,
            capture_output=True, timeout=300,
            env=os.environ | {"PATH": path, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    return run


def test_version_init_check_and_completion(repository, shell, tmp_path):
    script = blocks(repository, "terminal.md", "sh")[0]
    done = shell(
        script.replace("salsa --install-completion", "salsa --install-completion bash"), "\n" * 5
    )
    assert done.returncode == 0, done.stderr
    assert "mine: sound" in done.stdout and "bash completion installed" in done.stdout


def test_init_with_options(repository, shell):
    done = shell(blocks(repository, "terminal.md", "sh")[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(4))
def test_chat(number, repository, shell):
    command = blocks(repository, "terminal.md", "sh")[2].splitlines()[number]
    done = shell(command, "hello\n")
    assert done.returncode == 0, done.stderr
    names = re.findall(r'--arm "?([\w\[\]]+)', command)
    if "--samples 3" in command:
        starts = [f"{name} {sample}: " for name in names for sample in (1, 2, 3)]
        assert all(start in done.stdout for start in starts), done.stdout
    elif not names and "runs/" in command:
        assert "ppo: " in done.stdout and "salsa: " in done.stdout


def test_a_file_of_prompts(repository, shell):
    script = blocks(repository, "terminal.md", "sh")[3]
    done = shell(script)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): ", done.stdout, flags=re.M) == ["ppo", "salsa"] * 2
    assert shell(script).stdout == done.stdout


def test_the_python_page_and_the_tour_of_the_readme(repository, finished):
    tour = blocks(repository, "../../README.md", "python")
    for number, code in enumerate([*blocks(repository, "python.md", "python"), *tour]):
        check = "\nimport sys\nassert 'torch' not in sys.modules\n" if number == 0 else ""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code + check], cwd=finished.parents[1], text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = [] if code not in tour else ["reused", "prompts dropped", "report: ", "precision: "]
        unknown = [line for line in done.stderr.splitlines() if not any(w in line for w in said)]
        assert unknown == [], "no progress bar of a library"


def test_the_tracker_page(repository, shell, finished, tmp_path):
    """A finished run is sent as it stands: nothing is computed anew."""
    import shutil

    before = sorted(p.name for p in (finished / "stages").iterdir())
    here = tmp_path / "inputs"
    shutil.copytree(finished.parents[1], here)
    for command in blocks(repository, "track.md", "sh")[0].splitlines():
        done = shell(f"cd {here} && {command}")
        assert done.returncode == 0, done.stderr
    run = here / "runs" / "tiny"
    assert sorted(p.name for p in (run / "stages").iterdir()) == before
    stages = {p.parent.name for p in run.glob("stages/*/metrics.jsonl")}
    assert {p.name for p in (run / "tensorboard").iterdir()} == stages
    assert {p.stem.removeprefix("run-") for p in run.glob("wandb/offline-run-*/*.wandb")} == stages


def test_the_training_page(repository, shell, finished, tmp_path):
    import yaml

    from salsa.config import Recipe
    from salsa.models import load_policy

    recipe = yaml.safe_load((finished.parents[1] / "tiny.yaml").read_text())
    for section, keys in yaml.safe_load(blocks(repository, "train.md", "yaml")[0]).items():
        recipe[section] |= keys
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(recipe))
    assert Recipe.load(tmp_path / "page.yaml").rl.selection.metric == "gold"
    *checks, sft = blocks(repository, "train.md", "sh")[0].splitlines()
    for command in checks:
        done = shell(command)
        assert done.returncode == 0 and "tiny: sound" in done.stdout, done.stderr
    lora = tmp_path / "lora"
    done = shell(sft.replace("runs/lora", f"{lora} sft.epochs=1"))
    assert done.returncode == 0, done.stderr
    made, *_ = (lora / "stages").glob("sft-0-*")
    assert not list(made.glob("adapter*"))
    load_policy(made)


def test_runs_are_compared_and_cost_something(repository, shell, finished, tmp_path):
    import json
    import shutil

    before = sorted(p.name for p in (finished / "stages").iterdir())
    here = tmp_path / "inputs"
    shutil.copytree(finished.parents[1], here)
    shutil.copytree(here / "runs" / "tiny", here / "runs" / "other")
    for command in blocks(repository, "terminal.md", "sh")[4].splitlines():
        done = shell(f"cd {here} && {command}")
        assert done.returncode == 0, done.stderr
    made = json.loads((here / "comparison.json").read_text())
    assert made["settings"] == []
    assert {row["rate"] for row in made["between_runs"]} == {0.5}
    assert {row["arm"] for row in made["between_runs"]} == {"sft", "ppo", "salsa", "salsa3"}
    page = (here / "runs" / "tiny" / "report.html").read_text()
    assert "at 2.5 an hour" in page and 'id="usage"' in page
    assert sorted(p.name for p in (here / "runs" / "tiny" / "stages").iterdir()) == before
    for stage in (finished / "stages").iterdir():
        assert (stage / "README.md").exists() == (stage / "config.json").exists(), stage
