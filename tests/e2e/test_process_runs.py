"""The command line with several processes: the recipe's own, and torchrun's."""

import json
import os
import subprocess
import sys

import pytest

from tests.many_processes import apart
from tests.ray_here import nodes_with
from tests.tiny_rl import without_times
from tests.whole_run import salsa, write_inputs

pytestmark = pytest.mark.slow

RECIPE = """
name: tiny
model: {path: model, precision: fp32}
sft: {checkpoints: [model]}
reward: {functions: [{call: "my_gold:score"}]}
rl:
  arms:
    ppo: {init: "sft[0]", reference: "sft[0]"}
    moving: {init: "sft[0]", reference: "ema(sft[0], 0.1)", lora: {rank: 2}}
  prompts: prompts.jsonl
  seeds: [0]
  kl_coef: 0.05
  num_updates: 3
  rollout_size: 8
  learning_rate: 3.0e-3
  max_new_tokens: 8
eval: {prompts: heldout.jsonl, baseline: ppo, kl_to: [base], scores: {gold: {call: "my_gold:score"}}}
"""


ONE_ARM = ['rl.arms={ppo: {init: "sft[0]", reference: "sft[0]"}}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and the run of one process in `runs/one`."""
    folder = tmp_path_factory.mktemp("processes")
    write_inputs(folder)
    (folder / "tiny.yaml").write_text(RECIPE)
    done = salsa(folder, "rl", "tiny.yaml", "-o", "runs/one")
    assert done.returncode == 0, done.stderr
    return folder


def torchrun(folder, *arguments):
    """`torchrun --nproc-per-node 2 -m salsa …`, on a port that is free."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", "-m", "salsa", *arguments,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "400"},
    )  # fmt: skip


def test_the_recipe_starts_two_processes(folder):
    done = salsa(folder, "rl", "tiny.yaml", "-o", "runs/two", "engine.processes=2")
    assert done.returncode == 0, done.stderr
    _same(folder, "two")
    assert done.stderr.count("rl ppo seed 0: done") == 1


def test_torchrun_has_two_processes_and_one_of_them_speaks(folder):
    done = torchrun(folder, "rl", "tiny.yaml", "-o", "runs/torchrun")
    assert done.returncode == 0, done.stderr
    _same(folder, "torchrun")
    assert done.stderr.count("rl ppo seed 0: done") == 1
    again = salsa(folder, "rl", "tiny.yaml", "-o", "runs/torchrun")
    assert "rl ppo seed 0: reused" in again.stderr  # by one process: the number is in no digest


def test_ray_puts_the_processes_of_a_job_on_one_machine(folder):
    with nodes_with(2) as cluster:
        ray = ["engine.executor=ray", f"engine.address={cluster.address}", "engine.memory_gib=0.4"]
        done = salsa(
            folder, "rl", "tiny.yaml", "-o", "runs/ray", "engine.processes=2", *ray, *ONE_ARM
        )
    assert done.returncode == 0, done.stderr
    _same(folder, "ray", "rl-ppo-*")


def test_an_error_under_torchrun_is_said_once(folder):
    done = torchrun(folder, "rl", "tiny.yaml", "rl.kl_coeff=1")
    assert done.returncode != 0
    assert done.stderr.count("unknown key 'rl.kl_coeff'. Did you mean 'kl_coef'?") == 1


def _same(folder, run, which="rl-*"):
    """Names of stages, and what they logged to 1e-5, are those of one process."""
    for stage in (folder / "runs" / "one" / "stages").glob(which):
        other = folder / "runs" / run / "stages" / stage.name
        rows = [
            without_times(
                [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
            )
            for d in (stage, other)
        ]
        assert len(rows[0]) == 3
        for metric, difference in apart(*rows).items():
            assert difference < (0.1 if metric.endswith("clip_fraction") else 1e-5), metric
        assert json.loads((other / "stage.json").read_text())["execution"]["processes"] == 2
        assert (other / "model.safetensors").exists() and not (other / "resume").exists()
