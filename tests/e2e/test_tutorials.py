"""docs/tutorials: every block that is marked `run`, on tiny models, in the order of the page."""

import json
import shutil

import pytest

from tests.doc_blocks import run_blocks

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(make_checkpoint, repository, tmp_path):
    """What a reader has: the recipes, a base, two checkpoints, prompts."""
    shutil.copytree(repository / "recipes", tmp_path / "recipes")
    for name, seed in (("base", 0), ("sft-a", 1), ("sft-b", 2)):
        shutil.copytree(make_checkpoint("llama", seed).path, tmp_path / name)
    for name in ("prompts", "heldout"):
        rows = [{"prompt": f"{name} {i}"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(repository, folder, name):
    page = repository / "docs" / "tutorials" / f"{name}.md"
    return run_blocks(page, folder, python_path=repository / "src")


def test_laptop(repository, folder):
    assert "quickstart: sound" in run(repository, folder, "laptop")[0]


def test_own_checkpoints(repository, folder):
    check, table, forecast, trained = run(repository, folder, "own-checkpoints")
    assert "mine: sound" in check
    assert "norm of delta" in table and not (folder / "soup").exists()
    assert "equal β" in forecast
    assert "rl salsa seed 0: done" in trained and (folder / "runs" / "try" / "report.html").exists()


def test_own_reward(repository, folder):
    _, trained = run(repository, folder, "own-reward")
    assert "brief: sound" in trained
    report = json.loads((folder / "runs" / "try-brief" / "report.json").read_text())
    assert report["scores"] == ["proxy", "gold"]


def test_cluster(repository, folder):
    assert "quickstart: sound" in run(repository, folder, "cluster")[0]


def test_soup_only(repository, folder):
    _, loaded, _ = run(repository, folder, "soup-only")
    assert loaded.split()[-1] == "261"
    assert json.loads((folder / "shrunk" / "soup.json").read_text())["method"] == "wise"


def test_read_report(repository, finished, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished)
    (printed,) = run(repository, tmp_path, "read-report")
    assert "salsa over ppo, proxy: " in printed
