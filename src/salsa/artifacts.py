"""Checkpoints, digests and the run directory. What exists on disk is complete; everything else ends in `.partial`.

    runs/<name>/recipe.yaml                     the resolved recipe
    runs/<name>/stages/<stage>-<digest>/        a finished stage: outputs, metrics.jsonl, stage.json
    runs/<name>/stages/<stage>-<digest>.partial an interrupted one; `resume/` inside is its last checkpoint
    runs/<name>/report.html, report.json

A stage's digest covers its configuration and its inputs' digests, so a finished stage is reused exactly when it would
come out the same, and a changed recipe redoes what the change touches and nothing else.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from salsa.errors import CheckpointError, ConfigError, DataError, WorkFailed

LAYOUT_VERSION = 1
"""Part of every stage digest: raise it when the same config and inputs come to mean another result."""

EMBEDDED = "embedded"
"""`model.path: embedded` is the small chat model that comes with the package."""

EMBEDDED_PATH = Path(__file__).parent / "assets" / "base"

_REPORTED_PACKAGES = ("salsa-rlhf", "torch", "transformers", "trl", "datasets", "numpy")
_CONTENT_SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".gguf", ".py"}
_NOT_CONTENT = {"stage.json", "soup.json", "README.md", "metrics.jsonl"}


@dataclass(frozen=True)
class Checkpoint:
    """A model directory in Hugging Face's layout, and the sha256 over its files' names and bytes."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path | str) -> "Checkpoint":
        """Hash the directory at `path`.

        Raises:
            CheckpointError: there is no model directory at `path`.
        """
        path = Path(path)
        if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            raise CheckpointError(
                f"{path}: no model here (no config.json). Give a directory that save_pretrained wrote."
            )
        return cls(path, sha256_tree(path))

    def verify(self) -> None:
        """Raise CheckpointError if the files are no longer those that were hashed."""
        if (found := sha256_tree(self.path)) != self.digest:
            raise CheckpointError(
                f"{self.path}: changed since it was made (digest {found[:12]}, recorded {self.digest[:12]}). "
                "Delete that directory and run the recipe again to rebuild it."
            )


def resolve(path: str, *, revision: str | None = None) -> Path:
    """Directory of a model: the embedded one, a local directory, or a hub snapshot (`org/name` or `org/name@revision`).

    Raises:
        CheckpointError: it is none of them.
    """
    if path == EMBEDDED:
        return EMBEDDED_PATH
    if Path(path).is_dir():
        return Path(path)
    if revision is None and "@" in path:
        path, _, revision = path.partition("@")
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{path}: no such directory. Give a model directory, a hub name (org/name) or 'embedded'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.onnx"]
            )
        )
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: neither a directory here nor a model that the hub gives out ({reason})."
        ) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path, *, known: Mapping[str, str] | None = None) -> str:
    """Hex sha256 over the names and bytes of a directory's models and data; provenance and cards do not count.

    Args:
        path: the directory.
        known: file name → its sha256, of files that need not be read again.
    """
    files = sorted(
        p
        for p in path.iterdir()
        if p.is_file() and p.suffix in _CONTENT_SUFFIXES and p.name not in _NOT_CONTENT
    )
    known = known or {}
    return digest_of({file.name: known.get(file.name) or sha256_file(file) for file in files})


