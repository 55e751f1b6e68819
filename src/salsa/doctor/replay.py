"""Forward passes that do not share code with training: transformers' own models on right-padded rows, in fp32.

What the loop computed packed, in its own arithmetic and with its own masks is computed here a second way.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Ids = Sequence[int]
BATCH = 16
"""Rows per forward pass."""


@lru_cache(maxsize=4)
def language_model(path: Path) -> Any:
    """A causal language model in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=2)
def classifier(path: Path) -> Any:
    """A sequence classifier in fp32."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def tokenizer_of(path: Path) -> Any:
    """The tokenizer beside a model."""
    return AutoTokenizer.from_pretrained(path)


def forget() -> None:
    """Drop the models in memory: they would lie beside those of whatever trains next."""
    for cached in (language_model, classifier, tokenizer_of):
        cached.cache_clear()


def average(paths: Sequence[Path]) -> Any:
    """A model whose weights are the mean of several, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float32).eval()
    others = [language_model(path).state_dict() for path in paths[1:]]
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                weight.copy_(sum((o[name] for o in others), start=weight.clone()) / len(paths))
    return model.requires_grad_(False)


@torch.no_grad()
def logprobs(
    model: Any, prompts: Sequence[Ids], replies: Sequence[Ids], temperature: float = 1.0
) -> list[np.ndarray]:
    """Log π(y_t | x, y_<t) of every reply token, in nats."""
    found: list[np.ndarray] = []
    for rows, hidden in _hidden(model.base_model, prompts, replies):
        for (prompt, reply), states in zip(rows, hidden, strict=True):
            if not len(reply):
                found.append(np.zeros(0))
                continue
            before = states[len(prompt) - 1 : len(prompt) + len(reply) - 1]
            logits = model.get_output_embeddings()(before).float()
            cap = getattr(model.config, "final_logit_softcapping", None)
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            chosen = (logits / temperature).log_softmax(-1)
            found.append(chosen.gather(-1, torch.tensor(reply)[:, None]).squeeze(-1).numpy())
    return found


@torch.no_grad()
def values(
    model: Any, prompts: Sequence[Ids], replies: Sequence[Ids], *, late: int = 0
) -> list[np.ndarray]:
    """A scalar head on the hidden state before each reply token; with `late`, so many tokens after that."""
    found = []
    for rows, hidden in _hidden(model.base_model, prompts, replies):
        for (prompt, reply), states in zip(rows, hidden, strict=True):
            start = len(prompt) - 1 + late
            found.append(model.score(states[start : start + len(reply)]).squeeze(-1).numpy())
    return found


@torch.no_grad()
def scores(path: Path, conversations: Sequence[tuple[Any, str, str]]) -> np.ndarray:
    """A reward model's score of (messages or None, prompt text, reply) each, through its own chat template.

    Read off at the last token that is not its padding token, as transformers does.
    """
    model, tokenizer = classifier(path), tokenizer_of(path)
    rows = []
    for messages, text, reply in conversations:
        if messages is None:
            rows.append(tokenizer(text + reply + tokenizer.eos_token)["input_ids"])
            continue
        whole = [*messages, {"role": "assistant", "content": reply}]
        shown = tokenizer.apply_chat_template(whole, tokenize=False)
        rows.append(tokenizer(shown, add_special_tokens=False)["input_ids"])
    found = []
    for batch, hidden in _hidden(model.base_model, rows, [()] * len(rows)):
        for (ids, _), states in zip(batch, hidden, strict=True):
            pad = model.config.pad_token_id
            last = max((i for i, token in enumerate(ids) if token != pad), default=0)
            found.append(float(model.score(states[last])))
    return np.array(found)


def _hidden(
    trunk: Any, prompts: Sequence[Ids], replies: Sequence[Ids]
) -> Iterator[tuple[list[tuple[Ids, Ids]], Tensor]]:
    """Rows of a batch and their last hidden states, right-padded."""
    rows = list(zip(prompts, replies, strict=True))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        lengths = [len(prompt) + len(reply) for prompt, reply in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, (prompt, reply) in enumerate(batch):
            ids[number, : lengths[number]] = torch.tensor([*prompt, *reply])
            mask[number, : lengths[number]] = 1
        yield batch, trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def weights_differ(one: Path, other: Path) -> bool | None:
    """Whether any tensor that both directories hold under one name differs; None if they share no name."""
    from safetensors import safe_open

    def tensors(path: Path) -> dict[str, Callable[[], Tensor]]:
        found: dict[str, Callable[[], Tensor]] = {}
        for file in sorted(path.glob("*.safetensors")):
            handle = safe_open(file, framework="pt")
            found |= {name: (lambda n=name, h=handle: h.get_tensor(n)) for name in handle.keys()}  # noqa: SIM118
        return found

    ours, theirs = tensors(one), tensors(other)
    shared = ours.keys() & theirs.keys()
    return (
        any(not torch.equal(ours[n]().float(), theirs[n]().float()) for n in shared)
        if shared
        else None
    )


def nll(found: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(−mean log-probability of the reply's words, −log-probability of its end) of every row."""
    words = np.array([-r[:-1].mean() if len(r) > 1 else -r.mean() for r in found])
    return words, np.array([-r[-1] for r in found])
