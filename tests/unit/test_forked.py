"""A command in a forked process does what Python itself would do with it."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.forked import python


def test_it_has_its_own_directory_environment_output_and_exit_code(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import os, sys; print(os.getcwd(), os.environ, sys.argv)\nsys.exit('bad')"
    )
    done = python("-m", "mine", "a b", cwd=tmp_path, env={"ONLY": "this"})
    assert done.returncode == 1 and done.stderr.strip() == "bad"
    assert str(tmp_path) in done.stdout and "'ONLY': 'this'" in done.stdout
    assert "a b" in done.stdout and "HOME" not in done.stdout


def test_one_that_hangs_is_killed_and_what_it_said_is_kept(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as late:
        code = "import time; print('begun', flush=True); time.sleep(60); open('late', 'w')"
        python("-c", code, cwd=tmp_path, timeout=10)
    assert time.monotonic() - started < 40 and late.value.output.strip() == "begun"
    assert not (tmp_path / "late").exists()
