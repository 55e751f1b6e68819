"""Tiny models, made here: no test needs a network or a download."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from salsa.artifacts import Checkpoint
from salsa.models import LanguageModel
from salsa.runtime.engine import Engine

# their fixtures: a run of the tiny recipe, shared by e2e/ and browser/; an RL job on a tiny model
pytest_plugins = ["tests.whole_run", "tests.tiny_rl"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


def tiny_tokenizer(
    *, pad_is_eos: bool = False, template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and five special tokens."""
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|end|>" if pad_is_eos else "<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=template,
    )


def tiny_model(family: str = "llama", seed: int = 0):
    """A random model with two layers of width 16."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return model_class(config).eval()


def wrap(model, **options) -> LanguageModel:
    """A model of transformers as RL uses it, in fp32."""
    return LanguageModel(model, Engine.create("fp32"), **options)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Write a tiny checkpoint; `make_checkpoint(family, seed, **tokenizer options)`."""

    def make(family: str = "llama", seed: int = 0, **options) -> Checkpoint:
        path = tmp_path_factory.mktemp(f"{family}-{seed}")
        tiny_model(family, seed).save_pretrained(path)
        tiny_tokenizer(**options).save_pretrained(path)
        return Checkpoint.of(path)

    return make


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).parent.parent
