"""The soup engine against numpy in float64, and what it must refuse."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from salsa import make_soup
from salsa.errors import CheckpointError, ConfigError


def weights_of(path):
    return load_file(path / "model.safetensors")


def bits(array):
    return array.view(f"u{array.itemsize}")


@pytest.fixture
def three(make_checkpoint):
    return [make_checkpoint("llama", seed).path for seed in range(3)]


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_average_is_the_float64_mean_rounded_once(three, tmp_path, weights):
    soup = make_soup(three, weights=weights, out=tmp_path / "soup")
    ingredients, own = [weights_of(p) for p in three], weights or [1 / 3] * 3
    for key, value in weights_of(soup.path).items():
        exact = sum(
            np.float64(w) * i[key].astype(np.float64) for w, i in zip(own, ingredients, strict=True)
        )
        np.testing.assert_allclose(value, exact, rtol=2e-7)
        assert value.dtype == np.float32


def test_soup_of_one_is_that_model_bit_for_bit(three, tmp_path):
    soup = make_soup(three[:1], out=tmp_path / "soup")
    for key, value in weights_of(soup.path).items():
        assert np.array_equal(bits(value), bits(weights_of(three[0])[key]))


def test_negative_zero_survives(tmp_path, make_checkpoint):
    source = tmp_path / "source"
    shutil.copytree(make_checkpoint().path, source)
    tensors = weights_of(source)
    tensors["model.norm.weight"][:] = -0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    soup = make_soup([source], out=tmp_path / "soup")
    assert np.signbit(weights_of(soup.path)["model.norm.weight"]).all()


def test_order_of_ingredients_does_not_matter(three, tmp_path):
    one = make_soup(three, out=tmp_path / "one")
    other = make_soup(three[::-1], out=tmp_path / "other")
    assert (one.path / "model.safetensors").read_bytes() == (
        other.path / "model.safetensors"
    ).read_bytes()


def test_two_model_soup_lies_in_the_middle(three, tmp_path):
    soup = make_soup(three[:2], out=tmp_path / "soup")
    a, b, middle = weights_of(three[0]), weights_of(three[1]), weights_of(soup.path)
    key = "model.embed_tokens.weight"
    assert np.abs(middle[key] - (a[key] + b[key]) / 2).max() < 1e-7
    assert np.abs(middle[key] - a[key]).max() > 0.1


def test_bf16_output_is_rounded_to_nearest_even(three, tmp_path):
    soup = make_soup(three[:2], out=tmp_path / "soup", dtype="bfloat16")
    a, b = weights_of(three[0]), weights_of(three[1])
    key = "model.embed_tokens.weight"
    expected = (
        ((a[key].astype(np.float64) + b[key]) / 2).astype(np.float32).astype(ml_dtypes.bfloat16)
    )
    assert np.array_equal(bits(weights_of(soup.path)[key]), bits(expected))
    assert json.loads((soup.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_loads_it_and_tokenizer_comes_along(three, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    soup = make_soup(three[:2], out=tmp_path / "soup")
    model = AutoModelForCausalLM.from_pretrained(soup.path)
    assert AutoTokenizer.from_pretrained(soup.path).chat_template
    assert np.array_equal(
        model.state_dict()["model.norm.weight"].numpy(), weights_of(soup.path)["model.norm.weight"]
    )


def test_provenance(three, tmp_path):
    soup = make_soup(three[:2], out=tmp_path / "soup")
    record = json.loads((soup.path / "soup.json").read_text())
    assert {i["path"] for i in record["ingredients"]} == {str(p) for p in three[:2]}
    assert [i["weight"] for i in record["ingredients"]] == [0.5, 0.5]


def test_existing_output_is_kept(three, tmp_path):
    out = tmp_path / "soup"
    first = make_soup(three[:2], out=out)
    with pytest.raises(ConfigError, match="exists.*--force"):
        make_soup(three, out=out)
    assert first.digest == make_soup(three[:2], out=out, force=True).digest


def edited(source, target, edit):
    shutil.copytree(source, target)
    edit(target)
    return target


def edit_tensors(path, change):
    tensors = weights_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


BROKEN = {
    "lacks": lambda p: edit_tensors(p, lambda t: t.pop("model.norm.weight")),
    "holds NaN": lambda p: edit_tensors(p, lambda t: t["model.norm.weight"].fill(np.nan)),
    r"norm.weight is \(8,\)": lambda p: edit_tensors(
        p, lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)})
    ),
    "config hidden_act is 'gelu'": lambda p: edit_json(
        p / "config.json", lambda c: c.update(hidden_act="gelu")
    ),
    "is quantized": lambda p: edit_json(
        p / "config.json", lambda c: c.update(quantization_config={"bits": 4})
    ),
    "another tokenizer": lambda p: edit_json(
        p / "tokenizer.json",
        lambda t: t["model"]["vocab"].update(
            a=t["model"]["vocab"]["b"], b=t["model"]["vocab"]["a"]
        ),
    ),
    "has both": lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
    "no plain .safetensors file": lambda p: (
        (p / "model.safetensors").unlink(),
        (p / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
    ),
    "not a sound safetensors file": lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
    "does not lie inside": lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-9]
    ),
    "pickled weights": lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_is_refused(message, three, tmp_path):
    other = edited(three[1], tmp_path / "other", BROKEN[message])
    with pytest.raises(CheckpointError, match=message):
        make_soup([three[0], other], out=tmp_path / "soup")
    assert {p.name for p in tmp_path.iterdir()} == {"other"}


def test_weights_must_fit(three, tmp_path):
    with pytest.raises(ConfigError, match="sum to 1.2"):
        make_soup(three[:2], weights=[0.6, 0.6], out=tmp_path / "soup")
    with pytest.raises(ConfigError, match="3 weights for 2"):
        make_soup(three[:2], weights=[0.3, 0.3, 0.4], out=tmp_path / "soup")
    with pytest.raises(CheckpointError, match="given twice"):
        make_soup([three[0], three[0]], out=tmp_path / "soup")
    with pytest.raises(CheckpointError, match="no such directory"):
        make_soup([three[0], tmp_path / "missing"], out=tmp_path / "soup")
