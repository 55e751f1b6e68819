"""`salsa verify`: what was changed is found, whoever changed it; a signature is what RFC 2104 says."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from salsa.artifacts import Checkpoint
from salsa.errors import ConfigError
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph, Node
from salsa.stages.jobs import Job
from salsa.stages.provenance import KEY_VARIABLE, read_key, signature_of, verify


@dataclass(frozen=True)
class Writes(Job):
    """Copies what its inputs say."""

    needs_engine: ClassVar[bool] = False
    can_be_divided: ClassVar[bool] = False
    text: str
    source: Checkpoint | None = None

    def identity(self) -> dict[str, Any]:
        inputs = {"source": self.source.digest} if self.source else {"data": "d" * 64}
        return {"config": {"text": self.text, "sizes": (1, 2)}, "inputs": inputs}

    def run(self, directory: Path, engine: Any) -> None:
        (directory / "out.json").write_text(json.dumps(self.text))


@pytest.fixture
def made(tmp_path):
    def make(name: str = "run") -> Path:
        run = RunDirectory(tmp_path / name)
        first = Node("first", (), lambda: Writes("first", "a"))
        second = Node("second", (first,), lambda source: Writes("second", "b", source))
        with run.opened("name: x\n"):
            Graph(run).finish([second])
        return run.path

    return make


def stage(run: Path, label: str) -> Path:
    (directory,) = run.glob(f"stages/{label}-*")
    return directory


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_untouched_run_verifies_and_its_chain_is_known(made):
    found = verify(made())
    assert not found.problems and len(found.stages) == 2
    assert found.from_outside == [f"{found.stages[0]}: data dddddddddddd"]
    assert found.digest == verify(made("again")).digest, (
        "a run's digest is of what was made, not when"
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: (s / "out.json").write_text('"c"'), "files changed"),
        (lambda s: (s / "more.json").write_text("1"), "files changed"),
        (
            lambda s: edit(s / "stage.json", config={"text": "z"}),
            "not those that its digest was made of",
        ),
        (
            lambda s: edit(s / "stage.json", inputs={"source": "0" * 64}),
            "not those that its digest was made of",
        ),
        (lambda s: edit(s / "stage.json", output="0" * 64), "files changed"),
        (lambda s: s.rename(s.with_name("second-000000000000")), "does not carry the digest"),
        (lambda s: (s / "stage.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda s: (s / "stage.json").write_text("{}"), "no record of a stage"),
    ],
)
def test_what_was_changed_is_found(made, spoil, said):
    run = made()
    before = verify(run).digest
    spoil(stage(run, "second"))
    (directory,) = run.glob("stages/second-*")
    (problem,) = verify(run).problems
    assert said in problem
    only_the_record_lies = "0" * 64 in (directory / "stage.json").read_text() and "files" in said
    assert only_the_record_lies or verify(run).digest != before


def test_a_stage_that_went_is_noticed_by_those_that_used_it(made):
    run = made()
    shutil.rmtree(stage(run, "first"))
    assert [one.split(": ")[1].split()[0] for one in verify(run).from_outside] == ["source"]


def test_a_report_of_policies_that_nobody_made(made):
    run = made()
    arms = {
        "ppo": {"trained": True, "seeds": [{"policy": "e" * 64}]},
        "sft": {"trained": False, "seeds": [{}]},
    }
    (run / "report.json").write_text(json.dumps({"arms": arms}))
    assert verify(run).problems == [
        "report.json: the policy of ppo (eeeeeeeeeeee) was made by no stage here"
    ]


def test_signatures(made, tmp_path, monkeypatch):
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(b"k" * 32)
    other.write_bytes(b"o" * 32)
    unsigned = made("unsigned")
    monkeypatch.setenv(KEY_VARIABLE, str(key))
    run = made("signed")
    assert verify(run).digest == verify(unsigned).digest, "a signature changes no result"
    assert not verify(run, read_key(key)).problems
    assert all("is not signed with this key" in p for p in verify(run, read_key(other)).problems)
    assert all("is not signed" in p for p in verify(unsigned, read_key(key)).problems)
    edit(
        stage(run, "second") / "stage.json", seconds=12345.0
    )  # no digest covers it; the signature does
    assert not verify(run).problems
    (problem,) = verify(run, read_key(key)).problems
    assert problem.startswith("second-") and "is not signed with this key" in problem


def test_the_signature_is_hmac_sha256():
    """RFC 2104 written out, with a key of one block's half."""
    key, record = b"k" * 32, {"b": 1, "a": [1.5, "ü"], "hmac_sha256": "old"}
    text = json.dumps({"a": [1.5, "ü"], "b": 1, "hmac_sha256": None}).encode()
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in padded) + text).digest()
    expected = hashlib.sha256(bytes(b ^ 0x5C for b in padded) + inner).hexdigest()
    assert signature_of(record, key) == expected


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_key_is_long_enough(tmp_path, content, monkeypatch, made):
    (tmp_path / "key").write_bytes(content)
    for key in ("key", "missing"):
        with pytest.raises(ConfigError, match="are no signing key"):
            read_key(tmp_path / key)


def test_an_empty_directory_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no finished stages"):
        verify(tmp_path)
