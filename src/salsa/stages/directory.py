"""The run directory. What exists in it is complete; everything else ends in `.partial`.

    runs/<name>/recipe.yaml                     the resolved recipe
    runs/<name>/stages/<stage>-<digest>/        a finished stage: outputs, metrics.jsonl, stage.json
    runs/<name>/stages/<stage>-<digest>.partial an unfinished one; `resume/` inside is its last checkpoint
    runs/<name>/hashes.json                     sha256 of every file that was read or written, by size and time
    runs/<name>/report.html, report.json        and forecast.*, landscape.* where they were asked for

A stage's digest covers what decides its result: settings, input digests and the arithmetic (fp32 or bf16). How it is
computed (micro-batches, threads, checkpoints, concurrency) is recorded beside it and is no part of it.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa.artifacts import (
    Checkpoint,
    FileHashes,
    digest_of,
    finish_directory,
    locked,
    read_jsonl,
    sha256_tree,
    versions,
    write_atomic,
)
from salsa.config.schema import differences
from salsa.errors import ConfigError, accessing
from salsa.runtime.store import Store
from salsa.stages.cards import write_card
from salsa.stages.jobs import Job
from salsa.stages.provenance import signed

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

LAYOUT_VERSION = 2
"""Part of every stage's digest: raise it when the same settings and inputs come to mean another result."""


