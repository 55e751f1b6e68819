"""docs/how-to/other-trainers.md: a soup's files are what other trainers load, and the keys that it names exist.

The keys were read from the source of the versions noted, in November 2026; those trainers are not installed here.
"""

import json
import os
import re
from importlib import metadata

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from salsa import make_soup
from tests.conftest import tiny_model, tiny_tokenizer
from tests.forked import python

KEYS = {
    "ms-swift 4.6.0": (  # swift/arguments/rlhf_args.py, base_args/base_args.py, rlhf_trainers/args_mixin.py
        "--rlhf_type", "--model", "--ref_model", "--tuner_type", "--beta", "--dataset", "--sync_ref_model",
    ),
    "LLaMA-Factory 0.9.5": (  # src/llamafactory/hparams/finetuning_args.py, model_args.py
        "stage", "model_name_or_path", "ref_model", "pref_beta",
    ),
    "SkyRL 0.3.0": (  # skyrl/train/config/config.py: TrainerConfig, PolicyConfig, RefConfig, AlgorithmConfig
        "trainer.policy.model.path", "trainer.ref.model.path", "trainer.algorithm.use_kl_loss",
        "trainer.update_ref_every_epoch",
    ),
    "OpenRLHF 0.11.0": (  # openrlhf/cli/train_dpo.py, train_ppo_ray.py
        "--model.model_name_or_path", "--ref.model_name_or_path", "--model.beta", "--actor.model_name_or_path",
        "--train.enable_ema",
    ),
    "verl 0.10.0.dev": ("actor_rollout_ref.model.path",),  # verl/workers/engine_workers.py
}  # fmt: skip


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "how-to" / "other-trainers.md").read_text()


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    """Two models in several files each, in bf16, as larger ones come."""
    folder = tmp_path_factory.mktemp("ingredients")
    for seed in range(2):
        path = folder / f"sft-{seed}"
        model = tiny_model("llama", seed).to(torch.bfloat16)
        model.save_pretrained(path, max_shard_size="20KB")
        tiny_tokenizer().save_pretrained(path)
    return [folder / f"sft-{seed}" for seed in range(2)]


@pytest.fixture(scope="module")
def soup(ingredients, tmp_path_factory):
    return make_soup(ingredients, out=tmp_path_factory.mktemp("made") / "soup").path


def test_every_key_of_the_page_is_one_that_was_read(page):
    known = {key for keys in KEYS.values() for key in keys}
    named = set(
        re.findall(r"(?<![\w-])--[a-z][\w.]+|trainer(?:\.\w+)+(?==)|actor_rollout_ref[\w.]+", page)
    )
    named -= {"--method", "--module"}  # salsa's own, and deepspeed's
    assert named <= known, named - known
    for trainer, keys in KEYS.items():
        assert trainer in page
        for key in keys:
            assert key in page, f"{trainer}: {key}"


def test_the_comparison_is_of_the_same_versions(repository):
    """One reading of each source: a version that is read anew is read anew for both pages."""
    text = (repository / "docs" / "comparison.md").read_text()
    read = dict(re.findall(r"^\| (\S+) \| (\d[\w.]+) \|", text, flags=re.M))
    for trainer in KEYS:
        name, version = trainer.split()
        assert read.get(name, version) == version, trainer
    assert version_of(read["TRL"]) <= version_of(metadata.version("trl"))
    assert len(read) == 5


def version_of(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_a_soup_has_the_files_that_trainers_read(soup):
    names = {path.name for path in soup.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors",
    }  # fmt: skip
    config = json.loads((soup / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    # one file, so there is no index, and none of the ingredients' that would send a loader to other files
    assert not names & {"model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json"}


def test_it_holds_every_tensor_in_the_format_of_its_config(soup, ingredients):
    config = json.loads((soup / "config.json").read_text())
    given = json.loads((ingredients[0] / "model.safetensors.index.json").read_text())
    assert len(set(given["weight_map"].values())) > 1
    with safe_open(soup / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(given["weight_map"])
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {  # noqa: SIM118
            f"torch.{config['dtype']}"
        }
        assert file.metadata()["format"] == "pt"  # transformers refuses files that do not say so


def test_it_loads_as_any_model_does_and_is_the_mean(soup, ingredients):
    model = AutoModelForCausalLM.from_pretrained(soup)
    assert model.dtype == torch.bfloat16
    parts = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in ingredients]
    for (name, weight), one, two in zip(
        model.named_parameters(), *(p.parameters() for p in parts), strict=True
    ):
        assert torch.equal(weight.detach(), ((one + two) / 2).detach().bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(soup)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert GenerationConfig.from_pretrained(soup).eos_token_id == 2
    assert AutoConfig.from_pretrained(soup).vocab_size == 261


def run_python(code, folder):
    environment = os.environ | {"HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    return python("-c", code, cwd=folder, env=environment)


@pytest.mark.slow
def test_the_page_runs(page, make_checkpoint, tmp_path):
    """TRL's block as it stands, and then its line for those without salsa."""
    import shutil

    for seed in range(2):
        shutil.copytree(make_checkpoint("llama", seed).path, tmp_path / f"sft-{seed}")
    rows = [{"prompt": f"say {i}"} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = re.search(r"```python\n(.*?)```", page, flags=re.S)[1]
    line = re.search(r"`(trainer\.ref_model\.load_state_dict.*?)`", page)[1]
    code += f"""
assert (soup := AutoModelForCausalLM.from_pretrained("soup").state_dict())
assert not all(torch.equal(w, soup[n]) for n, w in trainer.ref_model.state_dict().items())
{line}
assert all(torch.equal(w, soup[n]) for n, w in trainer.ref_model.state_dict().items())
"""
    done = run_python("import torch\n" + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'kl':" in done.stdout