def digest_of(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that after a kill it is either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def parse_jsonl(lines: Iterable[str], where: str) -> list[tuple[int, Any]]:
    """(line number, value) of every line that is not blank.

    Raises:
        DataError: a line is not JSON; the message names it.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise DataError(f"{where}: line {number} is not JSON ({error}).") from error
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, a line each, all or nothing."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, a line each, in one write: a kill leaves all of them or none (a full disk may leave a part)."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        if file.write(lines) != len(lines):
            raise WorkFailed(f"{path}: could not be written to (disk full?). Free some space.")


def drop_half_line(path: Path) -> bool:
    """Cut off a last line without its end, which an interrupted `append_jsonl` left; whether there was one."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return whole < len(content)


def finish_directory(partial: Path, final: Path) -> None:
    """Flush every file of `partial` to disk, then rename it into place."""
    for root, _, names in os.walk(partial):
        for name in names:
            _flush(Path(root, name))
    os.replace(partial, final)
    if os.name == "posix":
        _flush(final.parent)


@contextmanager
def new_directory(final: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to fill, renamed to `final` at the end; nothing stays of it if that end is not reached.

    Args:
        final: where it shall be.
        force: replace a model directory that is there; it is kept until the new one is complete.

    Raises:
        ConfigError: `final` exists, or another process is making it.
    """
    partial, old = (final.with_name(f".{final.name}.{end}") for end in ("partial", "old"))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    try:
        with _locked(partial):
            if old.exists() and not final.exists():  # killed between the two renames below
                os.replace(old, final)
            shutil.rmtree(old, ignore_errors=True)
            _check_free(final, force)
            for stale in partial.iterdir():
                if stale.name != ".lock":
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            yield partial
            if final.exists():
                os.replace(final, old)
            (partial / ".lock").unlink()
            finish_directory(partial, final)
            shutil.rmtree(old, ignore_errors=True)
    except _InUseError:
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(final: Path, force: bool) -> None:
    if not os.path.lexists(final):
        return
    if not force:
        raise ConfigError(f"{final}: exists. Give another directory, or --force to replace it.")
    marks = ("soup.json", "config.json", "adapter_config.json")
    if final.is_symlink() or not any((final / mark).is_file() for mark in marks):
        raise ConfigError(f"{final}: is no model directory, so --force does not replace it.")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Stage:
    """One finished stage of a run: its directory, what it was made from and how long it took."""

    label: str
    path: Path
    record: dict[str, Any] = field(repr=False)
    reused: bool

    @property
    def digest(self) -> str:
        """Digest of the stage's configuration and inputs: the same digest, the same result."""
        return self.record["digest"]

    @property
    def checkpoint(self) -> Checkpoint:
        """What this stage wrote, a model or data."""
        return Checkpoint(self.path, self.record["output"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What the stage logged, a row a step."""
        return read_jsonl(self.path / "metrics.jsonl")


class RunDirectory:
    """`runs/<name>`: opened by one process at a time, holding one recipe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: list[Stage] = []

    @contextmanager
    def opened(self, recipe_text: str, *, force: bool = False) -> Iterator["RunDirectory"]:
        """Claim the directory for `recipe_text`.

        Raises:
            ConfigError: another process holds it, or it belongs to another recipe and `force` is off.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"{self.path}: is a file. Choose another output directory with --out."
            )
        stranger = self.path.exists() and any(self.path.iterdir())
        if stranger and not (self.path / "stages").is_dir() and not (self.path / ".lock").exists():
            raise ConfigError(
                f"{self.path}: holds files that are not a run's. Choose another directory with --out."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            recipe_file = self.path / "recipe.yaml"
            if recipe_file.exists() and recipe_file.read_text() != recipe_text and not force:
                raise ConfigError(
                    f"{self.path}: made by another recipe ({_first_difference(recipe_file, recipe_text)}). "
                    "Give --out another directory, or --force to replace the recipe and report there "
                    "(finished stages are kept and reused where they still apply)."
                )
            (self.path / "stages").mkdir(exist_ok=True)
            if not recipe_file.exists() or recipe_file.read_text() != recipe_text:
                write_atomic(recipe_file, recipe_text)
            yield self

    def stage(
        self,
        label: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[Path], object],
    ) -> Stage:
        """Return the finished stage, doing `work(directory)` first if it has not been done.

        Args:
            label: names the directory and the report's row, e.g. ``sft[0]``.
            config: what decides the result besides the inputs, as JSON values.
            inputs: name → digest of each model and data set that goes in.
            work: fills the directory it is given; what it keeps in ``resume/`` survives a kill and is dropped at
                the end.
        """
        identity = {"layout": LAYOUT_VERSION, "stage": label, "config": config, "inputs": inputs}
        digest = digest_of(identity)
        slug = "".join(c if c.isalnum() else "-" for c in label).strip("-")
        final = self.path / "stages" / f"{slug}-{digest[:12]}"
        if (final / "stage.json").exists():
            stage = Stage(label, final, json.loads((final / "stage.json").read_text()), reused=True)
        else:
            stage = self._do(label, final, identity | {"digest": digest}, work)
        self.finished.append(stage)
        return stage

    def _do(
        self, label: str, final: Path, identity: dict[str, Any], work: Callable[[Path], object]
    ) -> Stage:
        partial = final.with_name(final.name + ".partial")
        partial.mkdir(exist_ok=True)
        started, clock = time.time(), time.monotonic()
        work(partial)
        shutil.rmtree(partial / "resume", ignore_errors=True)
        record = identity | {
            "output": sha256_tree(partial),
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.monotonic() - clock, 2),
        }
        write_atomic(partial / "stage.json", json.dumps(record, indent=1, default=str) + "\n")
        finish_directory(partial, final)
        return Stage(label, final, record, reused=False)


class _InUseError(ConfigError):
    """Another process is at it; what lies there is not ours to remove."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path/.lock`; the kernel lets go of it when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows: no lock, as documented in docs/how-to/run.md
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _InUseError(
                f"{path}: in use by another salsa process. Wait for it, or choose another directory with --out."
            ) from error
        yield


def _first_difference(recipe_file: Path, recipe_text: str) -> str:
    old, new = recipe_file.read_text().splitlines(), recipe_text.splitlines()
    for before, after in zip(old, new, strict=False):
        if before != after:
            return f"there {before.strip()!r}, now {after.strip()!r}"
    return f"there {len(old)} lines, now {len(new)}"
