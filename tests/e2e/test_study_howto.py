"""docs/how-to/study.md, run as it stands, on tiny models."""

import json
import re
import shutil

import pytest
import yaml

from salsa.config.sweep import SweepConfig
from tests.whole_run import salsa

pytestmark = pytest.mark.slow
MINE = """
def score(prompts, responses):
    return [float(sum(c.isascii() for c in r)) for r in responses]


def gold(prompts, responses):
    return [float(len(r)) for r in responses]
"""


def blocks(repository) -> list[str]:
    text = (repository / "docs" / "how-to" / "study.md").read_text()
    return re.findall(r"```yaml\n(.*?)```", text, flags=re.S)


def test_two_checkpoints_and_a_function_give_a_frontier(repository, make_checkpoint, tmp_path):
    recipe = blocks(repository)[0]
    for name, seed in (("base", 0), ("sft-a", 1), ("sft-b", 2)):
        shutil.copytree(make_checkpoint("llama", seed).path, tmp_path / name)
    for name in ("prompts", "heldout"):
        rows = [{"prompt": f"{name} {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(recipe)
    done = salsa(tmp_path, "forecast", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert "shrink(sft[0], base, soup)  equal β" in done.stdout
    made = json.loads((tmp_path / "runs" / "mine" / "forecast.json").read_text())
    assert made["num_samples"] == 128
    nowhere_above = [
        c["differences"]["proxy"] for c in made["comparisons"] if c["matched_by"] == "kl_to_sft[0]"
    ]
    assert all(e["low"] <= 0 for e in nowhere_above), "a theorem"


def test_the_sweep_is_sound(repository, tmp_path):
    values = yaml.safe_load(blocks(repository)[1])
    values["recipe"] = str(repository / values["recipe"])
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(values))
    points = SweepConfig.load(tmp_path / "pairs.yaml").points()
    assert list(points) == ["a_kl_coef-0.1", "a_kl_coef-0.3", "b_kl_coef-0.1", "b_kl_coef-0.3"]
    assert points["b_kl_coef-0.3"][1].rl.kl_coef == 0.3
