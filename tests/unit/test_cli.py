"""The command line as people meet it: its words, its exit codes, what it leaves alone."""

import os
import signal
import subprocess
import sys
import time

import pytest


def salsa(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "salsa", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def test_help_names_every_command():
    done = salsa("--help")
    assert done.returncode == 0
    for command in ("run", "check", "sft", "soup", "reward", "rl", "eval", "report"):
        assert f"  {command} " in done.stdout


def test_check_prints_the_arithmetic(repository):
    done = salsa("check", repository / "recipes" / "quickstart.yaml")
    assert done.returncode == 0, done.stderr
    assert "quickstart: sound" in done.stdout and "pulled towards soup" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.yaml"], "error: nowhere.yaml: no such recipe."),
        (
            ["run", "{recipe}", "rl.kl_coeff=1"],
            "unknown key 'rl.kl_coeff'. Did you mean 'kl_coef'?",
        ),
        pytest.param(
            ["run", "{recipe}", "sft.dataset=gone.jsonl", "-o", "out"],
            "gone.jsonl: no such file.",
            marks=pytest.mark.slow,
        ),
        (
            ["soup", "a/b", "c/d", "-o", "out"],
            "a/b: neither a directory here nor a model that the hub gives out",
        ),
        (
            ["soup", "x", "y", "-o", "out", "--weights", "half"],
            "--weights 'half': write numbers with commas",
        ),
        (["soup"], "Missing argument"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, repository, tmp_path):
    recipe = repository / "recipes" / "quickstart.yaml"
    done = salsa(*[a.format(recipe=recipe) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (
        not list((tmp_path / "out" / "stages").glob("*")) if (tmp_path / "out").exists() else True
    )


def test_debug_shows_the_traceback(tmp_path):
    done = salsa("check", "nowhere.yaml", "--debug", cwd=tmp_path)
    assert "Traceback" in done.stderr and done.returncode == 1


def test_soup_command(make_checkpoint, tmp_path):
    a, b = make_checkpoint("llama", 0).path, make_checkpoint("llama", 1).path
    done = salsa("soup", a, b, "-o", tmp_path / "soup", "--weights", "0.25,0.75")
    assert done.returncode == 0 and "sha256" in done.stdout
    again = salsa("soup", a, b, "-o", tmp_path / "soup")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(repository, tmp_path):
    command = [
        sys.executable,
        "-m",
        "salsa",
        "run",
        str(repository / "recipes" / "quickstart.yaml"),
        "-o",
        "out",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "400"},
    )
    while not list((tmp_path / "out").glob("stages/sft-0*.partial")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        "stopped; finished work is kept. Go on with: salsa run" in said and "Traceback" not in said
    )
