"""A command in a forked process does what Python itself would do with it."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from salsa.runtime.launch import run_in_processes
from tests.forked import python
from tests.many_processes import run_forked
from tests.tiny_rl import FP32


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


def test_it_has_the_threads_of_the_tests(tmp_path: Path):
    """They are counted when torch is imported, before its own environment is there."""
    done = python("-c", "import torch; print(torch.get_num_threads())", cwd=tmp_path)
    assert done.stdout.strip() == os.environ["OMP_NUM_THREADS"]


def _write_parent(place, job, engine):
    (place / "parent").write_text(str(os.getppid()))


@pytest.mark.slow
@pytest.mark.parametrize(("run", "forked"), [(run_forked, True), (run_in_processes, False)])
def test_a_process_of_a_job_is_forked_if_asked_for(run, forked, tmp_path: Path):
    run(_write_parent, tmp_path, None, FP32, processes=1, timeout=60.0)
    assert (int((tmp_path / "parent").read_text()) != os.getpid()) == forked
