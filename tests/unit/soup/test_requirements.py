"""What a soup must get right: twenty requirements, each with tests that carry its number."""

import json
import logging
import os
import shutil
import stat
import struct

import ml_dtypes
import numpy as np
import pytest

from salsa import make_soup
from salsa.artifacts import Checkpoint
from salsa.errors import CheckpointError, ConfigError
from salsa.soup import files, interpolate, measure_soup, write_soup

from . import checkpoints
from .checkpoints import EMBEDDING, HEAD, MATRIX, NORM, bits, edit_json, edit_tensors, edited, read


@pytest.fixture
def three(tmp_path):
    return [
        checkpoints.write(tmp_path / f"model-{seed}", checkpoints.tensors(seed))
        for seed in range(3)
    ]


def refused(message, ingredients, tmp_path, **options):
    """The soup is refused with a message that holds `message`, and nothing is left behind."""
    before = set(tmp_path.iterdir())
    with pytest.raises((CheckpointError, ConfigError), match=message):
        make_soup(ingredients, out=tmp_path / "soup", **options)
    assert set(tmp_path.iterdir()) == before


# 1. Tied and shared tensors


def with_head(path, target, *, equal):
    def edit(copy):
        edit_tensors(copy, lambda t: t.update({HEAD: t[EMBEDDING] + (0 if equal else 1)}))

    return edited(path, target, edit)


@pytest.mark.parametrize("first", [0, 1])
def test_01_stored_tied_head_equal_to_the_embedding_is_no_difference(three, tmp_path, first):
    stored = with_head(three[1], tmp_path / "stored", equal=True)
    order = [three[0], stored][:: 1 if first == 0 else -1]
    soup = make_soup(order, out=tmp_path / "soup")
    found = read(soup.path)
    assert found.keys() == read(order[0]).keys()
    mean = (read(three[0])[EMBEDDING].astype(float) + read(three[1])[EMBEDDING]) / 2
    assert np.array_equal(found[EMBEDDING], mean.astype(np.float32))
    if HEAD in found:
        assert np.array_equal(found[HEAD], found[EMBEDDING])


def test_01_stored_head_that_differs_from_the_embedding_is_refused(three, tmp_path):
    other = with_head(three[1], tmp_path / "stored", equal=False)
    refused("differs from the embedding", [three[0], other], tmp_path)


def test_01_untied_head_in_some_only_is_refused(three, tmp_path):
    for path in three:
        edit_json(path / "config.json", lambda c: c.update(tie_word_embeddings=False))
    other = with_head(three[1], tmp_path / "stored", equal=True)
    refused(f"has besides {HEAD}", [three[0], other], tmp_path)


# 2. Tensors that are no floats


def test_02_integers_are_copied_and_must_be_equal(three, tmp_path):
    for path in three:
        edit_tensors(path, lambda t: t.update({"model.ids": np.arange(5)}))
    soup = make_soup(three[:2], out=tmp_path / "soup")
    assert np.array_equal(read(soup.path)["model.ids"], np.arange(5))
    edit_tensors(three[2], lambda t: t.update({"model.ids": np.arange(5)[::-1].copy()}))
    with pytest.raises(CheckpointError, match="model.ids holds integers that differ"):
        make_soup(three, out=tmp_path / "other")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64", "I128"])
def test_02_dtypes_that_are_not_allowed(three, tmp_path, dtype):
    file = three[1] / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[NORM]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(f"{NORM} is '{dtype}'; a soup takes F64, F32, F16, BF16", three[:2], tmp_path)


