"""8. Soups of adapters: peft's forward pass is the oracle; the mean of the factors is not the mean of the products."""

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from salsa import make_soup
from salsa.errors import CheckpointError, ConfigError
from salsa.soup import measure_soup
from salsa.soup.ingredients import Ingredient
from salsa.soup.lora import Adapter, MergedAdapter

from .checkpoints import edit_json

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def base(make_checkpoint):
    return make_checkpoint("llama", 0).path


@pytest.fixture
def make_adapters(base, tmp_path):
    """Adapters with random A and B, as peft saves them."""

    def make(count=2, **options):
        settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | options
        paths = []
        for seed in range(count):
            torch.manual_seed(seed)
            config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.data.normal_(std=0.3)
            paths.append(tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}")
            model.save_pretrained(paths[-1], save_embedding_layers=False)
        return paths

    return make


def merged(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return peft.PeftModel.from_pretrained(model, adapter).double().merge_and_unload()


def averaged(base, adapters, weights):
    """The oracle: each adapter merged in float64, then averaged."""
    models = [merged(base, adapter) for adapter in adapters]
    states = [model.state_dict() for model in models]
    models[0].load_state_dict(
        {k: sum(w * s[k] for w, s in zip(weights, states, strict=True)) for k in states[0]}
    )
    return models[0]


def assert_same_logits(model, oracle, tolerance=1e-5):
    with torch.no_grad():
        ours, exact = model.double()(IDS).logits, oracle.double()(IDS).logits
    torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)


