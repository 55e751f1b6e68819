"""Small model directories for soups, written with numpy alone, and ways to spoil them."""

import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy learns the name bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "vocab_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 1,
    "dtype": "float32",
}
VOCABULARY = {token: i for i, token in enumerate(["<s>", "</s>", *"abcdefghijklmn"])}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": True},
        {"id": 1, "content": "</s>", "special": True},
    ],
    "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"], ["b", "c"]]},
}
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "X"}
EMBEDDING, HEAD, MATRIX, NORM = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
)


def tensors(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Tensors of a sibling: a common start, and a little that depends on the seed."""
    start, own = np.random.default_rng(99), np.random.default_rng(seed)
    shapes = {EMBEDDING: (16, 8), MATRIX: (24, 8), "model.layers.1.mlp.up_proj.weight": (24, 8)}
    shapes[NORM] = (8,)
    return {
        key: (start.normal(size=shape) + 0.05 * own.normal(size=shape)).astype(dtype)
        for key, shape in shapes.items()
    }


def write(path: Path, values: dict[str, np.ndarray], **config) -> Path:
    """A model directory."""
    path.mkdir(parents=True)
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a directory, single file or shards."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def shard(path: Path, *groups: list[str]) -> Path:
    """Split a directory's single file into shards with an index."""
    values = read(path)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, keys in enumerate(groups):
        name = f"part-{number}.safetensors"
        save_file({k: values[k] for k in keys}, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    size = sum(v.nbytes for v in values.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change) -> None:
    values = read(path)
    change(values)
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})


def edited(source: Path, target: Path, edit) -> Path:
    shutil.copytree(source, target)
    edit(target)
    return target


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")
