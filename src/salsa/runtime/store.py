"""Finished stages at a URL of fsspec, e.g. an object store, for machines that share no path.

    <url>/<stage>/<upload>/…          the files of one upload
    <url>/<stage>/complete.json       names the upload that is whole, and the sha256 of its files; written last

An upload that breaks off leaves no `complete.json`, or the one before: it is never taken for whole.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from salsa.artifacts import finish_directory, sha256_file
from salsa.errors import CheckpointError, ConfigError, WorkFailed

MARKER = "complete.json"


class Store:
    """Directories at a URL, each whole or not there. Plain data: it travels to workers and connects there."""

    def __init__(self, url: str) -> None:
        """The directories under `url`; nothing is asked of it yet."""
        self.url = url.rstrip("/")

    def check(self) -> None:
        """ConfigError if it does not answer, or its package is not installed."""
        files, root = self._connect()
        try:
            files.exists(f"{root}/{MARKER}")
        except Exception as error:  # clients raise many unrelated types
            raise ConfigError(
                f"engine.artifacts={self.url}: does not answer ({_line(error)}). Check the URL and your credentials."
            ) from error

    def has(self, name: str) -> bool:
        """Whether a whole directory of that name is there."""
        return self._marker(*self._connect(), name) is not None

    def upload(self, directory: Path) -> None:
        """Put a finished directory there under its name; files first, then the mark that they are all there.

        Raises:
            WorkFailed: it could not be written; nothing there looks whole that is not.
        """
        store, root = self._connect()
        upload = secrets.token_hex(8)
        names = sorted(
            f.relative_to(directory).as_posix() for f in directory.rglob("*") if f.is_file()
        )
        try:
            for name in names:
                target = f"{root}/{directory.name}/{upload}/{name}"
                store.makedirs(target.rpartition("/")[0], exist_ok=True)
                store.put_file(str(directory / name), target)
            files = {name: sha256_file(directory / name) for name in names}
            marker = json.dumps({"upload": upload, "files": files})
            store.pipe_file(f"{root}/{directory.name}/{MARKER}", marker.encode())
        except Exception as error:
            raise WorkFailed(
                f"{self.url}: {directory.name} could not be uploaded ({_line(error)}). It is kept in {directory}: run "
                "the same command again."
            ) from error

    def fetch(self, directory: Path) -> bool:
        """Copy the directory of that name from there, all or nothing; False if there is no whole one.

        Raises:
            CheckpointError: what is there is not what was uploaded.
        """
        store, root = self._connect()
        if (marker := self._marker(store, root, directory.name)) is None:
            return False
        partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.fetching")
        try:
            for name, expected in marker["files"].items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = f"{root}/{directory.name}/{marker['upload']}/{name}"
                try:
                    store.get_file(source, str(target))
                except FileNotFoundError:
                    target.unlink(missing_ok=True)
                if not target.exists() or sha256_file(target) != expected:
                    raise CheckpointError(
                        f"{self.url}/{directory.name}: {name} is not what was uploaded. Delete {MARKER} there, and the "
                        "stage is computed anew."
                    )
            try:
                finish_directory(partial, directory)
            except OSError:
                if not directory.exists():
                    raise
                # another process has fetched it meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True

    def _connect(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            scheme = self.url.partition("://")[0]
            extra = "pip install 'salsa-rlhf[s3]'" if scheme == "s3" else _line(error)
            raise ConfigError(
                f"engine.artifacts={self.url}: there is no client for {scheme}:// here. {extra}"
            ) from error

    @staticmethod
    def _marker(store: Any, root: str, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(store.cat_file(f"{root}/{name}/{MARKER}"))
        except FileNotFoundError:
            return None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
