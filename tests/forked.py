"""`python -m …` and `python -c …` in a process forked from one that has imported what is slow.

The process is new, with its own directory, environment and output: what is saved are the seconds of the imports.
Tests of what is imported, of signals and of kills start Python itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
"""Processes of this context are forked from one that has imported torch, transformers and TRL."""
FORKS.set_forkserver_preload(
    [
        *("torch", "transformers.models.auto.modeling_auto", "transformers.trainer"),
        *("datasets", "peft", "trl", "scipy.stats"),
    ]
)


def python(
    *arguments: str, cwd: Path, env: Mapping[str, str] = os.environ, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """What `python -m module …` or `python -c code …` returns and prints.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; the process is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKS.Process(target=_become, args=(arguments, cwd, dict(env), files))
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        if late:
            process.kill()
            process.join()
        said = [file.read_text() if file.exists() else "" for file in files]
        if late:
            raise subprocess.TimeoutExpired(arguments, timeout, *said)
        return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _become(
    arguments: tuple[str, ...], cwd: Path, env: dict[str, str], files: tuple[Path, Path]
) -> None:
    """Run in the forked process."""
    for target, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    how, what, *words = arguments
    sys.argv = [what if how == "-m" else how, *words]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
