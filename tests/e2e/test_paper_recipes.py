"""The paper's recipes from SFT to the report with `--scale tiny`, and the judged benchmarks, by the command line."""

import json
import subprocess
import sys

import pytest

from salsa.models import load_policy, load_tokenizer, same_vocabulary
from tests.forked import python
from tests.judge_server import JudgeServer
from tests.unit.test_evaluation import bench, verdict  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
TURN = {
    "llama2-7b": ("llama", "<s>[INST] What is rain? [/INST]"),
    "mistral-7b": ("mistral", "<s>[INST] What is rain? [/INST]"),
    "gemma-2b": ("gemma", "<bos><start_of_turn>user\nWhat is rain?<end_of_turn>\n<start_of_turn>model\n"),
}  # fmt: skip


def salsa(repository, *words):
    done = python("-m", "salsa", *map(str, words), cwd=repository)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("name", TURN)
def test_a_recipe_of_the_paper_runs_to_its_report(repository, name, tmp_path, bench):  # noqa: F811
    out = tmp_path / "run"
    done = salsa(repository, "run", f"recipes/paper/{name}.yaml", "--scale", "tiny", "-o", out)
    assert "rl.num_updates: 200 → 2" in done.stderr
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["sft", "ppo", "salsa", "salsa3"]
    stages = {path.name.rpartition("-")[0]: path for path in (out / "stages").iterdir()}
    assert {"sft-0", "sft-1", "sft-2", "soup", "rl-salsa3-seed-0"} <= stages.keys()
    family, turn = TURN[name]
    policy = stages["rl-salsa-seed-0"]
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    assert model.config.model_type == family
    ask = [{"role": "user", "content": "What is rain?"}]
    assert tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) == turn
    scorer = out / "tiny" / "reward-0" if name == "gemma-2b" else stages["reward"]
    assert same_vocabulary(scorer, policy) == (name != "gemma-2b")
    assert "reused" in salsa(
        repository, "run", f"recipes/paper/{name}.yaml", "--scale", "tiny", "-o", out
    ).stderr  # fmt: skip
    if name == "llama2-7b":
        judge_the_arms(repository, out, bench, tmp_path / "judged")


def judge_the_arms(repository, run, bench, out):  # noqa: F811
    """MT-Bench and Arena-Hard of a finished run, by a judge on localhost."""
    with JudgeServer(verdict, seconds=0.0) as server:
        salsa(
            repository, "eval", run, "-o", out, "--mt-bench", bench / "mt", "--arena-hard", bench / "arena",
            "--judge", server.url, "--judge-model", "m", "--set", "mt_bench.max_new_tokens=8",
            "--set", "arena_hard.max_new_tokens=8",
        )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["benchmarks"].keys() == {"MT-Bench", "Arena-Hard"}


def test_another_scale_is_one_line(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "salsa", "run", "recipes/quickstart.yaml", "--scale", "huge", "-o", tmp_path],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "error: --scale 'huge': there is one other scale" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