@dataclass(frozen=True)
class Stage:
    """One finished stage: its directory, what it was made from and how long it took."""

    label: str
    path: Path
    record: dict[str, Any] = field(repr=False)
    """The content of stage.json."""
    reused: bool

    @property
    def digest(self) -> str:
        """The same digest, the same result."""
        return self.record["digest"]

    @property
    def checkpoint(self) -> Checkpoint:
        """What this stage wrote, a model or data."""
        return Checkpoint(self.path, self.record["output"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What the stage logged, a row a step."""
        return read_jsonl(self.path / "metrics.jsonl")


@dataclass(frozen=True)
class Place:
    """Where a job's stage lies, finished or not."""

    label: str
    final: Path
    identity: dict[str, Any]

    @property
    def partial(self) -> Path:
        """The directory while the work lasts."""
        return self.final.with_name(self.final.name + ".partial")

    @property
    def lock(self) -> Path:
        """The file that the process which does the work holds locked."""
        return self.final.with_name(f".{self.final.name}.lock")


class RunDirectory:
    """`runs/<name>`: opened by one process at a time, holding one recipe."""

    def __init__(self, path: Path, *, verify: bool = False, store: Store | None = None) -> None:
        """`verify` hashes every file again, also where size and time are as recorded.

        What is not here is fetched from the `store`, if there is one and it has it.
        """
        self.path, self.store = path, store
        self.finished: list[Stage] = []
        self.hashes = FileHashes(path / "hashes.json", verify=verify)

    @contextmanager
    def opened(
        self,
        recipe_text: str,
        *,
        force: bool = False,
        decisive: Callable[[str], Any] = lambda text: text,
    ) -> Iterator["RunDirectory"]:
        """Claim the directory for `recipe_text`.

        Args:
            recipe_text: the resolved recipe, kept as recipe.yaml.
            force: replace another recipe; its report, forecast and landscape go, its stages stay.
            decisive: what of a recipe's text must be equal for it to count as the same recipe.

        Raises:
            ConfigError: another process holds it, or it belongs to another recipe and `force` is off.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"{self.path}: is a file. Choose another output directory with --out."
            )
        with accessing(self.path, "read"):
            names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if names and not names & {"stages", ".lock", "recipe.yaml"}:
            raise ConfigError(
                f"{self.path}: holds files that are not a run's. Choose another directory with --out."
            )
        with accessing(self.path, "write"):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / ".lock", self.path):
            self._take_recipe(recipe_text, force, decisive)
            try:
                yield self
            finally:
                with suppress(OSError):  # a full disk: nothing but a memory is lost
                    self.hashes.save()

    def precision(self) -> str | None:
        """The arithmetic that the newest finished stage was computed in, if any computed."""
        computed = [record for record in self._records() if "precision" in record]
        newest = max(computed, key=lambda record: record["started"], default={})
        return newest.get("precision")

    def check_precision(self, precision: str) -> None:
        """ConfigError if `precision` is not `auto` and would compute anew what was finished here in another."""
        for record in self._records():
            other = record.get("precision", precision)
            if precision not in ("auto", other):
                raise ConfigError(
                    f"{self.path}: {record['stage']} was computed in {other}, model.precision={precision} would do "
                    "it anew. Give --out another directory, or --force to have both here and replace the report."
                )

    def _records(self, stages: str = "*") -> Iterator[dict[str, Any]]:
        """Of every finished stage that lies here, or of those whose directory's name is like `stages`."""
        for file in sorted(self.path.glob(f"stages/{stages}/stage.json")):
            yield json.loads(file.read_text(encoding="utf-8"))

    def place(self, job: Job, precision: str) -> Place:
        """Where `job` lies if it is computed in `precision`."""
        identity = {"layout": LAYOUT_VERSION, "stage": job.label, **job.identity()}
        if job.needs_engine:
            identity["precision"] = precision
        identity["digest"] = digest_of(identity)
        return Place(job.label, stage_path(self.path, job.label, identity["digest"]), identity)

    def find(self, place: Place) -> Stage | None:
        """The finished stage there, if any; CheckpointError if its files are no longer those that were written."""
        if not (place.final / "stage.json").exists():
            if (place.partial / "stage.json").exists():
                os.replace(place.partial, place.final)  # killed just before the rename
            elif self.store is None or not self.store.fetch(place.final):
                return None
        shutil.rmtree(place.final / "resume", ignore_errors=True)  # killed just after it
        record = json.loads((place.final / "stage.json").read_text(encoding="utf-8"))
        stage = Stage(place.label, place.final, record, reused=True)
        stage.checkpoint.verify(hashed=self.hashes.sha256)
        return stage

    def find_alike(self, place: Place, decides: Callable[[str], bool]) -> Stage | None:
        """A finished stage with the result that `place`'s would have, which logged other things on the way.

        Of several, the one that logged most of what is asked, then the newest. CheckpointError as of `find`.

        Args:
            place: where the stage would lie.
            decides: whether an input of that name decides the result.
        """
        asked = place.identity["inputs"]
        if all(map(decides, asked)):
            return None

        def decisive(identity: dict[str, Any]) -> str:
            inputs = {name: digest for name, digest in identity["inputs"].items() if decides(name)}
            parts = {key: identity.get(key) for key in ("layout", "stage", "config", "precision")}
            return digest_of(parts | {"inputs": inputs})

        wanted, records = decisive(place.identity), self._records(f"{stage_slug(place.label)}-*")
        alike = [record for record in records if decisive(record) == wanted]
        if not alike:
            return None
        best = max(alike, key=lambda r: (len(asked.items() & r["inputs"].items()), r["started"]))
        final = stage_path(self.path, place.label, best["digest"])
        return self.find(Place(place.label, final, best))

    def _take_recipe(self, text: str, force: bool, decisive: Callable[[str], Any]) -> None:
        file = self.path / "recipe.yaml"
        before = file.read_text(encoding="utf-8") if file.exists() else None
        there, now = (None, None) if before in (None, text) else (decisive(before), decisive(text))
        if there != now:
            if not force:
                raise ConfigError(
                    f"{self.path}: made by another recipe ({_what_differs(there, now)}). "
                    "Give --out another directory, or --force to replace the recipe and report there "
                    "(finished stages are kept and reused where they still apply)."
                )
            for name in ("report", "forecast", "landscape"):  # they show the recipe that goes
                for kind in ("html", "json"):
                    (self.path / f"{name}.{kind}").unlink(missing_ok=True)
        with accessing(self.path, "write"):
            (self.path / "stages").mkdir(exist_ok=True)
            if before != text:
                write_atomic(file, text)


@contextmanager
def filling(
    place: Place, job: Job, engine: "Engine | None", execution: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """The stage's unfinished directory; at the end of the block it gets its record and its final name.

    `execution` is recorded of how it is computed, besides what the job says.

    The record is written before the rename and `resume/` goes after it, so that a kill in between repeats nothing.
    """
    partial = place.partial
    with accessing(partial, "write"):
        partial.mkdir(exist_ok=True)
    started, clock = time.time(), time.monotonic()
    yield partial
    record = place.identity | {
        "execution": job.execution()
        | ({"threads": engine.threads} if engine else {})
        | dict(execution or {}),
        "precision_reason": engine.reason if engine else None,
        "output": sha256_tree(partial),
        "versions": versions(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.monotonic() - clock, 2),
    }
    write_card(partial, record)
    record = signed(record)
    write_atomic(partial / "stage.json", json.dumps(record, indent=1, default=str) + "\n")
    finish_directory(partial, place.final)
    shutil.rmtree(place.final / "resume", ignore_errors=True)


def stage_path(run: Path, label: str, digest: str) -> Path:
    """Where the finished stage of that label and digest lies in a run directory."""
    return run / "stages" / f"{stage_slug(label)}-{digest[:12]}"


def stage_slug(label: str) -> str:
    """A stage's label as a file name: letters and digits, the rest are hyphens."""
    return "".join(c if c.isalnum() else "-" for c in label).strip("-")


def policy_label(arm: str, seed: int) -> str:
    """Name of the stage that trains an arm; the report finds its learning curves by it."""
    return f"rl {arm} seed {seed}"


def report_key(run: RunDirectory, shown: Iterable[Any] = ()) -> tuple[str, bool]:
    """Digest of all that a report shows (the recipe, what the stages wrote, what is `shown` besides); is it there?"""
    outputs = sorted((stage.label, stage.digest, stage.record["output"]) for stage in run.finished)
    recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    key = digest_of([recipe, outputs, versions()["salsa-rlhf"], *shown])
    try:
        report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return key, False
    return key, report.get("key") == key and (run.path / "report.html").exists()


def _cpu() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _what_differs(there: Any, now: Any) -> str:
    """The first setting that is not the same, and how many more there are; both read from a recipe's text."""
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return "of another version of salsa"
    first, *others = differences(there, now)
    return first + (f", and {len(others)} more" if others else "")
