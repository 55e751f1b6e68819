"""The code blocks of the documentation, and how the test that a page names runs them.

Before every block of code stands a comment: `<!-- run: tests/e2e/… -->` names the test that runs it,
`<!-- not run: why -->` says why none does. Blocks without a language, and `json`, `text` and `console`, show what comes
out and are no code. A block whose first line is `# name.yaml` or `# name.py` is saved under that name; others are run,
in their order.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.forked import python

OUTPUT = ("", "json", "text", "console")
_FENCE = re.compile(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1```", flags=re.M | re.S)
_MARK = re.compile(r"<!-- (run|not run): ((?:(?!-->).)+) -->\s*$", flags=re.S)
_FILE = re.compile(r"# ([\w-]+\.(?:yaml|py))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    mark: str
    """`run`, `not run`, or empty."""
    what: str
    """The test that runs it, or why none does."""

    @property
    def file(self) -> str | None:
        """The name that it is saved under."""
        match = _FILE.match(self.code)
        return match[1] if match else None


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks of code."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        if fence[2] in OUTPUT:
            continue
        before = text[: fence.start()]
        mark = _MARK.search(before)
        yield Block(
            page, before.count("\n") + 1, fence[2], fence[3], *(mark.groups() if mark else ("", ""))
        )


def run_blocks(page: Path, folder: Path, *, python_path: Path) -> list[str]:
    """Save or run every block that is marked `run`, in `folder`; what each that ran has printed."""
    (folder / "bin").mkdir(exist_ok=True)
    command = folder / "bin" / "salsa"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m salsa "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(python_path),
        "COLUMNS": "200",
    }
    run = {
        "sh": lambda code: subprocess.run(
            ["bash", "-euc", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
        ),
        "python": lambda code: python("-c", code, cwd=folder, env=environment),
    }  # fmt: skip
    printed = []
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.file is not None:
            (folder / block.file).write_text(block.code)
            continue
        done = run[block.language](block.code)
        assert done.returncode == 0, f"{page.name}, line {block.line}: {done.stderr}"
        printed.append(done.stderr + done.stdout)
    return printed
