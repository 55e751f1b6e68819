"""Resume state: one file, replaced in one step, so that a kill leaves the old one or the new one."""

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, dicts and lists of them) to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote; None if nothing was written yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
