"""Load and save models and tokenizers of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from salsa.config import ModelConfig
from salsa.errors import CheckpointError
from salsa.types import Sampling
from salsa.untrusted import check_model, check_size, read_json, read_text, reading


def load_tokenizer(
    path: Path, *, gguf_file: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model directory. A missing padding token becomes EOS: masks come from lengths, so that is safe.

    `gguf_file` is one in the directory that holds the tokenizer; the Jinja file `chat_template` replaces its template.

    Raises:
        CheckpointError: there is no tokenizer, or it has no EOS token.
    """
    options = {"gguf_file": gguf_file} if gguf_file is not None else {}
    for file in path.glob("tokenizer*.json"):
        with reading(file, "no tokenizer can be read"):
            check_size(file)
    tokenizer = _from_pretrained(AutoTokenizer, path, "tokenizer", **options)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{path}: the tokenizer has no EOS token, so no reply could end. Set eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = read_text(Path(chat_template))
    return tokenizer


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two models' tokenizers map the same tokens to the same rows."""
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()


def check_vocabulary(policy: PreTrainedTokenizerBase, path: Path, what: str) -> None:
    """Refuse a model whose token ids mean other tokens than the policy's.

    Args:
        policy: the policy's tokenizer.
        path: the other model's directory.
        what: what the other model is, for the message: `reference`.

    Raises:
        CheckpointError: its tokenizer does not map the same tokens to the same rows, or cannot be loaded.
    """
    if load_tokenizer(path).get_vocab() != policy.get_vocab():
        named = f" ({policy.name_or_path})" if policy.name_or_path else ""
        raise CheckpointError(
            f"{path}: the {what}'s tokenizer is not the policy's{named}. Use models of one family."
        )


def sampling_for(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float
) -> Sampling:
    """How to sample from the model at `path`; a reply ends at the tokenizer's EOS or the generation config's."""
    ends = {tokenizer.eos_token_id}
    file = path / "generation_config.json"
    if file.exists():
        value = read_json(file).get("eos_token_id")
        ends |= set(value if isinstance(value, list) else [value]) - {None}
    return Sampling(max_new_tokens, temperature, tuple(sorted(ends)), int(tokenizer.pad_token_id))


def load_policy(path: Path | str) -> PreTrainedModel:
    """A causal language model of transformers, fp32, without dropout; CheckpointError if it cannot be loaded."""
    return _load(AutoModelForCausalLM, Path(path))


def load_classifier(
    path: Path, *, pad_id: int, new_head_seed: int | None = None
) -> PreTrainedModel:
    """A sequence classifier with one label, in fp32; a missing head is drawn from `new_head_seed`.

    Raises:
        CheckpointError: the model has no head and no seed to draw one is given, its head is not one linear layer
            `score` without bias on a causal trunk, or it has several labels.
    """
    options: dict[str, Any] = {}
    if new_head_seed is None:
        _check_classifier(path)
    elif not _is_classifier(path):
        torch.manual_seed(new_head_seed)
        options |= {"num_labels": 1, "new_head": True}
    model = _load(AutoModelForSequenceClassification, path, **options)
    _check_head(model, path)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id
    return model


def check_reward_model(path: Path) -> None:
    """Raise CheckpointError for a kind of model that `load_classifier` refuses; reads config.json, not the weights."""
    check_model(path)
    _check_classifier(path)
    config = _from_pretrained(AutoConfig, path, "config.json")
    with torch.device("meta"):
        _check_head(AutoModelForSequenceClassification.from_config(config), path)


def _architectures(path: Path) -> list[str]:
    return read_json(path / "config.json").get("architectures") or []


def _is_classifier(path: Path) -> bool:
    return any("SequenceClassification" in name for name in _architectures(path))


def _check_classifier(path: Path) -> None:
    if not _is_classifier(path):
        raise CheckpointError(
            f"{path}: is no reward model ({_architectures(path)}). Give a sequence classifier."
        )


def _check_head(model: PreTrainedModel, path: Path) -> None:
    """One label, and a head that reads a causal trunk's last hidden state and nothing else."""
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{path}: the reward model has {model.config.num_labels} labels. Give one with num_labels=1."
        )
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise CheckpointError(
            f"{path}: {type(model).__name__} has no linear head `score` on its last hidden state. Give a sequence "
            "classifier of a causal language model, or call this one in a function of your own (reward.functions)."
        )


def prepare_base(config: ModelConfig, path: Path, out: Path) -> None:
    """Write the base at `path` as an ordinary checkpoint: de-quantized, with its chat template and a padding token."""
    tokenizer = load_tokenizer(path, gguf_file=config.gguf_file, chat_template=config.chat_template)
    options: dict[str, Any] = (
        {"gguf_file": config.gguf_file} if config.gguf_file is not None else {}
    )
    model = _load(AutoModelForCausalLM, path, **options)
    if config.gguf_file is not None:
        if hasattr(model.config, "quantization_config"):  # else transformers refuses to save it
            del model.config.quantization_config
        fresh = AutoModelForCausalLM.from_config(model.config)
        fresh.load_state_dict(model.state_dict())
        model = fresh
    save_checkpoint(model, tokenizer, out)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors), with the fp32 `weights` in place of parameters if given.

    Tied weights are written once, as transformers does. The same model gives the same files whatever the environment:
    `local_files_only`, which a tokenizer remembers if HF_HUB_OFFLINE was set when it was loaded, is left out.
    """
    if weights is not None:
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        weights = {n: w.detach().contiguous() for n, w in (buffers | weights).items()}
    model.save_pretrained(out, state_dict=weights)
    if weights is not None:  # transformers writes the dtype of what computes, which may be bf16
        config = json.loads((out / "config.json").read_text(encoding="utf-8")) | {
            "dtype": "float32"
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(out)


def _from_pretrained(factory: Any, path: Path, what: str, **options: Any) -> Any:
    """What the factory makes of the directory; code that lies there is not run, and nobody is asked whether it may."""
    try:
        return factory.from_pretrained(path, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # the parsers of strange files raise many unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: no {what} can be loaded ({reason}).") from error


def _load(factory: Any, path: Path, *, new_head: bool = False, **options: Any) -> PreTrainedModel:
    """The model, every weight of it out of the files; a `new_head` may be missing there."""
    check_model(path)
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    model, found = _from_pretrained(
        factory, path, "model", dtype=torch.float32, output_loading_info=True, **options
    )
    inside = f"{model.base_model_prefix}."
    missing = sorted(k for k in found["missing_keys"] if k.startswith(inside) or not new_head)
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} weights that config.json speaks of are not in the files, {missing[0]} for one. "
            "Copy or save it again."
        )
    model.eval()
    # transformers would give the padding token's row no gradient, which may be EOS's row; masks do that job here
    model.get_input_embeddings().padding_idx = None
    return model
