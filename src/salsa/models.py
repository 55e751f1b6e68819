"""Load and save models; forward passes reduced to what RL needs: logprobs, values, scores of response positions.

Only what differs is worth computing: rows are packed without padding, a prefix that they share is read once
(`salsa.runtime.packing`), and logits are made for the N real response tokens of a batch, LOGITS_CHUNK at a time.
Log-softmax and everything after it is fp32.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from salsa.config import ModelConfig
from salsa.errors import CheckpointError
from salsa.objectives import categorical_kl
from salsa.runtime.local import device
from salsa.runtime.packing import can_pack, last_hidden, packs_of, take
from salsa.types import Rollout, Sampling

LOGITS_CHUNK = 256
"""Response tokens whose logits are in memory at once; with more, the backward pass makes them again."""


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
    """A causal language model in fp32, on the device, without dropout.

    Raises:
        CheckpointError: it cannot be loaded, or it does more to its logits than `_logits` knows of.
    """
    model = _load(AutoModelForCausalLM, path)
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        hidden = _trunk(model)(input_ids=token, use_cache=False).last_hidden_state[0]
        if not torch.allclose(
            _logits(model, hidden, 1.0), model(token).logits[0], rtol=1e-3, atol=1e-3
        ):
            raise CheckpointError(
                f"{path}: {type(model).__name__} scales its logits in a way that is not known here. "
                "Use a family whose logits are head(hidden state), soft-capped or not."
            )
    return model


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


@torch.no_grad()
def response_stats(model: nn.Module, rollout: Rollout, *, temperature: float) -> TokenStats:
    """Log π(y_t | x, y_<t) and the entropy of π(· | x, y_<t), both under `temperature`, in nats."""
    logprobs, entropy = [], []
    for logits, targets in _logit_chunks(model, rollout, temperature):
        distribution = logits.log_softmax(dim=-1)
        logprobs.append(distribution.gather(-1, targets[:, None]).squeeze(-1))
        entropy.append(-(distribution.exp() * distribution).sum(dim=-1))
    mask = rollout.response_mask
    return TokenStats(unflatten(torch.cat(logprobs), mask), unflatten(torch.cat(entropy), mask))


def response_logprobs(
    model: nn.Module, rollout: Rollout, *, temperature: float
) -> Float[Tensor, "B R"]:
    """Log π(y_t | x, y_<t) under `temperature`, in nats, to be differentiated; 0 outside the mask."""
    hidden, targets = response_hidden(_trunk(model), rollout), _targets(rollout)

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return -cross_entropy(_logits(model, hidden, temperature), targets, reduction="none")

    pieces = list(zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True))
    if len(pieces) == 1:
        return unflatten(chunk(hidden, targets), rollout.response_mask)
    parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return unflatten(torch.cat(parts), rollout.response_mask)


@torch.no_grad()
def response_kl(
    policy: nn.Module, other: nn.Module, rollout: Rollout, *, temperature: float
) -> Float[Tensor, "B R"]:
    """Exact KL(policy ‖ other) of each next-token distribution, in nats; 0 outside the mask."""
    chunks = zip(
        _logit_chunks(policy, rollout, temperature),
        _logit_chunks(other, rollout, temperature),
        strict=True,
    )
    parts = [categorical_kl(own, theirs) for (own, _), (theirs, _) in chunks]
    return unflatten(torch.cat(parts), rollout.response_mask)


def response_values(critic: nn.Module, rollout: Rollout) -> Float[Tensor, "B R"]:
    """V(x, y_<t): the head, in fp32, on the hidden state before each response token; 0 outside the mask."""
    hidden = response_hidden(_trunk(critic), rollout)
    return unflatten(_scores(critic, hidden), rollout.response_mask)


def response_hidden(trunk: nn.Module, rollout: Rollout) -> Float[Tensor, "N d"]:
    """The last hidden state before each of the N real response tokens, row after row."""
    hidden, paths = last_hidden(trunk, rollout.rows)
    rows, steps = rollout.response_mask.nonzero(as_tuple=True)
    return take(hidden, paths[rows, rollout.prompt_mask.sum(dim=1)[rows] + steps - 1])


def unflatten(flat: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Put one number per real response token where it belongs, 0 elsewhere."""
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat.float())


@torch.no_grad()
def sequence_scores(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], max_tokens: int
) -> list[float]:
    """The classifier's score of each token sequence, `max_tokens` distinct ones at once.

    Read off where the model was trained to be read off: at the last token that is not its padding token.
    """
    pad_id = int(model.config.pad_token_id)
    scores = [0.0] * len(sequences)
    for pack in packs_of(sequences, max_tokens):
        hidden, paths = last_hidden(_trunk(model), [sequences[row] for row in pack])
        last = [
            max((i for i, token in enumerate(sequences[row]) if token != pad_id), default=0)
            for row in pack
        ]
        found = _scores(model, hidden[paths[range(len(pack)), last]])
        for row, score in zip(pack, found.tolist(), strict=True):
            scores[row] = score
    return scores


def _trunk(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, str(model.base_model_prefix))


def _scores(model: nn.Module, hidden: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """A scalar head in fp32: bf16 would leave a score three digits."""
    weight = model.get_parameter("score.weight")
    return linear(hidden.float(), weight.float()).squeeze(-1)


def _logits(model: Any, hidden: Float[Tensor, "N d"], temperature: float) -> Tensor:
    """fp32 logits [N, V] of hidden states, as the model's own forward pass makes them, under `temperature`."""
    logits = model.get_output_embeddings()(hidden).float()
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.div_(temperature)


def _logit_chunks(
    model: nn.Module, rollout: Rollout, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [n, V], chosen tokens [n]) of the response tokens, a few at a time."""
    hidden = response_hidden(_trunk(model), rollout)
    for states, targets in zip(
        hidden.split(LOGITS_CHUNK), _targets(rollout).split(LOGITS_CHUNK), strict=True
    ):
        yield _logits(model, states, temperature), targets


def _targets(rollout: Rollout) -> Int[Tensor, " N"]:
    return rollout.response[rollout.response_mask]


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
    trunk = _trunk(model)
    trunk.packs_rows = can_pack(trunk)  # type: ignore[assignment]
    return model


def _unquantized(config: Any) -> Any:
    """Transformers refuses to save a de-quantized GGUF while its config still says quantized."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
