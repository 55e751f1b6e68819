"""`salsa run` asks for nothing outside: sockets are shut, and no environment variable keeps libraries offline."""

import os
import subprocess
import sys

import pytest

from tests.whole_run import write_inputs

SHUT = '''
"""Loaded by every Python process of the run: each look-up or connection is written down and refused."""
import os, socket, traceback

def _refuse(name):
    def refused(*args, **kwargs):
        with open(os.environ["ASKED"], "a") as file:
            where = "".join(traceback.format_stack(limit=25))
            file.write(f"{name} {args[1:] if name == 'connect' else args}\\n{where}\\n")
        raise OSError("the network is shut")
    return refused

_connect = socket.socket.connect
def connect(self, address):
    if self.family == socket.AF_UNIX:
        return _connect(self, address)
    return _refuse("connect")(self, address)

socket.socket.connect = connect
socket.socket.connect_ex = connect
socket.getaddrinfo = _refuse("getaddrinfo")
socket.gethostbyname = _refuse("gethostbyname")
'''
OFFLINE = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "DO_NOT_TRACK",
    "WANDB_MODE",
    "HF_HUB_DISABLE_TELEMETRY",
)
SHORT = [
    "sft.seeds=[0,1]", "sft.epochs=1", "reward.epochs=1", "rl.seeds=[0]", "rl.num_updates=2",
    'rl.arms={ppo: {init: "sft[0]", reference: "sft[0]"}, salsa: {init: "sft[0]", reference: soup}, '
    "dpo: {method: dpo, init: soup, reference: soup}}",
]  # fmt: skip


@pytest.mark.slow
def test_a_whole_recipe_with_the_network_shut(tmp_path, repository):
    write_inputs(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHUT)
    asked, key = tmp_path / "asked.txt", tmp_path / "key"
    key.write_bytes(b"k" * 32)
    path = os.pathsep.join([str(tmp_path / "site"), str(repository / "src")])
    environment = {k: v for k, v in os.environ.items() if k not in OFFLINE} | {
        "PYTHONPATH": path, "ASKED": str(asked), "HF_HOME": str(tmp_path / "home"), "COLUMNS": "200",
        "SALSA_SIGNING_KEY": str(key),
    }  # fmt: skip

    def python(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )

    tried = python("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert tried.returncode and "getaddrinfo" in asked.read_text(), "the trap works"
    asked.unlink()
    done = python("-m", "salsa", "run", "tiny.yaml", *SHORT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()
    checked = python("-m", "salsa", "verify", "runs/tiny", "--key", str(key))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "outside  sft-0-" in checked.stdout and "WRONG" not in checked.stdout
    (policy,) = (tmp_path / "runs" / "tiny" / "stages").glob("rl-salsa-*")
    (policy / "config.json").write_text("{}")
    spoiled = python("-m", "salsa", "verify", "runs/tiny", "--key", str(key))
    assert spoiled.returncode == 2 and f"WRONG    {policy.name}: files changed" in spoiled.stdout
    assert spoiled.stderr.startswith("error: ") and spoiled.stderr.count("\n") == 1
    assert not asked.exists(), asked.read_text()
