"""Checkpoints, digests and files that are whole or absent. Torch-free."""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from salsa.errors import CheckpointError, ConfigError, DataError, InUse, WorkFailed, accessing

EMBEDDED = "embedded"
"""`model.path: embedded` is the small chat model that comes with the package."""

EMBEDDED_PATH = Path(__file__).parent / "assets" / "base"

_REPORTED_PACKAGES = ("salsa-rlhf", "torch", "transformers", "trl", "datasets", "numpy")
_CONTENT_SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".gguf", ".py"}
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.onnx"]
_NOT_CONTENT = {"stage.json", "soup.json", "README.md", "metrics.jsonl"}


@dataclass(frozen=True)
class Checkpoint:
    """A model directory in Hugging Face's layout, and the sha256 over its files' names and bytes."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path | str, hashes: "FileHashes | None" = None) -> "Checkpoint":
        """Hash the directory at `path`; files that `hashes` remembers unchanged are not read again.

        Raises:
            CheckpointError: there is no model directory at `path`, or it cannot be read.
        """
        path = Path(path)
        with accessing(path, "read", CheckpointError):
            if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
                raise CheckpointError(
                    f"{path}: no model here (no config.json). Give a directory that save_pretrained wrote."
                )
            return cls(path, hashes.tree(path) if hashes else sha256_tree(path))

    def verify(self, **how: Any) -> None:
        """Raise CheckpointError if the files are no longer those that were hashed; options as of `sha256_tree`."""
        if (digest := sha256_tree(self.path, **how)) != self.digest:
            raise CheckpointError(
                f"{self.path}: changed since it was made (digest {digest[:12]}, recorded {self.digest[:12]}). "
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
        return Path(snapshot_download(path, revision=revision, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: neither a directory here nor a model that the hub gives out ({reason})."
        ) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(
    path: Path,
    *,
    known: Mapping[str, str] | None = None,
    hashed: Callable[[Path], str] = sha256_file,
) -> str:
    """Hex sha256 over the names and bytes of a directory's models and data; provenance and cards do not count.

    What is `known` (file name → sha256) is not read again; `hashed` reads the others.
    """
    files = (p for p in path.iterdir() if p.suffix in _CONTENT_SUFFIXES and p.is_file())
    content = sorted(file for file in files if file.name not in _NOT_CONTENT)
    known = known or {}
    return digest_of({file.name: known.get(file.name) or hashed(file) for file in content})


class FileHashes:
    """The sha256 of files, remembered by path, size and time of change, so that what is unchanged is not read again."""

    def __init__(self, file: Path | None = None, *, verify: bool = False) -> None:
        """Remember in `file`; with `verify`, read every file once all the same."""
        self._file = file
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if file is not None and file.exists() and not verify:
            with suppress(ValueError, TypeError, OSError):  # a damaged memory is none
                self._known = dict(json.loads(file.read_text(encoding="utf-8")))

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file's bytes."""
        key, stat = str(path.absolute()), path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        if self._known.get(key, [])[:2] != seen:
            self._known[key], self._changed = [*seen, sha256_file(path)], True
        return self._known[key][2]

    def tree(self, directory: Path) -> str:
        """As `sha256_tree`."""
        return sha256_tree(directory, hashed=self.sha256)

    def save(self) -> None:
        """Write what was seen."""
        if self._file is not None and self._changed:
            write_atomic(self._file, json.dumps(self._known, indent=0) + "\n")


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


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have: None in their place, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(record: Mapping[str, Any]) -> str:
    """The text of a JSON file that people read too; what is not finite is null."""
    return json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file; none if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line]


def parse_jsonl(lines: Iterable[str], where: str) -> list[tuple[int, Any]]:
    """(line number, value) of every line that is not blank; DataError names one that is not JSON."""
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
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


def finish_directory(partial: Path, final: Path, aside: Path | None = None) -> None:
    """Flush every file of `partial` to disk, then rename it into place; what is there goes `aside` before."""
    for file in partial.rglob("*"):
        if file.is_file():
            _flush(file)
    if aside is not None and final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    if os.name == "posix":
        _flush(final.parent)


@contextmanager
def new_directory(final: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to fill, renamed to `final` at the end; nothing stays of it if that end is not reached.

    `force` replaces a model directory that is there; it is kept until the new one is complete.

    Raises:
        ConfigError: `final` exists, or another process is making it.
    """
    partial, old, lock = (final.with_name(f".{final.name}.{e}") for e in ("partial", "old", "lock"))
    with accessing(final, "write"):
        final.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, final):  # it lies beside, so that it is held until the rename is done
        if old.exists() and not final.exists():  # killed between the two renames below
            os.replace(old, final)
        shutil.rmtree(old, ignore_errors=True)
        _check_free(final, force)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with accessing(final, "write"):
                partial.mkdir()
                yield partial
                finish_directory(partial, final, aside=old)
        finally:
            if old.exists() and not final.exists():  # interrupted between its two renames
                os.replace(old, final)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


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
    numbers = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


@contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """Hold the lock `file` of `what`, and remove it at the end; the kernel lets go of it when the process dies.

    Raises:
        InUse: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows: no lock, as documented in docs/how-to/run.md
        yield
        return
    while True:
        with accessing(what, "write"):
            stream = file.open("w")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InUse(
                    f"{what}: in use by another salsa process. Wait for it, or choose another directory with --out."
                ) from error
            if not _is_still(file, stream.fileno()):
                continue  # its holder removed it after we opened it: this lock guards nothing
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
