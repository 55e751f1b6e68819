"""`salsa verify`: is a run directory what its records say, and made by someone who holds a key? Torch-free.

A record, `stage.json`, says what went in (settings, inputs' sha256, arithmetic) and what came out (sha256). Its digest
covers the first and names the directory. With a key in `$SALSA_SIGNING_KEY` every record also gets an HMAC-SHA256
(RFC 2104) of itself. SECURITY.md says what that proves and what it does not.
"""

import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa.artifacts import digest_of, sha256_tree
from salsa.errors import ConfigError, SalsaError, accessing
from salsa.untrusted import read_json

KEY_VARIABLE = "SALSA_SIGNING_KEY"
"""Environment variable: path of a file whose bytes are the key; unset, nothing is signed."""

MIN_KEY_BYTES = 32
_SIGNATURE = "hmac_sha256"
_IDENTITY = ("layout", "stage", "config", "inputs", "precision")
"""What a record's digest covers."""


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its signature, if a key is configured; ConfigError for a key that is none."""
    if not (file := os.environ.get(KEY_VARIABLE)):
        return record
    return record | {_SIGNATURE: signature_of(record, read_key(Path(file)))}


def read_key(file: Path) -> bytes:
    """The key's bytes; ConfigError if they are too few or cannot be read."""
    with accessing(file, "read"):
        key = file.read_bytes() if file.is_file() else b""
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"{file}: {len(key)} bytes are no signing key. Make one: head -c 32 /dev/urandom > {file}"
        )
    return key


def signature_of(record: Mapping[str, Any], key: bytes) -> str:
    """Hex HMAC-SHA256 over the record's canonical JSON without its signature."""
    text = json.dumps(
        json.loads(json.dumps(record, default=str)) | {_SIGNATURE: None}, sort_keys=True
    )
    return hmac.digest(key, text.encode(), "sha256").hex()


@dataclass
class Verified:
    """What `verify` found."""

    stages: list[str] = field(default_factory=list)
    """Stages whose record, bytes and signature (if asked for) agree."""
    problems: list[str] = field(default_factory=list)
    """One line each."""
    from_outside: list[str] = field(default_factory=list)
    """`stage: input` of what no stage here made: base models, data, functions."""
    digest: str = ""
    """sha256 over each stage's name, settings, inputs and bytes as they are now: to publish, or to sign with a tool."""

    def lines(self) -> list[str]:
        """What a person reads."""
        return [
            *(f"ok       {stage}" for stage in self.stages),
            *(f"outside  {one}" for one in self.from_outside),
            *(f"WRONG    {problem}" for problem in self.problems),
            f"run      {self.digest}",
        ]


def verify(run: Path, key: bytes | None = None) -> Verified:
    """Recompute every digest of a run directory and follow the chain of inputs; with a key, check the signatures.

    Raises:
        ConfigError: there are no finished stages in `run`.
    """
    files = sorted(run.glob("stages/*/stage.json"))
    if not files:
        raise ConfigError(f"{run}: no finished stages here. Give a run directory, runs/NAME.")
    found = Verified()
    records: dict[Path, dict[str, Any]] = {}
    for file in files:
        try:
            records[file.parent] = read_json(file)
        except SalsaError as error:
            found.problems.append(str(error))
    outputs = {str(record.get("output")) for record in records.values()}
    rows = []
    for directory, record in records.items():
        name = directory.name
        digest = digest_of({name: record[name] for name in _IDENTITY if name in record})
        content = sha256_tree(directory)
        rows.append([name, digest, content])
        if wrong := _wrong_with(directory, record, digest, content, key):
            found.problems.append(f"{name}: {wrong}")
            continue
        found.stages.append(name)
        for what, source in record["inputs"].items():
            if not any(output in str(source) for output in outputs):
                found.from_outside.append(f"{name}: {what} {str(source)[:12]}")
    found.problems += _strangers(run, outputs)
    found.digest = digest_of(rows)
    return found


def _wrong_with(
    directory: Path, record: Mapping[str, Any], digest: str, content: str, key: bytes | None
) -> str | None:
    """Why a stage cannot be believed; None if it can."""
    if not isinstance(record.get("inputs"), dict) or not isinstance(record.get("output"), str):
        return "stage.json is no record of a stage"
    if digest != record.get("digest"):
        return "the settings or inputs in stage.json are not those that its digest was made of"
    if not directory.name.endswith(f"-{digest[:12]}"):
        return "the directory does not carry the digest of its record"
    if content != record["output"]:
        return "files changed since the stage was finished"
    if key is not None:
        if _SIGNATURE not in record:
            return "is not signed"
        if not hmac.compare_digest(str(record[_SIGNATURE]), signature_of(record, key)):
            return "is not signed with this key"
    return None


def _strangers(run: Path, outputs: set[str]) -> list[str]:
    """Policies that report.json speaks of and no stage made."""
    if not (run / "report.json").is_file():
        return []
    arms = read_json(run / "report.json").get("arms", {})
    policies = [
        (arm, str(seed.get("policy")))
        for arm, of in arms.items()
        if of.get("trained")
        for seed in of.get("seeds", [])
    ]
    return [
        f"report.json: the policy of {arm} ({policy[:12]}) was made by no stage here"
        for arm, policy in policies
        if policy not in outputs
    ]
