"""The whole system through its command line: complete, reusable, resumable, honest about failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.whole_run import salsa, write_inputs

pytestmark = pytest.mark.slow
ARMS = ("ppo", "salsa", "salsa3")


def report_of(run: Path) -> dict:
    report = json.loads((run / "report.json").read_text())
    assert report.pop("times")
    return report


def stages(run: Path) -> dict[str, float]:
    return {p.name: p.stat().st_mtime for p in (run / "stages").iterdir()}


def test_report_holds_every_arm_seed_and_pair(finished):
    report = report_of(finished)
    assert set(report["arms"]) == {"sft", *ARMS}
    for arm in report["arms"].values():
        assert [seed["seed"] for seed in arm["seeds"]] == [0, 1]
        for seed in arm["seeds"]:
            assert {
                "proxy",
                "gold",
                "kl_to_sft[0]",
                "kl_reference",
                "length",
                "eos_rate",
            } <= seed.keys()
        for name in ("proxy", "gold", "kl_to_sft[0]"):
            estimate = arm["mean"][name]
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    found = {(p["candidate"], p["baseline"], p["score"]) for p in report["pairs"]}
    assert len(found) == len(report["pairs"]) == 6 * 2
    assert ("salsa", "ppo", "gold") in found and ("ppo", "sft", "proxy") in found
    for pair in report["pairs"]:
        assert pair["wins"] + pair["losses"] + pair["ties"] == pair["n"] == 80
        assert pair["low"] <= pair["rate"] <= pair["high"]


def test_kl_of_the_untrained_model_is_zero_and_of_the_arms_is_not(finished):
    arms = report_of(finished)["arms"]
    assert all(seed["kl_to_sft[0]"] == 0 for seed in arms["sft"]["seeds"])
    assert all(seed["kl_to_sft[0]"] > 0 for arm in ARMS for seed in arms[arm]["seeds"])
    first = {arm: _first_row(finished, arm) for arm in ARMS}
    assert first["ppo"]["kl"] == 0.0
    assert first["salsa"]["kl"] != 0.0 and first["salsa3"]["kl"] != 0.0


def _first_row(run: Path, arm: str) -> dict:
    (folder,) = (run / "stages").glob(f"rl-{arm}-seed-0-*")
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_run_directory_can_be_audited(finished):
    assert (finished / "recipe.yaml").exists()
    assert not list((finished / "stages").glob("*.partial"))
    for folder in (finished / "stages").iterdir():
        record = json.loads((folder / "stage.json").read_text())
        assert {
            "digest",
            "inputs",
            "config",
            "versions",
            "started",
            "seconds",
            "output",
        } <= record.keys()
        assert not (folder / "resume").exists()
    (soup,) = (
        p
        for p in (finished / "stages").iterdir()
        if p.name.startswith("soup-") and "0-1-2" not in p.name
    )
    provenance = json.loads((soup / "soup.json").read_text())
    assert [i["weight"] for i in provenance["ingredients"]] == [0.5, 0.5]


def test_same_command_again_reuses_everything(finished, inputs):
    before, page = stages(finished), (finished / "report.html").read_bytes()
    done = salsa(inputs, "run", "tiny.yaml")
    assert done.returncode == 0
    assert "done in" not in done.stderr
    assert stages(finished) == before
    assert (finished / "report.html").read_bytes() == page


def test_a_finished_run_is_enumerated_without_torch_and_at_once(finished, inputs):
    """No model is loaded to see that nothing is left to do."""
    code = (
        "import sys; sys.argv = ['salsa', 'run', 'tiny.yaml']\n"
        "from salsa.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=inputs, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert time.monotonic() - start < 10  # 1.4 s for the quickstart on an idle machine


def test_execution_settings_may_change_at_any_time(finished, inputs, tmp_path):
    """What says only how it is computed redoes nothing and needs no --force."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    options = ["rl.microbatch_tokens=64", "rl.gradient_checkpointing=true", "rl.checkpoint_every=2"]
    done = salsa(inputs, "run", "tiny.yaml", *options, "engine.threads=1", "-o", str(copy))
    assert done.returncode == 0 and "done in" not in done.stderr, done.stderr
    assert "microbatch_tokens: 64" in (copy / "recipe.yaml").read_text()


