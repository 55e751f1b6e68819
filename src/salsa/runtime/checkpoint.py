"""Resume states: files that are replaced in one step, so that a kill leaves the old one or the new one.

`state-000010.pt` is what a run was after 10 steps. The newest few stay, and the best one where it may be returned to.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from salsa.errors import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, dicts and lists of them) to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many unrelated types
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({reason}). Delete that file to go on from the checkpoint before it."
        ) from error


def state_file(directory: Path, step: int) -> Path:
    """Where the state after `step` lies."""
    return directory / f"state-{step:06d}.pt"


def saved_steps(directory: Path) -> list[int]:
    """Steps whose state is there, ascending."""
    matches = (re.fullmatch(r"state-(\d+)\.pt", path.name) for path in directory.glob("state-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def prune_states(directory: Path, *, keep_last: int, keep: int | None) -> None:
    """Delete all states but the newest `keep_last` and that of step `keep`."""
    for step in saved_steps(directory)[:-keep_last]:
        if step != keep:
            state_file(directory, step).unlink()
