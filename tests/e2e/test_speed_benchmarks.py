"""The benchmarks of speed run on a tiny model; what they find is in docs/log.md."""

import json
import os
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
def test_gpu_check_in_small_on_a_cpu(tmp_path, repository):
    """The parts that need nothing else; without a device it says so in one line."""
    command = [sys.executable, repository / "benchmarks" / "gpu_check.py"]
    options = ["--device", "cpu", "--tiny", "--only", "memory", "lora_7b", "--scratch", tmp_path]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["holds"] and found["tiny"]
    for part in found["parts"].values():
        assert part["kl_at_start"] == 0 and part["peak_gb"] > 0.1
        assert part["stats"]["grad_norm"] > 0 and part["phases"]["seconds_update"] > 0
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=hidden)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu-check: no CUDA device here. Run it on a machine that has one.\n"


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
