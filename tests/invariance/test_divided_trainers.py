"""SFT, reward model and DPO in several processes (TRL's trainers, FSDP2): one result, whatever their number.

21 rows in batches of 8, four a pass: the last pass has one row, which two or three processes cannot share.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salsa.artifacts import Checkpoint, write_jsonl
from salsa.config import DataSource, DPOConfig, LoRAConfig, RewardConfig, SFTConfig
from salsa.errors import WorkFailed
from salsa.stages.jobs import DPOJob, RewardJob, SFTJob
from tests.many_processes import TIMEOUT, fit, run_forked
from tests.tiny_rl import FP32

pytestmark = [
    pytest.mark.slow,
    # as quiet_libraries has it: TRL and peft use names that transformers is leaving behind
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated"),
]

CLOSE = 2e-5
ROWS = 21
COMMON = {
    "epochs": 2,
    "learning_rate": 1e-3,
    "batch_size": 8,
    "max_length": 64,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def jobs(make_checkpoint, tmp_path_factory):
    """Name → job; replies of different lengths, so that rows do not weigh the same."""
    data = tmp_path_factory.mktemp("data")
    sft, pairs = data / "sft.jsonl", data / "pairs.jsonl"
    reply = lambda i: "abcde"[i % 5] * (1 + i % 7)
    write_jsonl(sft, [{"prompt": "ab" * (i % 3 + 1), "completion": reply(i)} for i in range(ROWS)])
    pair = lambda i: {"chosen": reply(i), "rejected": reply(3 * i + 1)}
    write_jsonl(pairs, [{"prompt": "ab" * (i % 3 + 1)} | pair(i) for i in range(ROWS)])
    init, other = (make_checkpoint("llama", seed) for seed in (0, 1))
    config = SFTConfig(dataset=str(sft), microbatch_size=4, **COMMON)
    kept = Checkpoint(data, "0" * 64)
    return {
        "sft": SFTJob("sft[0]", init, config, DataSource(path=str(sft)), 0),
        "reward": RewardJob("reward", init, kept, RewardConfig(holdout=0.05, microbatch_size=2, **COMMON), 3),
        "dpo": DPOJob("rl dpo seed 0", init, other, kept, DPOConfig(microbatch_size=4, **COMMON), 1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def fitted(jobs, tmp_path_factory):
    """`fitted(N)`: the directory of what N processes wrote; made once for each N."""
    made = {}

    def of(processes):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp(f"fitted-{processes}")
            in_processes(processes, made[processes], jobs)
        return made[processes]

    return of


def in_processes(processes, directory, jobs, stop_at=None):
    if processes == 1:
        fit(directory, (jobs, stop_at), FP32)
    else:
        call = fit, directory, (jobs, stop_at), FP32
        run_forked(*call, processes=processes, timeout=TIMEOUT)


def logged(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_agree_with_one(name, processes, fitted):
    alone, together = fitted(1) / name, fitted(processes) / name
    one, several = logged(alone), logged(together)
    assert [row["step"] for row in one] == [row["step"] for row in several] == list(range(1, 7))
    for a, b in zip(one, several, strict=True):
        for metric in ("loss", "grad_norm", "learning_rate"):
            assert b[metric] == pytest.approx(a[metric], rel=CLOSE, abs=1e-7), (metric, a, b)
    whole, gathered = (load_file(d / "model.safetensors") for d in (alone, together))
    assert whole.keys() == gathered.keys()
    for key, weight in whole.items():
        assert torch.allclose(weight, gathered[key], rtol=1e-3, atol=1e-4), key
    assert (alone / "config.json").read_text() == (together / "config.json").read_text()
    if name == "reward":
        assert (alone / "accuracy.txt").read_text() == (together / "accuracy.txt").read_text()


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_microbatches_agree_with_whole_batches(name, jobs, fitted, tmp_path):
    """The last batch of an epoch has passes of 4 and 1 rows (the reward model's of 2 and 1); rows weigh the same."""
    one = replace(jobs[name], config=jobs[name].config.model_copy(update={"microbatch_size": None}))
    fit(tmp_path, ({name: one}, None), FP32)
    for a, b in zip(logged(tmp_path / name), logged(fitted(1) / name), strict=True):
        for metric in ("loss", "grad_norm"):
            assert b[metric] == pytest.approx(a[metric], rel=CLOSE, abs=1e-7), (metric, a, b)


def test_another_number_of_processes_goes_on_and_one_begins_anew(jobs, fitted, tmp_path, capfd):
    with pytest.raises(WorkFailed, match="on purpose"):
        in_processes(2, tmp_path / "left", {"sft": jobs["sft"]}, stop_at=4)
    assert [row["step"] for row in logged(tmp_path / "left" / "sft")] == [1, 2, 3]
    shutil.copytree(tmp_path / "left", tmp_path / "alone")
    straight = logged(fitted(1) / "sft")
    in_processes(3, tmp_path / "left", {"sft": jobs["sft"]})
    rows = logged(tmp_path / "left" / "sft")
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in straight], rel=CLOSE
    )
    assert "anew" not in capfd.readouterr().err
    fit(tmp_path / "alone", ({"sft": jobs["sft"]}, None), FP32)
    assert "was written by several processes; it begins anew" in capfd.readouterr().err
    model = (tmp_path / "alone" / "sft" / "model.safetensors").read_bytes()
    assert model == (fitted(1) / "sft" / "model.safetensors").read_bytes()


def test_adapters_and_packed_rows_are_not_divided(jobs):
    for name in ("sft", "reward"):
        job = jobs[name]
        assert job.can_be_divided
        with_adapters = job.config.model_copy(update={"lora": LoRAConfig(rank=2)})
        assert not replace(job, config=with_adapters).can_be_divided
    packed = jobs["sft"].config.model_copy(update={"packing": True})
    assert not replace(jobs["sft"], config=packed).can_be_divided
