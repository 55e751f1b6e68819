"""Load and save models; forward passes reduced to what RL needs: logprobs, values, scores of response positions.

Logits are computed for response positions only (`logits_to_keep`); log-softmax and everything after it is fp32.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from salsa.config import ModelConfig
from salsa.errors import CheckpointError
from salsa.runtime.local import device
from salsa.types import Rollout, Sampling


class TokenStats(NamedTuple):
    """Per response token, 0 outside the mask."""

    logprobs: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]


def prepare_base(config: ModelConfig, path: Path, out: Path) -> None:
    """Write the base at `path` as an ordinary checkpoint: de-quantized, with its chat template and a padding token."""
    tokenizer = load_tokenizer(path, gguf_file=config.gguf_file)
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    model = _load(AutoModelForCausalLM, path, gguf_file=config.gguf_file)
    if config.gguf_file is not None:
        fresh = AutoModelForCausalLM.from_config(_unquantized(model.config))
        fresh.load_state_dict(model.state_dict())
        model = fresh
    save(model, tokenizer, out)


def load_tokenizer(path: Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a model directory. A missing padding token becomes EOS: masks come from lengths, so that is safe.

    Raises:
        CheckpointError: there is no tokenizer, or it has no EOS token.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{path}: no tokenizer can be loaded ({str(error).splitlines()[0]})."
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{path}: the tokenizer has no EOS token, so no reply could end. Set eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two models' tokenizers map the same tokens to the same rows."""
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()


def load_policy(path: Path) -> PreTrainedModel:
    """A causal language model in fp32, on the device, without dropout."""
    return _load(AutoModelForCausalLM, path)


def load_scorer(path: Path, *, pad_id: int, new_head_seed: int | None = None) -> PreTrainedModel:
    """A sequence classifier with one label, in fp32; a missing head is drawn from `new_head_seed`.

    Raises:
        CheckpointError: the model has no head and no seed to draw one is given, or it has several labels.
    """
    config = json.loads((path / "config.json").read_text())
    has_head = any("SequenceClassification" in name for name in config.get("architectures") or [])
    if not has_head and new_head_seed is None:
        raise CheckpointError(
            f"{path}: is no reward model ({config.get('architectures')}). Give a sequence classifier."
        )
    if has_head:
        model = _load(AutoModelForSequenceClassification, path)
    else:
        torch.manual_seed(new_head_seed or 0)
        model = _load(AutoModelForSequenceClassification, path, num_labels=1)
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{path}: the reward model has {model.config.num_labels} labels. Give one with num_labels=1."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors)."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sampling(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float,
    precision: str,
) -> Sampling:
    """How to sample from the model at `path`; a reply ends at the tokenizer's EOS or the generation config's."""
    ends = {tokenizer.eos_token_id}
    file = path / "generation_config.json"
    if file.exists():
        found = json.loads(file.read_text()).get("eos_token_id")
        ends |= set(found if isinstance(found, list) else [found]) - {None}
    return Sampling(
        max_new_tokens, temperature, tuple(sorted(ends)), int(tokenizer.pad_token_id), precision
    )


def response_stats(model: nn.Module, rollout: Rollout, *, temperature: float) -> TokenStats:
    """Log π(y_t | x, y_<t) and the entropy of π(· | x, y_<t), both under `temperature`, in nats."""
    logits = response_logits(model, rollout, temperature=temperature)
    logprobs = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    chosen = logprobs.gather(-1, rollout.response[..., None]).squeeze(-1)
    return TokenStats(
        torch.where(rollout.response_mask, chosen, 0),
        torch.where(rollout.response_mask, entropy, 0),
    )


def response_logits(
    model: nn.Module, rollout: Rollout, *, temperature: float
) -> Float[Tensor, "B R V"]:
    """fp32 logits that chose each response token: those of the position before it."""
    num_response = rollout.response.shape[1]
    output = model(
        input_ids=rollout.tokens,
        attention_mask=rollout.mask.long(),
        position_ids=position_ids(rollout.mask),
        logits_to_keep=num_response + 1,
        use_cache=False,
    )
    return output.logits[:, :-1].float() / temperature


def response_values(critic: nn.Module, rollout: Rollout) -> Float[Tensor, "B R"]:
    """V(x, y_<t): the head on the hidden state before each response token; 0 outside the mask."""
    num_response = rollout.response.shape[1]
    trunk = getattr(critic, str(critic.base_model_prefix))
    hidden = trunk(
        input_ids=rollout.tokens,
        attention_mask=rollout.mask.long(),
        position_ids=position_ids(rollout.mask),
        use_cache=False,
    ).last_hidden_state[:, -num_response - 1 : -1]
    values = critic.get_submodule("score")(hidden).squeeze(-1).float()
    return torch.where(rollout.response_mask, values, 0)


@torch.no_grad()
def sequence_scores(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """The classifier's score of each token sequence, batched by length so that little is padded.

    Pooling is the model's own (the last token that is not its padding token), as it was trained.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        lengths = torch.tensor([len(sequences[i]) for i in chunk])
        width = int(lengths.max())
        tokens = torch.full((len(chunk), width), int(model.config.pad_token_id))
        for row, i in enumerate(chunk):
            tokens[row, : len(sequences[i])] = torch.tensor(sequences[i])
        mask = (torch.arange(width) < lengths[:, None]).long()
        logits = model(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)
        ).logits
        for i, score in zip(chunk, logits.squeeze(-1).float().tolist(), strict=True):
            scores[i] = score
    return scores


def position_ids(mask: Tensor) -> Tensor:
    """Positions that start at 0 on each row's first real token."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _load(factory: Any, path: Path, **kwargs: Any) -> PreTrainedModel:
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        model = factory.from_pretrained(path, dtype=torch.float32, **kwargs).eval().to(device())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{path}: no model can be loaded ({str(error).splitlines()[0]})."
        ) from error
    # transformers would give the padding token's row no gradient, which may be EOS's row; masks do that job here
    model.get_input_embeddings().padding_idx = None
    return model


def _unquantized(config: Any) -> Any:
    """Transformers refuses to save a de-quantized GGUF while its config still says quantized."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
