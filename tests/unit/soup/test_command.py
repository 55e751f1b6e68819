"""`salsa soup` as people type it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from . import checkpoints
from .checkpoints import MATRIX, read


@pytest.fixture
def three(tmp_path):
    return [
        checkpoints.write(tmp_path / f"m{seed}", checkpoints.tensors(seed)) for seed in range(3)
    ]


def soup(*arguments):
    command = [sys.executable, "-m", "salsa", "soup", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_table_and_result(three, tmp_path):
    base = checkpoints.write(tmp_path / "base", checkpoints.tensors(99))
    done = soup(*three, "-o", tmp_path / "soup", "--base", base)
    assert done.returncode == 0 and not done.stderr
    for words in (
        "soup of 3, linear, F32",
        "norm of delta",
        "cos to 2",
        "model.layers.1",
        "sha256",
    ):
        assert words in done.stdout
    assert (tmp_path / "soup" / "model.safetensors").exists()


def test_dry_run_writes_nothing_and_json_is_the_record(three, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = soup(*three[:2], "--dry-run", "--json")
    record = json.loads(done.stdout)
    assert record["diagnostics"]["cosines"][0][1] > 0.9 and sorted(tmp_path.rglob("*")) == before
    made = soup(*three[:2], "-o", tmp_path / "soup", "--json")
    stored = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert json.loads(made.stdout) == stored
    assert record["diagnostics"] == stored["diagnostics"]


def test_interpolate(three, tmp_path):
    options = ["--method", "interpolate", "--points", "0,0.5,1"]
    done = soup(*three[:2], "-o", tmp_path / "line", *options)
    assert done.returncode == 0 and done.stdout.count("sha256") == 3
    middle = read(tmp_path / "line" / "t=0.5")[MATRIX]
    mean = np.mean([read(p)[MATRIX].astype(float) for p in three[:2]], axis=0)
    assert np.array_equal(middle, mean.astype(np.float32))


def test_interpolate_prints_its_records_and_refuses_what_means_nothing(three, tmp_path):
    options = ["--method", "interpolate", "--points", "0,1"]
    made = soup(*three[:2], "-o", tmp_path / "line", *options, "--json")
    stored = [(tmp_path / "line" / name / "soup.json").read_text() for name in ("t=0", "t=1")]
    assert json.loads(made.stdout) == list(map(json.loads, stored))
    done = soup(
        *three[:2],
        "-o",
        tmp_path / "other",
        *options,
        "--alpha",
        "0",
        "--normalize",
        "--score",
        "x",
    )
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    assert "takes two models and --points, not --alpha, --score, --normalize." in done.stderr


def test_greedy_with_a_command(three, tmp_path):
    script = tmp_path / "score.py"
    script.write_text("import sys; print('scoring'); print(-len(sys.argv[1]))")
    options = ["--method", "greedy", "--score", f"{sys.executable} {script} {{}}"]
    done = soup(*three, "-o", tmp_path / "soup", *options)
    assert done.returncode == 0, done.stderr
    assert "greedy: 0 kept, score" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "Missing option --out"),
        (["--weights", "a,b"], 2, "--weights 'a,b': write numbers with commas"),
        (["--weights", "1,1"], 2, "weights sum to 2, not to 1"),
        (["--points", "0,1"], 2, "--points belongs to --method interpolate"),
        (["--method", "slerp"], 2, "slerp needs the base"),
        (["--take-from", "7"], 2, "take_from=7, but ingredients are 0 to 1"),
        (["--method", "greedy", "--score", "false"], 1, "ended with code 1"),
        (["--method", "greedy", "--score", "echo five"], 1, "which is no number"),
        (["--method", "greedy", "--score", "nonesuch"], 1, "the score of"),
    ],
)
def test_errors_are_one_line(three, tmp_path, options, code, message):
    out = ["-o", tmp_path / "soup"] if options else []
    done = soup(*three[:2], *out, *options)
    assert done.returncode == code and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*soup*"))


def test_a_warning_goes_to_stderr(three, tmp_path):
    done = soup(*three[:2], "-o", tmp_path / "soup", "--dtype", "bfloat16")
    assert done.returncode == 0 and "storing bf16 loses" not in done.stdout
    strange = {k: np.random.default_rng(3).normal(size=v.shape) for k, v in read(three[0]).items()}
    other = checkpoints.write(tmp_path / "other", strange)
    done = soup(three[0], other, "-o", tmp_path / "strange")
    assert done.returncode == 0 and "do not look like fine-tunings of one base" in done.stderr
    dry = soup(three[0], other, "--dry-run")
    assert dry.returncode == 0 and dry.stderr == done.stderr
