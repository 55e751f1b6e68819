"""What lies in a run directory: the recipe and the stage of every name in it. Torch-free."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salsa.artifacts import Checkpoint, FileHashes
from salsa.config import Recipe
from salsa.config.expressions import Model
from salsa.config.schema import validated
from salsa.errors import ConfigError, SalsaError
from salsa.resolve import Models
from salsa.stages import nodes
from salsa.stages.directory import Stage, stage_slug
from salsa.stages.graph import Node


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read."""

    path: Path
    recipe: Recipe
    stages: dict[str, Stage]
    """Label → finished stage: the one that the report shows, else the newest."""
    models: Models
    hashes: FileHashes

    @classmethod
    def open(cls, path: Path, stages: Mapping[str, Stage] | None = None) -> "RunFiles":
        """Read a run directory.

        Args:
            path: the run directory.
            stages: label → stage, where the run knows which are its own; several runs may share a directory of stages.

        Raises:
            ConfigError: it is none, or its recipe is of another version.
        """
        file = path / "recipe.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{path}: holds no run (no recipe.yaml). Give a run directory, or --before RECIPE for a recipe alone."
            )
        recipe = validated(Recipe, yaml.safe_load(file.read_text(encoding="utf-8")), file)
        hashes = FileHashes(path / "hashes.json")
        base = nodes.base(recipe, hashes)
        sft = [nodes.sft(recipe, base, index, hashes) for index in range(recipe.sft.count)]
        own = dict(stages) if stages is not None else _stages(path)
        return cls(path, recipe, own, Models(recipe, base, sft, hashes), hashes)

    def trained(self, label: str) -> Stage | None:
        """An RL stage; if it has not finished (it is going on, was killed, or failed), as far as it got."""
        if (stage := self.stages.get(label)) is not None:
            return stage
        name = re.compile(re.escape(stage_slug(label)) + r"-[0-9a-f]{12}\.partial")
        begun = [
            folder for folder in self.path.glob("stages/*.partial") if name.fullmatch(folder.name)
        ]
        begun = [folder for folder in begun if (folder / "metrics.jsonl").exists()]
        if not begun:
            return None
        finished = [
            one.record["precision"] for one in self.stages.values() if "precision" in one.record
        ]
        precision = next(iter(finished), "fp32")
        record: dict[str, Any] = {"stage": label, "inputs": {}, "precision": precision}
        return Stage(label, max(begun, key=lambda f: f.stat().st_mtime), record, reused=True)

    def model(self, text: Model | str) -> Checkpoint | None:
        """The checkpoint that a recipe's words name, as it lies on disk; None where it was not made."""
        return self._made(self.models[text])

    def _made(self, node: Node) -> Checkpoint | None:
        if (stage := self.stages.get(node.label)) is not None:
            return stage.checkpoint
        needs = [self._made(need) for need in node.needs]
        if any(need is None for need in needs):
            return None
        try:
            made: Any = node.make(*needs)
        except SalsaError:  # a model that was given and is gone
            return None
        return made if isinstance(made, Checkpoint) else None

    def digest_now(self, checkpoint: Checkpoint) -> str:
        """The digest of a checkpoint's files as they are now."""
        return self.hashes.tree(checkpoint.path)


def _stages(path: Path) -> dict[str, Stage]:
    records = []
    for file in path.glob("stages/*/stage.json"):
        if not file.parent.name.endswith(".partial"):
            records.append((file.parent, json.loads(file.read_text(encoding="utf-8"))))
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        shown = {stage["stage"]: stage["digest"] for stage in report.get("stages", ())}
    except (OSError, ValueError):
        shown = {}
    found: dict[str, Stage] = {}
    for folder, record in sorted(records, key=lambda pair: pair[1]["started"]):
        label = record["stage"]
        if shown.get(label, record["digest"]) == record["digest"]:
            found[label] = Stage(label, folder, record, reused=True)
    return found