KINDS = [
    {},
    {"use_rslora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"modules_to_save": ["lm_head"]},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.1]])
def test_08_adapters_side_by_side_are_the_average(make_adapters, base, tmp_path, options, weights):
    paths = make_adapters(3, **options)
    soup = make_soup(paths, weights=weights, out=tmp_path / "soup")
    config = json.loads((soup.path / "adapter_config.json").read_text())
    assert config["r"] == 6
    oracle = averaged(base, paths, weights or [1 / 3] * 3)
    assert_same_logits(merged(base, soup.path), oracle)


@pytest.mark.parametrize("options", [k for k in KINDS if "bias" not in k], ids=str)
def test_08_adapters_added_to_the_base_are_the_average(make_adapters, base, tmp_path, options):
    paths = make_adapters(3, **options)
    weights = [0.6, 0.3, 0.1]
    if "modules_to_save" in options:  # a tied model has no place for it
        with pytest.raises(
            CheckpointError, match=r"brings lm_head.weight, which the base does not"
        ):
            make_soup(paths, weights=weights, base=tied(base, tmp_path), out=tmp_path / "soup")
    soup = make_soup(paths, weights=weights, base=base, out=tmp_path / "soup")
    ours = AutoModelForCausalLM.from_pretrained(soup.path, dtype=torch.float64)
    assert_same_logits(ours, averaged(base, paths, weights))
    assert (soup.path / "tokenizer.json").exists()


def test_08_an_adapter_is_added_to_any_piece_of_a_tensor(make_adapters, base):
    (path,) = make_adapters(1)
    under, adapter = Ingredient(base, "base"), Adapter(path, "adapter")
    with closing(under.weights), closing(adapter.weights):
        merged = MergedAdapter(adapter, under)
        for key, tensor in merged.tensors.items():
            whole = merged.load(key, 0, tensor.size)
            added = not np.array_equal(whole, under.load(key, 0, tensor.size))
            assert added == (key in merged._products)
            for start, stop in ((0, 7), (5, 12), (15, 16), (7, tensor.size)):
                piece = merged.load(key, start, stop)
                assert np.allclose(piece, whole[start:stop], rtol=1e-12, atol=1e-12), key


def tied(base, tmp_path):
    path = tmp_path / "tied"
    shutil.copytree(base, path)
    values = load_file(path / "model.safetensors")
    values.pop("lm_head.weight")
    save_file(values, path / "model.safetensors")
    return path


def test_08_the_mean_of_the_factors_would_be_wrong(make_adapters, base, tmp_path):
    paths = make_adapters(2)
    wrong = tmp_path / "wrong"
    shutil.copytree(paths[0], wrong)
    values = [load_file(p / "adapter_model.safetensors") for p in paths]
    save_file(
        {k: (values[0][k] + values[1][k]) / 2 for k in values[0]},
        wrong / "adapter_model.safetensors",
    )
    with pytest.raises(AssertionError):
        assert_same_logits(merged(base, wrong), averaged(base, paths, [0.5, 0.5]), 1e-2)


def test_08_products_are_measured_without_being_formed(make_adapters, base):
    paths = make_adapters(2)
    direct = measure_soup(paths)["diagnostics"]
    through_base = measure_soup(paths, base=base)["diagnostics"]
    assert direct["of"] == through_base["of"] == "deltas"
    np.testing.assert_allclose(direct["norms"], through_base["norms"], rtol=1e-4)
    np.testing.assert_allclose(direct["cosines"], through_base["cosines"], atol=1e-4)
    assert direct["soup_norm"] == pytest.approx(through_base["soup_norm"], rel=1e-4)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths[0])
    modules = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert sum(row["elements"] for row in direct["layers"]) == sum(
        module.get_base_layer().weight.numel() for module in modules
    )


def test_08_with_the_base_every_method_works(make_adapters, base, tmp_path):
    paths = make_adapters(2)
    for options in (
        {"method": "slerp"},
        {"method": "wise", "alpha": 0.5},
        {"method": "model_stock"},
    ):
        soup = make_soup(paths, base=base, out=tmp_path / options["method"], **options)
        assert AutoModelForCausalLM.from_pretrained(soup.path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "wise", dtype=torch.float64)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    mean = averaged(base, paths, [0.5, 0.5])
    mean.load_state_dict({k: (v + start.state_dict()[k]) / 2 for k, v in mean.state_dict().items()})
    assert_same_logits(half, mean)


def test_08_an_adapter_and_a_model_mix_over_the_base(
    make_adapters, base, make_checkpoint, tmp_path
):
    adapter, other = make_adapters(1)[0], make_checkpoint("llama", 5).path
    with pytest.raises(
        CheckpointError, match="is an adapter, other ingredients are models. Give base= .--base"
    ):
        make_soup([adapter, other], out=tmp_path / "soup")
    soup = make_soup([adapter, other], base=base, out=tmp_path / "soup")
    oracle = merged(base, adapter)
    full = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float64).state_dict()
    oracle.load_state_dict({k: (v + full[k]) / 2 for k, v in oracle.state_dict().items()})
    assert_same_logits(AutoModelForCausalLM.from_pretrained(soup.path), oracle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model_name_or_path", "elsewhere"),
        ("revision", "v2"),
        ("r", 4),
        ("lora_alpha", 4),
        ("use_rslora", True),
        ("modules_to_save", ["score"]),
        ("fan_in_fan_out", True),
        ("target_modules", ["q_proj"]),
    ],
)
def test_08_what_makes_an_adapter_must_match(make_adapters, tmp_path, key, value):
    paths = make_adapters(2)
    edit_json(paths[1] / "adapter_config.json", lambda c: c.update({key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is .*Only adapters of one base"):
        make_soup(paths, out=tmp_path / "soup")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "uses rank_pattern"),
        ({"init_lora_weights": "pissa"}, "started with pissa, which changes the base too"),
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA adapters add up. Give"),
        ({"r": 0}, "r is 0, no positive number. Copy"),
        ({"r": 3, "lora_alpha": 3}, "is not rank 3"),
    ],
)
def test_08_what_does_not_add_up_is_refused(make_adapters, tmp_path, change, message):
    paths = make_adapters(2)
    for path in paths:
        edit_json(path / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=message):
        make_soup(paths, out=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_08_adapters_need_their_own_base(make_adapters, make_checkpoint, tmp_path):
    paths = make_adapters(2)
    for path in paths:
        values = load_file(path / "adapter_model.safetensors")
        renamed = {k.replace("layers.1", "layers.7"): v for k, v in values.items()}
        save_file(renamed, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts .*layers.7.* which .* does not have"):
        make_soup(paths, base=make_checkpoint("llama", 0).path, out=tmp_path / "soup")
    with pytest.raises(ConfigError, match="heads= .--heads. is about models"):
        make_soup(paths, out=tmp_path / "soup", heads="average")


def test_08_a_bfloat16_adapter_is_rounded_once(make_adapters, tmp_path):
    """Ties of bfloat16 in matrices; they were looked up as if the matrix were flat."""
    paths = make_adapters(2)
    for path in paths:
        values = load_file(path / "adapter_model.safetensors")
        tied = {k: np.full_like(v, 1 + 2.0**-8) for k, v in values.items()}
        save_file(tied, path / "adapter_model.safetensors")
    edit_json(paths[1] / "adapter_config.json", lambda c: c.update(lora_dropout=0.5))
    soup = make_soup(paths, out=tmp_path / "soup", dtype="bfloat16", force=True)
    for value in load_file(soup.path / "adapter_model.safetensors").values():
        assert (value.astype(float) == 1).all()  # to even


def test_08_an_adapter_with_integers_is_refused(make_adapters, tmp_path):
    paths = make_adapters(2)
    for path in paths:
        values = load_file(path / "adapter_model.safetensors")
        key = sorted(values)[0]
        values[key] = values[key].astype(np.int64)
        save_file(values, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is I64; an adapter holds floats"):
        make_soup(paths, out=tmp_path / "soup", force=True)
