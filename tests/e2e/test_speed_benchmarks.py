"""The benchmarks of speed run on a tiny model; what they find is in docs/log.md."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_generation_benchmark_prints_its_line(make_checkpoint, tmp_path, repository):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in range(1, 9)))
    done = subprocess.run(
        [
            sys.executable,
            repository / "benchmarks" / "generation.py",
            *("--model", make_checkpoint().path, "--prompts", prompts),
            *("--rows", "3", "--num-prompts", "8", "--new-tokens", "6", "--rounds", "1"),
            *("--precision", "fp32"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert found["greedy_agreement"] == 1.0
    assert found["ratio"] > 0 and found["cpu_ratio"] > 0 and found["mean_length"] <= 6


@pytest.mark.slow
def test_scaling_fits_exponents(repository):
    code = "from scaling import exponent; print(exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository / "benchmarks",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert float(done.stdout) == pytest.approx(2.0)
