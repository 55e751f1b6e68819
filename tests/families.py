"""Tiny random models of many families: those whose attention can be replaced, and those whose cannot."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 261, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
PACKED = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "gemma": {},
    "gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "gemma3_text": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2},
}
ALONE = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {"state_size": 4},
}


def model_of(family: str):
    """A model with two layers of width 16, always the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | (PACKED | ALONE)[family])
    return AutoModelForCausalLM.from_config(config).eval()