def test_two_jobs_at_once_give_the_same_run(finished, inputs, tmp_path):
    done = salsa(inputs, "run", "tiny.yaml", "--jobs", "2", "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    outputs = lambda run: {s["stage"]: s["output"] for s in report_of(run)["stages"]}
    assert outputs(tmp_path / "run") == outputs(finished)


def test_dpo_arms_with_and_without_the_soup(finished, inputs, tmp_path):
    """Through TRL's DPOTrainer on the run's preferences; beside a PPO arm that is reused."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    dpo = "{method: dpo, init: 'sft[0]', learning_rate: 1.0e-2, epochs: 2, checkpoint_every: 5, reference: "
    arms = [
        f"rl.arms.dpo={dpo}'sft[0]'}}",
        f"rl.arms.dpo_soup={dpo}'soup(0.25*sft[0], 0.75*sft[1])'}}",
    ]
    done = salsa(inputs, "run", "tiny.yaml", *arms, "rl.seeds=[0]", "-o", str(copy), "--force")
    assert done.returncode == 0, done.stderr
    assert "rl ppo seed 0: reused" in done.stderr
    report = report_of(copy)
    assert set(report["arms"]) == {"sft", *ARMS, "dpo", "dpo_soup"}
    rows = {}
    for arm in ("dpo", "dpo_soup"):
        (folder,) = (copy / "stages").glob(f"rl-{arm.replace('_', '-')}-seed-0-*")
        rows[arm] = [
            json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert rows[arm][-1]["rewards/margins"] > rows[arm][0]["rewards/margins"]
        assert report["arms"][arm]["mean"]["kl_to_sft[0]"]["mean"] > 0
    assert rows["dpo"][0]["loss"] != rows["dpo_soup"][0]["loss"]


def test_a_changed_beta_redoes_rl_and_nothing_before(finished, inputs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    refused = salsa(inputs, "run", "tiny.yaml", "rl.kl_coef=0.2", "-o", str(copy))
    assert (
        refused.returncode == 2
        and "made by another recipe (rl.kl_coef: 0.05 → 0.2)" in refused.stderr
    )
    done = salsa(
        inputs, "rl", "tiny.yaml", "rl.kl_coef=0.2", "rl.seeds=[0]", "-o", str(copy), "--force"
    )
    assert done.returncode == 0, done.stderr
    reused = [line.split(":")[0] for line in done.stderr.splitlines() if line.endswith(": reused")]
    assert reused == ["sft[0]", "sft[1]", "sft[2]", "preferences", "reward", "soup", "soup[0,1,2]"]
    assert done.stderr.count("rl ") >= 3


def test_a_further_score_and_a_further_arm_train_no_arm_again(finished, inputs, tmp_path):
    """Though training would log both: the score, and the KL to an SFT model that only the new arm has."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    own = ["rl.seeds=[0]", "-o", str(copy), "--force"]
    arms = """rl.arms={ppo: {init: "sft[0]", reference: "sft[0]"}, other: {init: "sft[1]", reference: "sft[1]"}%s}"""
    scores = "eval.scores={gold: {call: my_gold:score}, again: {call: my_gold:score}}"
    done = salsa(inputs, "run", "tiny.yaml", arms % "", scores, *own)
    assert "rl ppo seed 0: reused; trained when score again was not logged" in done.stderr
    assert "rl other seed 0: done in" in done.stderr
    report = json.loads((copy / "report.json").read_text())
    again, gold = (report["arms"]["ppo"]["mean"][score] for score in ("again", "gold"))
    assert again == gold, "evaluation measures what training did not log"
    third = ', salsa3: {init: "sft[0]", reference: "soup[0,1,2]"}'
    done = salsa(inputs, "rl", "tiny.yaml", arms % third, *own)
    assert done.returncode == 0 and not re.search(r"rl .*: done in", done.stderr), done.stderr
    assert "rl other seed 0: reused; trained when kl_to sft[2] was not logged" in done.stderr


def test_kill_9_in_sft_reward_and_rl_changes_nothing(finished, tmp_path):
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    for stage, state in (
        ("sft-1", "checkpoint-*/complete"),
        ("reward", "checkpoint-*/complete"),
        ("rl-salsa-seed-0", "state-*.pt"),
    ):
        _run_until(tmp_path, run / "stages", f"{stage}-*.partial/resume/{state}")
        assert not (run / "report.json").exists()
    done = salsa(tmp_path, "run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "rl salsa seed 0: going on from step" in done.stderr
    assert report_of(run) == report_of(finished)
    assert not list((run / "stages").glob("*.partial"))


def _run_until(folder: Path, where: Path, pattern: str) -> None:
    """Start the recipe and kill it the moment a checkpoint appears."""
    process = subprocess.Popen(
        [sys.executable, "-m", "salsa", "run", "tiny.yaml"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    deadline = time.monotonic() + 300
    while not list(where.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, pattern
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_failing_reward_stops_with_exit_code_1_and_keeps_what_is_done(finished, inputs, tmp_path):
    (inputs / "my_bad.py").write_text(
        "def score(prompts, responses):\n    raise OSError('the server is gone')\n"
    )
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    options = [
        "reward={functions: [{call: 'my_bad:score'}]}",
        "preferences=null",
        "rl.seeds=[5]",
        "-o",
        str(copy),
        "--force",
    ]
    done = salsa(inputs, "run", "tiny.yaml", *options)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: reward my_bad:score: raised OSError: the server is gone. Finished work is kept"
    )
    rl = [p.name for p in (copy / "stages").glob("rl-ppo-seed-5-*")]
    assert len(rl) == 1 and rl[0].endswith(".partial")
    assert {"sft-0", "sft-1"} <= {
        "-".join(p.name.split("-")[:2]) for p in (copy / "stages").iterdir()
    }


def test_finished_checkpoints_can_be_given_instead_of_training(finished, inputs, tmp_path):
    models = sorted(str(p) for p in (finished / "stages").iterdir() if p.name.startswith("sft-"))
    (reward,) = (str(p) for p in (finished / "stages").iterdir() if p.name.startswith("reward-"))
    done = salsa(
        inputs, "run", "tiny.yaml", f"sft={{checkpoints: [{', '.join(models)}]}}", f"reward={{paths: [{reward}]}}",
        "preferences=null",
        "rl.num_updates=2", "rl.seeds=[0]", "-o", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "run")
    assert any("One training seed" in note for note in report["notes"])
    assert not any(
        p.name.startswith(("sft", "reward")) for p in (tmp_path / "run" / "stages").iterdir()
    )
