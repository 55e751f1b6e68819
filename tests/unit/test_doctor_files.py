"""What the doctor takes from a run directory: its own stages, its reward model, its models' weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from salsa.config import Recipe
from salsa.doctor import examine, gather, replay
from salsa.doctor.evidence import Data, Pairs
from salsa.doctor.files import RunFiles
from salsa.stages.directory import RunDirectory, Stage

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def stage(run: Path, label: str, digest: str, started: str) -> Stage:
    """A finished stage on disk."""
    folder = run / "stages" / f"{label}-{digest}"
    folder.mkdir(parents=True)
    record = {"stage": label, "digest": digest, "output": digest, "started": started}
    (folder / "stage.json").write_text(json.dumps(record))
    return Stage(label, folder, record, reused=True)


def test_runs_that_share_their_stages_are_judged_by_their_own(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(Recipe.load(QUICKSTART).to_yaml())
    ours = stage(tmp_path, "reward", "a" * 12, "2026-01-01")
    newest = stage(tmp_path, "reward", "b" * 12, "2026-01-02")  # another run's
    assert RunFiles.open(tmp_path).stages["reward"].path == newest.path
    seen = []
    monkeypatch.setattr(gather, "after", lambda files, largest: seen.append(files) or 1 / 0)
    run = RunDirectory(tmp_path)
    run.finished.append(ours)
    assert examine.diagnosed(run) is None
    assert seen[0].stages["reward"].path == ours.path


@pytest.mark.parametrize(("label", "seeds"), [("reward", [0]), ("reward soup", [0, 1])])
def test_an_averaged_reward_model_is_measured_too(label, seeds, tmp_path, monkeypatch):
    recipe = Recipe.load(QUICKSTART, [f"reward.seeds={seeds}", "reward.holdout=0.25"])
    run = SimpleNamespace(recipe=recipe, stages={label: stage(tmp_path, label, "a", "2026")})
    asked = []
    monkeypatch.setattr(
        replay, "scores", lambda path, rows: asked.append((path, len(rows))) or np.zeros(len(rows))
    )
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(10)]
    labelled = Pairs([], [], [], scores=np.array([[2.0, 0.0], [1.0, 1.0]] * 5), noise=1.0)
    found = gather._reward(run, Data(pairs=labelled), pairs)
    assert (found.held_out.shape, found.seen.shape) == (
        (3, 2),
        (7, 2),
    )  # a quarter of ten, rounded up
    assert asked[0] == (run.stages[label].path, 3) and found.known_prompts == 0
    twice = [pair | {"prompt": f"p{i % 5}"} for i, pair in enumerate(pairs)]
    assert gather._reward(run, Data(pairs=labelled), twice).known_prompts > 0
    words = [f"reward.seeds={seeds}", "reward.holdout=0.25", "reward.holdout_prompts=true"]
    run.recipe = Recipe.load(QUICKSTART, words)
    found = gather._reward(run, Data(pairs=labelled), twice)
    assert (len(found.held_out), len(found.seen), found.known_prompts) == (4, 6, 0)
    assert gather._ceiling(labelled, [0, 1]) == pytest.approx((1 / (1 + np.exp(-2)) + 0.5) / 2)
    assert gather._ceiling(labelled, [11]) is None and gather._ceiling(None, [0]) is None


def test_weights_under_other_names_are_not_compared(tmp_path):
    for name, tensors in {
        "a": {"x": torch.zeros(2)}, "b": {"x": torch.ones(2)}, "c": {"transformer.x": torch.ones(2)},
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    differ = lambda one, other: replay.weights_differ(tmp_path / one, tmp_path / other)
    assert (differ("a", "a"), differ("a", "b"), differ("b", "c")) == (False, True, None)
