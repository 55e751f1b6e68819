"""The model card: what a checkpoint was made from, in its directory and in no digest."""

import json
from pathlib import Path

import pytest
import yaml

from salsa.artifacts import sha256_tree
from salsa.stages.cards import write_card
from salsa.stages.directory import Place, filling
from salsa.stages.jobs import Job

RECORD = {
    "stage": "rl salsa seed 0", "digest": "d" * 64, "output": "e" * 64, "precision": "fp32",
    "config": {"kl_coef": 0.1, "seed": 0}, "inputs": {"init": "a" * 64, "reference": "b" * 64},
    "versions": {"salsa-rlhf": "0.1.0", "torch": "2.13.0"}, "started": "2026-11-26T00:00:00Z",
}  # fmt: skip


def model(folder: Path, kind: str = "LlamaForCausalLM") -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": [kind]}))
    return folder


def test_a_card_has_provenance_and_changes_no_digest(tmp_path):
    before = sha256_tree(model(tmp_path))
    write_card(tmp_path, RECORD)
    card = (tmp_path / "README.md").read_text()
    assert sha256_tree(tmp_path) == before
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["salsa-rlhf", "rlhf", "policy"]}
    for wanted in (
        "# rl salsa seed 0",
        "| init | `" + "a" * 64,
        '"kl_coef": 0.1',
        "torch 2.13.0",
        "e" * 64,
    ):
        assert wanted in card
    assert "AutoModelForCausalLM" in card


@pytest.mark.parametrize(
    ("stage", "inputs", "tag"),
    [("reward", {"pairs": "c"}, "reward"), ("reward soup", {"ingredient 0": "c"}, "soup"),
     ("sft[0]", {"base": "c"}, "sft"), ("shrink(sft[0], base, 0.5)", {"ingredient 0": "c"}, "soup")],
)  # fmt: skip
def test_kinds_of_models(stage, inputs, tag, tmp_path):
    write_card(
        model(tmp_path, "LlamaForSequenceClassification"),
        RECORD | {"stage": stage, "inputs": inputs},
    )
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"][2] == tag
    assert "AutoModelForSequenceClassification.from_pretrained" in card


def test_what_no_engine_made_says_how_it_was_made(tmp_path):
    for stage, words in (("base", "fp32: read"), ("soup", "float64 sums, without torch")):
        (folder := tmp_path / stage).mkdir()
        record = {key: value for key, value in RECORD.items() if key != "precision"}
        write_card(model(folder), record | {"stage": stage})
        assert f"| computed in | {words}" in (folder / "README.md").read_text()


def test_what_is_no_model_gets_none_and_a_card_that_is_there_stays(tmp_path):
    write_card(tmp_path, RECORD)
    assert not list(tmp_path.iterdir())
    (model(tmp_path) / "README.md").write_text("mine")
    write_card(tmp_path, RECORD)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_stage_that_wrote_a_model_has_a_card(tmp_path):
    class Made(Job):
        def run(self, directory, engine):
            model(directory)

    job = Made("sft[0]")
    identity = {"stage": "sft[0]", "digest": "d" * 64, "config": {}, "inputs": {}}
    place = Place("sft[0]", tmp_path / "sft-0-dddddddddddd", identity)
    with filling(place, job, None) as directory:
        job.run(directory, None)
    record = json.loads((place.final / "stage.json").read_text())
    assert record["output"] in (place.final / "README.md").read_text()
    assert sha256_tree(place.final) == record["output"]
