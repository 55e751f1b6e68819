"""Ways to mix, each against its formula in plain numpy, and transformers' logits against a model averaged by torch."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from salsa import make_soup
from salsa.errors import ConfigError, WorkFailed
from salsa.soup import measure_soup

from . import checkpoints
from .checkpoints import MATRIX, NORM, edit_tensors, read


@pytest.fixture
def base(tmp_path):
    return checkpoints.write(tmp_path / "base", checkpoints.tensors(99))


@pytest.fixture
def three(tmp_path):
    return [
        checkpoints.write(tmp_path / f"model-{seed}", checkpoints.tensors(seed))
        for seed in range(3)
    ]


def doubles(path):
    return {key: value.astype(np.float64) for key, value in read(path).items()}


def arc(start, a, b, t):
    """slerp of the deltas, textbook form."""
    one, other = (a - start).ravel(), (b - start).ravel()
    angle = np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    mixed = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)
    return start + mixed.reshape(start.shape)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_wise_moves_from_the_base_towards_the_soup(three, base, tmp_path, alpha):
    soup = make_soup(three[:2], out=tmp_path / "soup", method="wise", base=base, alpha=alpha)
    start, a, b = (doubles(p) for p in (base, *three[:2]))
    for key, value in read(soup.path).items():
        expected = (1 - alpha) * start[key] + alpha * (a[key] + b[key]) / 2
        np.testing.assert_array_equal(value, expected.astype(np.float32))


def test_slerp_follows_the_arc_between_two_deltas(three, base, tmp_path):
    options = {"method": "slerp", "base": base}
    soup = make_soup(three[:2], weights=[0.7, 0.3], out=tmp_path / "soup", **options)
    start, a, b = (doubles(p) for p in (base, *three[:2]))
    for key, value in read(soup.path).items():
        np.testing.assert_allclose(value, arc(start[key], a[key], b[key], 0.3), rtol=2e-7)


def test_slerp_keeps_the_length_that_a_mean_loses(three, base):
    straight = measure_soup(three[:2], base=base)["diagnostics"]["soup_norm_ratio"]
    curved = measure_soup(three[:2], base=base, method="slerp")["diagnostics"]["soup_norm_ratio"]
    assert straight < 0.9 and curved == pytest.approx(1, abs=0.02)


def test_slerp_of_three_joins_one_after_the_other(three, base, tmp_path):
    soup = make_soup(three, out=tmp_path / "soup", method="slerp", base=base)
    start, a, b, c = (doubles(p) for p in (base, *three))
    for key, value in read(soup.path).items():
        two = arc(start[key], a[key], b[key], 1 / 2)
        np.testing.assert_allclose(value, arc(start[key], two, c[key], 1 / 3), rtol=2e-7)


def test_slerp_where_there_is_no_arc_is_the_mean(three, base, tmp_path):
    for path in three[:2]:
        edit_tensors(path, lambda t: t.update({NORM: read(base)[NORM] + 1}))
    edit_tensors(three[0], lambda t: t.update({MATRIX: read(base)[MATRIX]}))
    soup = read(make_soup(three[:2], out=tmp_path / "soup", method="slerp", base=base).path)
    np.testing.assert_allclose(soup[NORM], read(base)[NORM] + 1, rtol=1e-6)
    middle = (doubles(base)[MATRIX] + doubles(three[1])[MATRIX]) / 2
    np.testing.assert_allclose(soup[MATRIX], middle, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_its_formula(three, base, tmp_path, count):
    soup = make_soup(three[:count], out=tmp_path / "soup", method="model_stock", base=base)
    start, own = doubles(base), [doubles(p) for p in three[:count]]
    for key, value in read(soup.path).items():
        deltas = [(o[key] - start[key]).ravel() for o in own]
        pairs = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for i, a in enumerate(deltas)
            for b in deltas[:i]
        ]
        cosine = np.mean(pairs)
        t = count * cosine / ((count - 1) * cosine + 1)
        assert 0 < t < 1
        expected = (1 - t) * start[key] + t * np.mean([o[key] for o in own], axis=0)
        np.testing.assert_allclose(value, expected, rtol=2e-7, atol=1e-9)


def test_model_stock_of_opposite_deltas_is_the_base(three, base, tmp_path):
    start, a = read(base), read(three[0])
    mirrored = {k: 2 * start[k].astype(np.float64) - a[k] for k in a}
    edit_tensors(three[1], lambda t: t.update({k: v.astype("f4") for k, v in mirrored.items()}))
    soup = make_soup(three[:2], out=tmp_path / "soup", method="model_stock", base=base)
    np.testing.assert_array_equal(read(soup.path)[MATRIX], start[MATRIX])


def test_greedy_keeps_what_does_not_lower_the_score(three, tmp_path):
    goal = {k: (v + read(three[2])[k]) / 2 for k, v in read(three[0]).items()}

    def score(path):
        return -sum(np.abs(v - goal[k]).sum() for k, v in read(path).items())

    soup = make_soup(three, out=tmp_path / "soup", method="greedy", score=score)
    expected = make_soup([three[0], three[2]], out=tmp_path / "expected")
    assert soup.digest == expected.digest
    record = json.loads((soup.path / "soup.json").read_text())
    assert [i["weight"] for i in record["ingredients"]] == [0.5, 0, 0.5]
    assert {s["ingredient"]: s["kept"] for s in record["greedy"]} == {0: True, 1: False, 2: True}
    assert record["greedy"][-1]["alone"] == pytest.approx(score(three[1]))
    assert not (soup.path / "candidate").exists()


def test_greedy_starts_with_the_best_and_keeps_ties(three, tmp_path):
    soup = make_soup(three, out=tmp_path / "soup", method="greedy", score=lambda p: 1.0)
    assert soup.digest == make_soup(three, out=tmp_path / "all").digest
    scores = dict(zip(map(str, three), (1.0, 3.0, 2.0), strict=True))
    best = make_soup(
        three, out=tmp_path / "best", method="greedy", score=lambda p: scores.get(str(p), 0.0)
    )
    assert np.array_equal(read(best.path)[MATRIX], read(three[1])[MATRIX])


@pytest.mark.parametrize(
    ("score", "message"),
    [(lambda p: 1 / 0, "the score of .* failed: division"), (lambda p: float("nan"), "is NaN")],
)
def test_greedy_score_that_fails_leaves_nothing(three, tmp_path, score, message):
    with pytest.raises(WorkFailed, match=message):
        make_soup(three, out=tmp_path / "soup", method="greedy", score=score)
    assert not list(tmp_path.glob("*soup*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wise", "alpha": 0.5}, "wise needs the base. Give it with base= .--base"),
        ({"method": "slerp"}, "slerp needs the base"),
        ({"method": "model_stock"}, "model_stock needs the base"),
        (
            {"method": "wise", "base": "base"},
            "alpha= .--alpha. belongs to the method wise, which needs it",
        ),
        ({"alpha": 0.5}, "alpha= .--alpha. belongs to the method wise"),
        (
            {"method": "wise", "base": "base", "alpha": 1.5},
            "outside 0 to 1. Add extrapolate=True .--extrapolate",
        ),
        ({"method": "greedy"}, "score= .--score. belongs to the method greedy"),
        ({"method": "ties"}, "method='ties'. Use linear, greedy, wise, slerp, model_stock"),
        ({"dtype": "int8"}, "dtype='int8'. Use auto, float64"),
        (
            {"method": "model_stock", "base": "base", "weights": [0.5, 0.5]},
            "model_stock finds the weights itself",
        ),
    ],
)
def test_options_that_do_not_fit(three, base, tmp_path, options, message):
    options = options | ({"base": base} if "base" in options else {})
    with pytest.raises(ConfigError, match=message):
        make_soup(three[:2], out=tmp_path / "soup", **options)


def test_model_stock_of_one_is_refused(three, base, tmp_path):
    """Its formula divides by N - 1."""
    with pytest.raises(ConfigError, match="model_stock takes two ingredients or more. Add one"):
        make_soup(three[:1], out=tmp_path / "soup", method="model_stock", base=base)


def test_what_is_measured_may_be_given_twice_with_force(three):
    with pytest.raises(ValueError, match="the same checkpoint is given twice.* force=True"):
        measure_soup([three[0], three[0]])
    record = measure_soup([three[0], three[0]], force=True)
    assert record["diagnostics"]["cosines"][0][1] == pytest.approx(1)


def test_base_of_another_size_is_refused(three, base, tmp_path):
    edit_tensors(base, lambda t: t.pop(NORM))
    with pytest.raises(ValueError, match=f"base: not the tensors of .*lacks {NORM}"):
        make_soup(three, out=tmp_path / "soup", base=base)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-6), ("bfloat16", 0.15)]
)
def test_transformers_logits_are_those_of_a_float64_average(
    make_checkpoint, tmp_path, family, dtype, tolerance
):
    paths = [make_checkpoint(family, seed).path for seed in range(3)]
    for method in ({}, {"method": "slerp", "base": make_checkpoint(family, 7).path}):
        soup = make_soup(paths, out=tmp_path / f"soup{len(method)}", dtype=dtype, **method)
        ours = AutoModelForCausalLM.from_pretrained(soup.path, dtype=torch.float64)
        oracle = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float64)
        states = [AutoModelForCausalLM.from_pretrained(p).double().state_dict() for p in paths]
        if method:
            start = AutoModelForCausalLM.from_pretrained(method["base"]).double().state_dict()
            mixed = {k: joined(start[k], [s[k] for s in states]) for k in start}
        else:
            mixed = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
        oracle.load_state_dict(mixed)
        ids = torch.arange(40).reshape(2, 20)
        with torch.no_grad():
            torch.testing.assert_close(
                ours(ids).logits, oracle(ids).logits, atol=tolerance, rtol=tolerance
            )


def joined(start, values):
    start, (a, b, c) = start.numpy(), (v.numpy() for v in values)
    if np.array_equal(a, b):  # norms are all ones
        return torch.tensor(a)
    return torch.tensor(arc(start, arc(start, a, b, 1 / 2), c, 1 / 3))


def test_soup_of_reward_models_loads_as_one(make_checkpoint, tmp_path):
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            make_checkpoint("llama", seed).path, num_labels=1
        )
        paths.append(tmp_path / f"reward-{seed}")
        model.save_pretrained(paths[-1])
    soup = make_soup(paths, out=tmp_path / "soup", heads="average")
    model = AutoModelForSequenceClassification.from_pretrained(soup.path)
    heads = [
        AutoModelForSequenceClassification.from_pretrained(p).score.weight.detach() for p in paths
    ]
    torch.testing.assert_close(model.score.weight.detach(), (heads[0] + heads[1]) / 2)