# 3. Accumulation


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", range(1, 9))
def test_03_uniform_soup_is_the_float64_mean_rounded_once(tmp_path, dtype, count):
    paths = [
        checkpoints.write(tmp_path / str(seed), checkpoints.tensors(seed, dtype))
        for seed in range(count)
    ]
    soup = read(make_soup(paths, out=tmp_path / "soup").path)
    ingredients = [read(p) for p in paths]
    for key, value in soup.items():
        exact = np.mean([i[key].astype(np.float64) for i in ingredients], axis=0)
        assert value.dtype == dtype
        assert np.array_equal(bits(value), bits(once(exact, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", range(1, 9))
def test_03_weighted_soup_is_the_float64_sum_rounded_once(tmp_path, dtype, count):
    paths = [
        checkpoints.write(tmp_path / str(seed), checkpoints.tensors(seed)) for seed in range(count)
    ]
    weights = np.arange(1, count + 1) / sum(range(1, count + 1))
    weights[-1] = 1 - weights[:-1].sum()
    soup = make_soup(paths, weights=weights.tolist(), out=tmp_path / "soup", dtype=dtype)
    ingredients = [read(p) for p in paths]
    for key, value in read(soup.path).items():
        exact = sum(
            w * i[key].astype(np.float64) for w, i in zip(weights, ingredients, strict=True)
        )
        assert np.array_equal(bits(value), bits(once(exact, dtype)))


def once(values, dtype):
    """float64 to `dtype`, nearest, ties to even, by searching the neighbours: slow and obviously right."""
    near = values.astype(dtype)
    if dtype == "float64":
        return near
    whole = bits(near).astype(np.int64)
    candidates = np.stack(
        [(whole + d).astype(f"u{near.itemsize}").view(near.dtype) for d in (-1, 0, 1)]
    )
    apart = np.abs(candidates.astype(np.float64) - values)
    apart[np.isnan(apart)] = np.inf
    odd = bits(candidates) & 1
    best = np.lexsort((odd, apart), axis=0)[0]
    return np.take_along_axis(candidates, best[None], axis=0)[0]


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "below", [1.0, 1 + 2.0**-7]
)  # the tie's even neighbour lies below it, or above
def test_03_bf16_is_not_rounded_twice(tmp_path, below, sign, side):
    """Halfway between two bf16 numbers float32 sees a tie, whatever lies behind its last digit."""
    tie, hair = below + 2.0**-8, side * 2.0**-39
    paths = [
        checkpoints.write(
            tmp_path / name, checkpoints.tensors(0, "float64") | {NORM: np.full(8, sign * value)}
        )
        for name, value in (("a", tie), ("b", tie + hair))
    ]
    soup = make_soup(paths, out=tmp_path / "soup", dtype="bfloat16", force=True)
    nearest = below + (side > 0) * 2.0**-7
    assert (read(soup.path)[NORM].astype(float) == sign * nearest).all()


def test_03_soup_of_one_keeps_every_bit(tmp_path):
    values = checkpoints.tensors(0) | {NORM: np.full(8, -0.0, np.float32)}
    path = checkpoints.write(tmp_path / "one", values)
    soup = make_soup([path], out=tmp_path / "soup")
    for key, value in read(soup.path).items():
        assert np.array_equal(bits(value), bits(values[key]))


def test_03_order_of_a_uniform_soup_does_not_matter(three, tmp_path):
    one = make_soup(three, out=tmp_path / "one")
    other = make_soup(three[::-1], out=tmp_path / "other", take_from=2)
    assert one.digest == other.digest
    giver = [json.loads((s.path / "soup.json").read_text())["settings_from"] for s in (one, other)]
    assert giver == [0, 2]


# 4. Output dtype


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float32", "bfloat16"), "float32"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("float16", "bfloat16"), "float32"),
        (("float64", "float32"), "float64"),
    ],
)
def test_04_auto_is_the_widest_ingredient(tmp_path, dtypes, expected):
    paths = [
        checkpoints.write(tmp_path / str(seed), checkpoints.tensors(seed, dtype), dtype=dtype)
        for seed, dtype in enumerate(dtypes)
    ]
    soup = make_soup(paths, out=tmp_path / "soup")
    assert {v.dtype for v in read(soup.path).values()} == {np.dtype(expected)}
    assert json.loads((soup.path / "config.json").read_text())["dtype"] == expected


