"""`salsa eval` of a finished run, through its command line, with a judge on localhost."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.judge_server import JudgeServer
from tests.unit.test_evaluation import PROMPTS, QUESTIONS, REFERENCES, verdict, write

pytestmark = pytest.mark.slow


def test_a_runs_arms_survive_a_kill_and_are_judged_once(finished, inputs, tmp_path):
    """Killed while the judge works; the same command then asks for the rest and writes the report."""
    write(tmp_path / "question.jsonl", QUESTIONS)
    write(tmp_path / "reference_answer" / "gpt-4.jsonl", REFERENCES)
    write(tmp_path / "judge_prompts.jsonl", PROMPTS)
    out = tmp_path / "out"
    with JudgeServer(verdict, seconds=0.05) as server:
        command = [
            sys.executable, "-m", "salsa", "eval", str(finished), "-o", str(out), "--mt-bench", str(tmp_path),
            "--prompts", "heldout.jsonl", "--reward", "gold=my_gold:score", "--judge", server.url, "--judge-model", "m",
            "--set", "mt_bench.max_new_tokens=8", "--set", "prompts.max_new_tokens=8", "--set", "judge.concurrency=4",
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=inputs, stderr=subprocess.DEVNULL)
        cache = out / "judgments.jsonl"
        while not cache.exists() or cache.read_bytes().count(b"\n") < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "report.json").exists()
        done = subprocess.run(command, cwd=inputs, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "samples sft-seed-0: reused" in done.stderr
        assert sum(server.attempts.values()) <= len(cache.read_text().splitlines()) + 4
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["sft", "ppo", "salsa", "salsa3"] and report["num_seeds"] == 2
    assert len(report["benchmarks"]["MT-Bench"]["pairs"]) == len(report["pairs"]) == 6
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert (out / "report.html").stat().st_size > 100_000
