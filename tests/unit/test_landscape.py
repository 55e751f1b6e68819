"""Places between models: the weights are a soup's, the geometry is right, differences are paired."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from salsa import make_soup
from salsa.analysis.landscape import ROWS, geometry_of, mixed, write_places
from salsa.analysis.places import Geometry, landscape
from salsa.artifacts import Checkpoint
from salsa.config import DataSource, RewardFunction
from salsa.errors import CheckpointError
from salsa.models import LanguageModel
from salsa.rewards import RewardSource
from salsa.runtime.engine import Engine
from salsa.stages.jobs import Asked, LandscapeJob
from tests.tiny_rl import FP32


def parts_of(*checkpoints: Checkpoint) -> list[dict]:
    return [dict(LanguageModel.load(c.path, FP32).weights()) for c in checkpoints]


def test_a_place_has_the_weights_of_the_soup_there(make_checkpoint, tmp_path):
    a, b = make_checkpoint("llama", 0), make_checkpoint("llama", 1)
    for alpha in (0.25, 1.25):
        weights = [1 - alpha, alpha]
        soup = make_soup([a.path, b.path], weights=weights, extrapolate=True, out=tmp_path / f"{alpha}")  # fmt: skip
        own = mixed(parts_of(a, b), weights)
        for name, tensor in load_file(soup.path / "model.safetensors").items():
            assert torch.equal(own[name], tensor), name


def test_the_models_are_where_the_plane_says():
    geometry = Geometry(3, along=0.4, height=0.8)
    assert [p.weights for p in geometry.models()] == [
        pytest.approx((1, 0, 0)), pytest.approx((0, 1, 0)), pytest.approx((0, 0, 1)),
    ]  # fmt: skip
    for place in geometry.places([-0.25, 0.5, 1.25]):
        assert sum(place.weights) == pytest.approx(1)
    assert len(geometry.places([-0.25, 0.5, 1.25])) == 9 + 3
    assert [p.at for p in Geometry(2, 0, 0).places([0, 0.5, 1])] == [(0.0,), (1.0,), (0.5,)]


def test_geometry_is_that_of_the_weights():
    zero = {"w": torch.tensor([1.0, 2.0, 3.0])}
    one = {"w": torch.tensor([3.0, 2.0, 3.0])}  # u = (2, 0, 0)
    two = {"w": torch.tensor([2.0, 5.0, 3.0])}  # (1, 3, 0): along 1/2, across 3/2 lengths of u
    made = geometry_of([zero, one, two], ["a", "b", "c"])
    assert (made.along, made.height) == pytest.approx((0.5, 1.5))
    middle = mixed([zero, one, two], made.place(0.5, 0.75).weights)
    torch.testing.assert_close(middle["w"], torch.tensor([2.0, 3.5, 3.0]))


def test_models_that_span_nothing_are_told():
    zero, one = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    with pytest.raises(CheckpointError, match="a, b, c lie on one line"):
        geometry_of([zero, one, {"w": torch.full((3,), 0.5)}], ["a", "b", "c"])
    with pytest.raises(CheckpointError, match="a and b are equal"):
        geometry_of([zero, zero], ["a", "b"])
    with pytest.raises(CheckpointError, match="b and a differ in their tensors"):
        geometry_of([zero, {"w": torch.ones(4)}], ["a", "b"])


def test_differences_are_paired_by_prompt():
    """Prompts differ by 100, places by 1: only pairing sees it."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.normal(0, 100, 30), 2)
    rows = [
        {"at": [x], "columns": {"proxy": (prompts + x + rng.normal(0, 0.1, 60)).tolist()}, "loss": None}
        for x in (0.0, 1.0, 0.5)
    ]  # fmt: skip
    made = landscape(rows, ["a", "b"], 2)
    assert made["num_prompts"] == 30
    difference = made["places"][2]["minus_first"]["proxy"]
    assert difference["low"] < 0.5 < difference["high"] and difference["low"] > 0.4
    assert made["places"][2]["columns"]["proxy"]["stderr"] > 10
    assert made["replies"]["b"]["proxy"] == rows[1]["columns"]["proxy"]


def test_places_are_measured_and_a_kill_loses_one(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"q {i}"}) + "\n" for i in range(33)))  # fmt: skip
    replies = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "dd"}]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replies))
    a, b = make_checkpoint("llama", 0), make_checkpoint("llama", 1)
    job = LandscapeJob(
        "landscape", (a, b), (0.0, 0.5, 1.0),
        Asked(DataSource(path="p.jsonl"), 64, 5, 1.0, 2, 0, 1),
        {"proxy": RewardSource((RewardFunction(call="tests.rewards:letters"),))},
        {"sft[0]": a, "sft[1]": b}, DataSource(path="v.jsonl"),
    )  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for directory in (straight, killed):
        directory.mkdir()
    write_places(job, straight, FP32)
    rows = [json.loads(line) for line in (straight / "places.jsonl").read_text().splitlines()]
    assert [row["at"] for row in rows] == [[0.0], [1.0], [0.5]]
    count = 33 * 2
    assert count > ROWS  # more than one forward pass
    assert all(len(v) == count for row in rows for v in row["columns"].values())
    assert rows[0]["columns"]["kl_to_sft[0]"] == [0.0] * count
    assert rows[1]["columns"]["kl_to_sft[1]"] == [0.0] * count
    assert min(np.mean(rows[2]["columns"][f"kl_to_sft[{i}]"]) for i in (0, 1)) > 0
    alone = LanguageModel.load(b.path, FP32)
    assert rows[1]["loss"][0] == pytest.approx(loss_of(alone, "a", "b"), rel=1e-4)
    monkeypatch.setattr("salsa.analysis.landscape._Look._loss", fail_at(2))
    with pytest.raises(KeyboardInterrupt):
        write_places(job, killed, FP32)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write_places(job, killed, FP32)
    assert (killed / "places.jsonl").read_text() == (straight / "places.jsonl").read_text()


def test_the_models_are_read_in_full_where_passes_are_in_bf16(make_checkpoint, tmp_path):
    """The difference of two rounded models is mostly rounding: a soup seemed to lie beside the line."""
    a, b = make_checkpoint("llama", 0), make_checkpoint("llama", 1)
    soup = make_soup([a.path, b.path], out=tmp_path / "soup")
    job = LandscapeJob("landscape", (a, b, soup), (0.0, 1.0), None, {}, {}, None)
    with pytest.raises(CheckpointError, match="lie on one line"):
        write_places(job, tmp_path, Engine.create("bf16"))


def fail_at(call: int):
    from salsa.analysis.landscape import _Look

    original, calls = _Look._loss, []

    def loss(self):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(self)

    return loss


def loss_of(model: LanguageModel, prompt: str, reply: str) -> float:
    """By transformers: mean negative log-likelihood of the reply's tokens and EOS."""
    from salsa.data import as_prompt
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    start = list(as_prompt({"prompt": prompt}, tokenizer).ids)
    target = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.backbone(torch.tensor([start + target])).logits[0].log_softmax(-1)
    places = range(len(start) - 1, len(start) + len(target) - 1)
    return -float(np.mean([float(logits[i, t]) for i, t in zip(places, target, strict=True)]))