@pytest.mark.parametrize("stated", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_04_the_config_states_the_dtype_asked_for(tmp_path, asked, stated):
    paths = [checkpoints.write(tmp_path / str(seed), checkpoints.tensors(seed)) for seed in (0, 1)]
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        config[stated] = config.pop("dtype")
        (path / "config.json").write_text(json.dumps(config))
    soup = make_soup(paths, out=tmp_path / "soup", dtype=asked)
    config = json.loads((soup.path / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {asked}


@pytest.mark.parametrize(("apart", "share"), [(0.02, 0.14), (0.002, 0.8)])
def test_04_bf16_loss_is_measured_and_warned_of(tmp_path, caplog, apart, share):
    start = np.random.default_rng(0).normal(size=(256, 256))
    paths = []
    for seed in (1, 2):
        own = start + apart * np.random.default_rng(seed).normal(size=start.shape)
        values = {MATRIX: own.astype(ml_dtypes.bfloat16)}
        paths.append(checkpoints.write(tmp_path / str(seed), values))
    with caplog.at_level(logging.WARNING):
        soup = make_soup(paths, out=tmp_path / "soup")
    record = json.loads((soup.path / "soup.json").read_text())
    found = record["diagnostics"]["bf16_rounding"]["share_of_delta"]
    exact = np.mean([read(p)[MATRIX].astype(np.float64) for p in paths], axis=0)
    lost = np.linalg.norm(read(soup.path)[MATRIX].astype(np.float64) - exact)
    oracle = lost / np.linalg.norm(read(paths[0])[MATRIX].astype(np.float64) - exact)
    assert found == pytest.approx(oracle, rel=1e-3) and found == pytest.approx(share, abs=0.05)
    assert f"storing bf16 loses {found:.0%} of the delta" in caplog.text
    assert make_soup(paths, out=tmp_path / "fine", dtype="float32")
    assert not json.loads((tmp_path / "fine" / "soup.json").read_text())["warnings"]


# 5. Shapes


def test_05_shapes_must_be_equal(three, tmp_path):
    edit_tensors(three[1], lambda t: t.update({EMBEDDING: t[EMBEDDING][:15]}))
    message = rf"model-1: {EMBEDDING} is \(15, 8\), in .*model-0 it is \(16, 8\)"
    refused(message, three[:2], tmp_path)


# 6. Keys and heads


def test_06_missing_and_extra_keys_are_both_listed(three, tmp_path):
    def change(values):
        values["model.extra.weight"] = values.pop(NORM)

    edit_tensors(three[1], change)
    refused(f"lacks {NORM}; has besides model.extra.weight", three[:2], tmp_path)


@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight"])
def test_06_heads_are_averaged_kept_or_dropped_but_never_silently(three, tmp_path, head):
    for number, path in enumerate(three):
        edit_tensors(path, lambda t, n=number: t.update({head: np.full((1, 8), n, np.float32)}))
    refused(f"has a head on top \\({head}\\). Say what becomes of it", three, tmp_path)
    average, kept, dropped = (
        read(make_soup(three, out=tmp_path / name, heads=name).path)
        for name in ("average", "keep-from-2", "drop")
    )
    assert (average[head] == 1).all() and (kept[head] == 2).all() and head not in dropped
    assert np.array_equal(kept[MATRIX], dropped[MATRIX])
    for wrong in ("keep-from-3", "all"):
        message = f"heads='{wrong}'. Use average, drop or keep-from-I with I from 0 to 2"
        refused(message, three, tmp_path, heads=wrong)


def test_06_a_head_that_only_one_has_can_be_kept_or_dropped(three, tmp_path):
    edit_tensors(three[1], lambda t: t.update({"v_head.weight": np.ones((1, 8), np.float32)}))
    refused("has a head on top", three, tmp_path)
    refused("lacks none; has besides v_head.weight", three, tmp_path, heads="average")
    kept = make_soup(three, out=tmp_path / "kept", heads="keep-from-1")
    assert (read(kept.path)["v_head.weight"] == 1).all()
    refused(
        "heads= .--heads., but no ingredient has a head",
        [three[0], three[2]],
        tmp_path,
        heads="drop",
    )


def test_06_the_message_names_a_model_that_has_the_head_it_names(three, tmp_path):
    for path, head in zip(three, ("v_head.weight", "score.weight"), strict=False):
        edit_tensors(path, lambda t, h=head: t.update({h: np.ones((1, 8), np.float32)}))
    refused(r"model-1: has a head on top \(score.weight\)", three, tmp_path)


# 7. Sharding


def test_07_sharding_may_differ(three, tmp_path):
    expected = make_soup(three, out=tmp_path / "expected")
    keys = sorted(read(three[0]))
    checkpoints.shard(three[1], keys[:1], keys[1:])
    checkpoints.shard(three[2], keys[2:], keys[:2])
    soup = make_soup(three, out=tmp_path / "soup")
    assert (soup.path / "model.safetensors").read_bytes() == (
        expected.path / "model.safetensors"
    ).read_bytes()


def test_07_index_beside_single_file_is_refused(three, tmp_path):
    (three[1] / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused("has both model.safetensors and model.safetensors.index.json", three[:2], tmp_path)


def test_07_index_and_shards_must_agree(three, tmp_path):
    keys = sorted(read(three[0]))
    checkpoints.shard(three[1], keys[:1], keys[1:])
    index = three[1] / "model.safetensors.index.json"
    whole = index.read_text()
    edit_json(index, lambda i: i["weight_map"].pop(keys[0]))
    refused("disagree about|not the tensors of", three[:2], tmp_path)
    index.write_text(whole)
    edit_json(index, lambda i: i["weight_map"].update(ghost="part-0.safetensors"))
    refused("disagree about 'ghost'", three[:2], tmp_path)
    index.write_text(whole)
    edit_json(index, lambda i: i["weight_map"].update({keys[1]: "part-0.safetensors"}))
    refused("disagree about", three[:2], tmp_path)
    index.write_text(whole)
    (three[1] / "part-1.safetensors").unlink()
    refused("part-1.safetensors: not a sound safetensors file", three[:2], tmp_path)


def test_07_output_is_sharded_with_a_right_index_and_transformers_loads_it(
    make_checkpoint, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(files, "MAX_SHARD_BYTES", 5000)
    paths = [make_checkpoint("llama", seed).path for seed in (0, 1)]
    soup = make_soup(paths, out=tmp_path / "soup")
    index = json.loads((soup.path / "model.safetensors.index.json").read_text())
    names = {p.name for p in soup.path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == names and len(names) > 3
    assert not (soup.path / "model.safetensors").exists()
    values = read(soup.path)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    state = AutoModelForCausalLM.from_pretrained(soup.path).state_dict()
    assert all(np.array_equal(state[k].numpy(), v) for k, v in values.items())


def test_07_no_stale_index_stays_when_a_soup_is_replaced(three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "MAX_SHARD_BYTES", 500)
        make_soup(three, out=tmp_path / "soup")
        assert (tmp_path / "soup" / "model.safetensors.index.json").exists()
    make_soup(three, out=tmp_path / "soup", force=True)
    assert not (tmp_path / "soup" / "model.safetensors.index.json").exists()


# 8. LoRA: tests/unit/soup/test_lora.py


# 9. Configuration and settings


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MistralForCausalLM"]},
        {"hidden_size": 9},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rms_norm_eps": 1e-5},
        {"tie_word_embeddings": False},
        {"hidden_act": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_09_architecture_must_be_equal(three, tmp_path, change):
    edit_json(three[1] / "config.json", lambda c: c.update(change))
    refused(f"model-1: config {next(iter(change))} is", three[:2], tmp_path)
    refused("config", three[:2], tmp_path, take_from=0)  # no option makes it fit


def test_09_name_version_and_dtype_do_not_matter(three, tmp_path):
    edit_json(
        three[1] / "config.json",
        lambda c: c.update(_name_or_path="x", transformers_version="4", torch_dtype="bfloat16"),
    )
    assert make_soup(three[:2], out=tmp_path / "soup")


def test_09_transformers_4_and_5_spell_rope_differently(three, tmp_path):
    def old(config):
        del config["rope_parameters"]
        config |= {"rope_theta": 10000.0, "rope_scaling": None, "head_dim": None}

    edit_json(three[1] / "config.json", old)
    assert make_soup(three[:2], out=tmp_path / "respelled")
    edit_json(three[1] / "config.json", lambda c: c.update(rope_theta=5e5))
    refused("config rope_parameters", three[:2], tmp_path)


def spoil_template(path):
    (path / "chat_template.jinja").write_text("other")


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("chat template", spoil_template),
        (
            "generation_config temperature",
            lambda p: edit_json(p / "generation_config.json", lambda g: g.update(temperature=1.0)),
        ),
        (
            "config eos_token_id",
            lambda p: edit_json(p / "config.json", lambda c: c.update(eos_token_id=5)),
        ),
        (
            "eos_token",
            lambda p: edit_json(p / "tokenizer_config.json", lambda c: c.update(eos_token="a")),
        ),
    ],
)
def test_09_settings_are_equal_or_chosen(three, tmp_path, what, spoil):
    spoil(three[1])
    refused(f"model-1: {what} is .*Choose one with take_from= .--take-from", three[:2], tmp_path)
    for choice in (0, 1):
        soup = make_soup(three[:2], out=tmp_path / f"soup-{choice}", take_from=choice)
        for name in (
            "chat_template.jinja",
            "generation_config.json",
            "config.json",
            "tokenizer_config.json",
        ):
            assert (soup.path / name).read_text() == (three[choice] / name).read_text()
    refused("take_from=2, but ingredients are 0 to 1", three[:2], tmp_path, take_from=2)


# 10. Tokenizers


def permute(path):
    def swap(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(path / "tokenizer.json", swap)


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("vocabulary: 'a' is 3, there 2", permute),
        (
            "merges",
            lambda p: edit_json(p / "tokenizer.json", lambda t: t["model"]["merges"].reverse()),
        ),
        (
            "added tokens",
            lambda p: edit_json(
                p / "tokenizer.json",
                lambda t: t["added_tokens"].append({"id": 16, "content": "<x>", "special": True}),
            ),
        ),
    ],
)
def test_10_vocabularies_must_map_alike(three, tmp_path, what, spoil):
    spoil(three[1])
    refused(f"another tokenizer than .*{what}", three[:2], tmp_path)
    refused("another tokenizer", three[:2], tmp_path, take_from=0)  # no option makes it fit


def test_10_tokenizers_are_compared_parsed(three, tmp_path):
    def respell(tokenizer):
        tokenizer["version"] = "2.0"
        tokenizer["model"]["merges"] = ["a b", "b c"]
        tokenizer["model"]["vocab"] = dict(reversed(tokenizer["model"]["vocab"].items()))

    edit_json(three[1] / "tokenizer.json", respell)
    assert make_soup(three[:2], out=tmp_path / "soup")


def test_10_a_missing_tokenizer_is_not_taken_for_equal(three, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (three[1] / name).unlink()
    refused("model-1: has no tokenizer to compare", three[:2], tmp_path)
    soup = make_soup(three[:2], out=tmp_path / "soup", take_from=0)
    assert (soup.path / "tokenizer.json").exists()


# 11. Are they siblings?


def test_11_distances_are_those_of_the_deltas(three, tmp_path):
    base = checkpoints.write(tmp_path / "base", checkpoints.tensors(99))
    record = measure_soup(three, base=base)
    start = flat(read(base))
    deltas = [flat(read(p)) - start for p in three]
    found = record["diagnostics"]
    assert found["of"] == "deltas"
    np.testing.assert_allclose(found["norms"], [np.linalg.norm(d) for d in deltas], rtol=1e-5)
    unit = np.array([d / np.linalg.norm(d) for d in deltas])
    np.testing.assert_allclose(found["cosines"], unit @ unit.T, atol=1e-5)
    apart = np.linalg.norm(deltas[0] - deltas[1])
    mean = (np.linalg.norm(deltas[0]) + np.linalg.norm(deltas[1])) / 2
    assert found["relative_distances"][0][1] == pytest.approx(apart / mean, rel=1e-5)
    soup = np.linalg.norm(np.mean(deltas, axis=0))
    assert found["soup_norm"] == pytest.approx(soup, rel=1e-5)
    ratio = soup / np.mean([np.linalg.norm(d) for d in deltas])
    assert found["soup_norm_ratio"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.1]])
def test_11_distances_are_those_of_the_weights_without_a_base(three, weights):
    found = measure_soup(three, weights=weights)["diagnostics"]
    values = [flat(read(p)) for p in three]
    assert found["of"] == "weights"
    np.testing.assert_allclose(found["norms"], [np.linalg.norm(v) for v in values], rtol=1e-5)
    unit = np.array([v / np.linalg.norm(v) for v in values])
    np.testing.assert_allclose(found["cosines"], unit @ unit.T, atol=1e-5)
    soup = np.average(values, axis=0, weights=weights)
    assert found["soup_norm"] == pytest.approx(np.linalg.norm(soup), rel=1e-5)
    layers = {row["layer"]: row for row in found["layers"]}
    assert list(layers) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    a, b = (read(p)[MATRIX].astype(float).ravel() for p in three[:2])
    one = measure_soup(three[:2])["diagnostics"]["layers"][1]
    assert one["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    assert one["elements"] == a.size


def flat(values):
    return np.concatenate([values[k].astype(np.float64).ravel() for k in sorted(values)])


def test_11_strangers_and_outliers_are_warned_of(three, tmp_path, caplog):
    stranger = checkpoints.write(
        tmp_path / "stranger",
        {k: np.random.default_rng(5).normal(size=v.shape) for k, v in read(three[0]).items()},
    )
    make_soup([three[0], stranger], out=tmp_path / "soup")
    assert "do not look like fine-tunings of one base" in caplog.text
    caplog.clear()
    far = checkpoints.write(
        tmp_path / "far", {k: v * np.float32(1.5) for k, v in read(three[0]).items()}
    )
    make_soup([*three, far], out=tmp_path / "other")
    assert "far lies" in caplog.text and "times as far from the others" in caplog.text


def test_11_identical_ingredients_are_refused_unless_forced(three, tmp_path):
    copy = edited(three[0], tmp_path / "copy", lambda p: None)
    refused("the same checkpoint is given twice", [three[0], three[0]], tmp_path)
    refused("the same checkpoint is given twice", [three[0], three[1], copy], tmp_path)
    soup = make_soup([three[0], copy], out=tmp_path / "soup", force=True)
    assert np.array_equal(read(soup.path)[MATRIX], read(three[0])[MATRIX])


# 12. Hub snapshots


def hub(tmp_path, name, source, commit):
    """A cache as huggingface_hub lays it out: snapshots are symlinks to blobs."""
    home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / commit, home / "blobs"
    for directory in (snapshot, blobs, home / "refs"):
        directory.mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{number:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040d}")


def test_12_hub_names_resolve_to_symlinked_snapshots_and_the_commit_is_recorded(
    three, tmp_path, monkeypatch
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub(tmp_path, "org/a", three[0], "a" * 40)
    hub(tmp_path, "org/b", three[1], "b" * 40)
    soup = make_soup(["org/a", f"org/b@{'b' * 40}"], out=tmp_path / "soup")
    record = json.loads((soup.path / "soup.json").read_text())
    assert [i["path"] for i in record["ingredients"]] == [
        f"org/a@{'a' * 40}",
        f"org/b@{'b' * 40}",
    ]
    local = make_soup(three[:2], out=tmp_path / "local")
    assert soup.digest == local.digest
    assert not any(p.is_symlink() for p in soup.path.iterdir())


# 13. Security


@pytest.mark.parametrize(
    "name",
    [
        "../model-2/model.safetensors",
        "/etc/passwd.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        ".hidden.safetensors",
        "x.bin",
        "x\x00.safetensors",
        "",
        5,
        None,
    ],
)
def test_13_weight_map_names_are_plain_files_beside_the_index(three, tmp_path, name):
    (three[1] / "model.safetensors").unlink()
    index = {"weight_map": {NORM: name}}
    (three[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("no plain .safetensors file beside it", three[:2], tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_13_pickles_are_never_opened(three, tmp_path, name):
    (three[1] / "model.safetensors").rename(three[1] / name)
    refused("pickled weights only.*safe_serialization=True", three[:2], tmp_path)


def test_13_code_is_not_copied(three, tmp_path):
    for path in three:
        (path / "modeling_x.py").write_text("raise SystemExit")
        (path / "training_args.bin").write_bytes(b"pickle")
    soup = make_soup(three, out=tmp_path / "soup")
    assert not list(soup.path.glob("*.py")) and not list(soup.path.glob("*.bin"))


# 14. Corruption


def test_14_hashes_are_those_of_the_files(three, tmp_path):
    import hashlib

    soup = make_soup(three, out=tmp_path / "soup")
    record = json.loads((soup.path / "soup.json").read_text())
    for path, entry in zip(three, record["ingredients"], strict=True):
        assert entry["sha256"] == Checkpoint.of(path).digest
    data = (soup.path / "model.safetensors").read_bytes()
    assert record["files"] == {"model.safetensors": hashlib.sha256(data).hexdigest()}
    assert record["sha256"] == soup.digest == Checkpoint.of(soup.path).digest


def test_14_a_flipped_bit_is_found_while_reading(three, tmp_path):
    checkpoints = [Checkpoint.of(path) for path in three]
    file = three[1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    (tmp_path / "soup").mkdir()
    with pytest.raises(CheckpointError, match="model-1: changed since it was made"):
        write_soup(checkpoints, tmp_path / "soup")


@pytest.mark.parametrize("cut", [1, 9, 700])
def test_14_short_files_are_refused(three, tmp_path, cut):
    file = three[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    refused("does not lie inside the file|not a sound safetensors file", three[:2], tmp_path)


# 15. Atomicity (kill -9: test_hard.py)


def test_15_an_existing_target_is_kept_without_force(three, tmp_path):
    out = tmp_path / "soup"
    first = make_soup(three[:2], out=out)
    with pytest.raises(ConfigError, match="exists. Give another directory, or --force"):
        make_soup(three, out=out)
    assert Checkpoint.of(out) == first
    assert make_soup(three, out=out, force=True).digest != first.digest
    assert {p.name for p in tmp_path.iterdir()} == {"model-0", "model-1", "model-2", "soup"}


def test_15_force_replaces_models_only_and_never_an_ingredient(three, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="is no model directory, so --force does not replace it"):
        make_soup(three, out=home, force=True)
    with pytest.raises(ConfigError, match="is one of the ingredients"):
        make_soup(three, out=three[1], force=True)
    assert (home / "thesis.tex").exists() and (three[1] / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="is a file"):
        make_soup(three, out=home / "thesis.tex" / "soup")


def test_15_a_failed_soup_keeps_what_it_should_have_replaced(three, tmp_path):
    out = tmp_path / "soup"
    first = make_soup(three[:2], out=out)
    edit_tensors(three[2], lambda t: t[NORM].fill(np.nan))
    with pytest.raises(CheckpointError, match="NaN"):
        make_soup(three, out=out, force=True)
    assert Checkpoint.of(out) == first
    assert not list(tmp_path.glob(".*"))


def test_15_two_processes_do_not_share_a_target(three, tmp_path):
    from salsa.artifacts import new_directory

    with (
        new_directory(tmp_path / "soup") as partial,
        pytest.raises(ConfigError, match="in use by another salsa process"),
    ):
        (partial / "config.json").write_text("{}")
        make_soup(three, out=tmp_path / "soup")
    assert (tmp_path / "soup" / "config.json").exists()


# 16. Finite numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0]])
def test_16_non_finite_input_names_the_tensor(three, tmp_path, value, weights):
    edit_tensors(three[1], lambda t: t[MATRIX].__setitem__((3, 2), value))
    message = f"model-1: {MATRIX} holds NaN or Inf"
    refused(message, three[:2], tmp_path, weights=weights)


def test_16_non_finite_output_names_the_tensor(three, tmp_path):
    edit_tensors(three[1], lambda t: t[MATRIX].__setitem__((3, 2), 1e38))
    refused(f"{MATRIX} overflows F16", three[:2], tmp_path, dtype="float16")
    assert make_soup(three[:2], out=tmp_path / "fine")


def test_16_large_float64_numbers_are_finite(tmp_path):
    values = {MATRIX: np.full((4, 4), 1e300)}
    paths = [
        checkpoints.write(tmp_path / n, values | {NORM: np.full(3, v)})
        for n, v in (("a", 1.0), ("b", 2.0))
    ]
    soup = make_soup(paths, out=tmp_path / "soup")
    assert (read(soup.path)[MATRIX] == 1e300).all()


# 17. Quantized models


def test_17_quantized_models_are_refused(three, tmp_path):
    edit_json(three[1] / "config.json", lambda c: c.update(quantization_config={"bits": 4}))
    refused("model-1: is quantized. De-quantize it first", three[:2], tmp_path)
    edit_json(three[1] / "config.json", lambda c: c.pop("quantization_config"))
    edit_tensors(three[1], lambda t: t.update({"model.layers.0.mlp.qweight": np.ones(4, np.int32)}))
    refused("qweight belongs to a quantized layer", three[:2], tmp_path)


# 18. Provenance


def test_18_record_says_what_was_done(three, tmp_path):
    soup = make_soup(three[:2], weights=[0.25, 0.75], out=tmp_path / "soup")
    record = json.loads((soup.path / "soup.json").read_text())
    assert record["method"] == "linear" and record["dtype"] == "F32"
    assert [i["path"] for i in record["ingredients"]] == [str(p) for p in three[:2]]
    assert [i["weight"] for i in record["ingredients"]] == [0.25, 0.75]
    assert record["versions"]["numpy"] == np.__version__
    assert {"cosines", "norms", "layers"} <= record["diagnostics"].keys()


def test_18_bytes_are_the_same_each_time_and_files_are_readable(three, tmp_path):
    one, other = (make_soup(three, out=tmp_path / name).path for name in ("one", "other"))
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


# 19 and 20, memory and speed: test_hard.py and benchmarks/. Weights:


def test_20_weights_must_sum_to_one_unless_told_otherwise(three, tmp_path):
    refused("weights sum to 1.2, not to 1. .*--normalize", three[:2], tmp_path, weights=[0.6, 0.6])
    refused("3 weights for 2", three[:2], tmp_path, weights=[0.3, 0.3, 0.4])
    refused(
        "weight -0.5 is negative. Add extrapolate=True .--extrapolate",
        three[:2],
        tmp_path,
        weights=[1.5, -0.5],
    )
    refused("cannot be used", three[:2], tmp_path, weights=[float("nan"), 1.0])
    a, b = (read(p)[MATRIX].astype(np.float64) for p in three[:2])
    half = make_soup(three[:2], weights=[3, 1], normalize=True, out=tmp_path / "half")
    assert np.array_equal(read(half.path)[MATRIX], (0.75 * a + 0.25 * b).astype(np.float32))
    beyond = make_soup(three[:2], weights=[1.5, -0.5], extrapolate=True, out=tmp_path / "beyond")
    assert np.array_equal(read(beyond.path)[MATRIX], (1.5 * a - 0.5 * b).astype(np.float32))
    double = make_soup(three[:2], weights=[1, 1], extrapolate=True, out=tmp_path / "double")
    assert np.array_equal(read(double.path)[MATRIX], (a + b).astype(np.float32))


def test_mergekit_output_is_an_ordinary_ingredient(three, tmp_path):
    (three[1] / "mergekit_config.yml").write_text("merge_method: linear")
    (three[1] / "README.md").write_text("card")
    soup = make_soup(three[:2], out=tmp_path / "soup")
    assert not (soup.path / "mergekit_config.yml").exists()


def test_interpolation_ends_are_the_models_bit_for_bit(three, tmp_path):
    made = interpolate(three[0], three[1], points=[0, 0.25, 1], out=tmp_path / "line")
    assert [c.path.name for c in made] == ["t=0", "t=0.25", "t=1"]
    a, b = (read(p) for p in three[:2])
    for key in a:
        assert np.array_equal(bits(read(made[0].path)[key]), bits(a[key]))
        assert np.array_equal(bits(read(made[2].path)[key]), bits(b[key]))
        middle = 0.75 * a[key].astype(np.float64) + 0.25 * b[key].astype(np.float64)
        assert np.array_equal(read(made[1].path)[key], middle.astype(np.float32))
    assert all(Checkpoint.of(c.path) == c for c in made)
    with pytest.raises(ConfigError, match="different points= .--points"):
        interpolate(three[0], three[1], points=[0, 0], out=tmp_path / "other")
    with pytest.raises(ConfigError, match="negative"):
        interpolate(three[0], three[1], points=[0, 1.5], out=tmp_path / "other")
