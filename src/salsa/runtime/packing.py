"""Forward passes without padding, in which no prefix is computed twice: rows of tokens as one sequence, a trie.

    rows      a b c d e       N tokens      a b c d e f g h
              a b c f         positions     0 1 2 3 4 3 4 3
              a b c f g       paths         0 1 2 3 4 · 0 1 2 5 · 0 1 2 5 6 · 0 1 2 7
              a b c h

A chat template's opening, a prompt that several responses share, a response that is another's beginning: each is one
path in the trie, read once, and its gradient is the sum over the rows that go through it. Every layer but attention
works on the N tokens as they are; attention alone goes back to rows (`packed_attention`), through the interface that
transformers offers for that. A model that cannot be run so is run on padded rows, to the same result.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from salsa.errors import CheckpointError

SHORT = 2**22
"""Attention scores of a layer up to which they are made at once: faster on a CPU than torch's masked kernel."""


class Memory(Protocol):
    """What wants to keep keys and values, e.g. a generator."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A layer's keys and values of all rows, each [B, K, T, D]; behind a row's end lies anything finite."""


@dataclass(frozen=True)
class Packing:
    """B rows as N tokens. Q is the most tokens that a row adds to the trie, T the longest row."""

    tokens: Int[Tensor, "1 N"]
    positions: Int[Tensor, "1 N"]
    paths: Int[Tensor, "B T"]
    """Where each row's tokens are among the N; 0 behind its end."""
    added: Int[Tensor, "B Q"]
    """Where the tokens are that the row adds; 0 behind them."""
    place: Int[Tensor, " N"]
    """Where each of the N tokens is in `added`, flattened."""
    visible: Bool[Tensor, "B 1 Q T"]
    """Whether an added token sees a token of its path."""


def pack(rows: Sequence[Sequence[int]], device: torch.device) -> Packing:
    """The trie of `rows`, none empty."""
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[Tensor] = [torch.empty(0)] * len(rows)
    added: list[Tensor] = [torch.empty(0)] * len(rows)
    owners: list[int] = []
    path: list[int] = []
    for number, new in zip(*_in_order(rows), strict=True):
        row, start = rows[number], len(tokens)
        shared = len(row) - new
        tokens += row[shared:]
        positions += range(shared, len(row))
        owners += [number] * new
        path = path[:shared] + list(range(start, len(tokens)))
        paths[number], added[number] = torch.tensor(path), torch.arange(start, len(tokens))
    position, owner = torch.tensor(positions), torch.tensor(owners)
    first = torch.tensor([int(own[0]) if len(own) else 0 for own in added])
    padded = pad_sequence(added, batch_first=True)
    place = owner * padded.shape[1] + torch.arange(len(tokens)) - first[owner]
    path_of = pad_sequence(paths, batch_first=True)
    visible = position[padded][:, None, :, None] >= torch.arange(path_of.shape[1])
    return Packing(
        torch.tensor([tokens]).to(device),
        position[None].to(device),
        path_of.to(device),
        padded.to(device),
        place.to(device),
        visible.to(device),
    )


def packs_of(rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Row numbers in packs of at most `max_tokens` distinct tokens: as few as fit, as even as that allows.

    Rows that begin alike stay together. A row that is longer than the budget is a pack of its own. Which rows meet
    depends on the tokens only, so it is the same for every model that sees them.
    """
    order, new = _in_order(rows)
    lengths = [len(rows[row]) for row in order]
    fewest = len(_cut(lengths, new, max_tokens))
    enough = bisect_left(
        range(max_tokens), True, key=lambda size: len(_cut(lengths, new, size)) <= fewest
    )
    return [[order[place] for place in pack] for pack in _cut(lengths, new, enough)]


def num_distinct(rows: Sequence[Sequence[int]]) -> int:
    """N, the tokens of the trie of `rows`."""
    return sum(_in_order(rows)[1])


def last_hidden(
    trunk: nn.Module, rows: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "N d"], Int[Tensor, "B T"]]:
    """The last hidden states of all tokens, and where each row's are among them; see `take`."""
    here = next(trunk.parameters()).device
    if not packs_rows(trunk):
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(here)
        hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), torch.arange(tokens.numel(), device=here).view(tokens.shape)
    packing = pack(rows, here)
    with attending_by("salsa_packed", trunk):
        hidden = trunk(**arguments(packing), use_cache=False).last_hidden_state
    return hidden[0], packing.paths


def packs_rows(model: nn.Module) -> bool:
    """What `can_pack` found when the model was loaded; most can."""
    return getattr(getattr(model, str(model.base_model_prefix), model), "packs_rows", True)


def can_pack(trunk: nn.Module) -> bool:
    """Whether packed rows give the trunk's own states of padded rows, tried on four; and its layers tell their windows.

    Four short rows would not show a limit that reaches further back, e.g. attention in chunks.
    """
    rows = [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1], [6, 7, 8, 9, 10, 11]]
    packing, windows = pack(rows, next(trunk.parameters()).device), []  # type: ignore[var-annotated]
    with torch.no_grad():
        trunk.packs_rows = False  # type: ignore[assignment]
        plain, where = last_hidden(trunk, rows)
        trunk.packs_rows = True  # type: ignore[assignment]
        try:
            with attending_by("salsa_packed", trunk):
                packed = trunk(**arguments(packing), windows=windows, use_cache=False)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False
    config: Any = trunk.config
    by_default = (
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    )
    kinds = getattr(config, "layer_types", None) or [by_default] * len(windows)
    told = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return told == list(kinds) and all(
        torch.allclose(
            plain[where[i, : len(row)]],
            packed.last_hidden_state[0, packing.paths[i, : len(row)]],
            rtol=1e-3,
            atol=1e-3,
        )
        for i, row in enumerate(rows)
    )


def arguments(packing: Packing) -> dict[str, Any]:
    """What a model of transformers is called with; a mask of four dimensions is passed on as it is."""
    return {
        "input_ids": packing.tokens,
        "position_ids": packing.positions,
        "attention_mask": packing.visible,
        "packing": packing,
    }


def attending_by(attention: str, model: Any) -> AbstractContextManager[None]:
    """Inside, the model's attention is the one that is registered under that name."""
    return _attending(model.config.get_text_config(), attention)


@contextmanager
def _attending(config: Any, attention: str) -> Iterator[None]:
    usual = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextmanager
def recomputing(*models: Any) -> Iterator[None]:
    """Inside, layers keep nothing but their input for the backward pass and compute the rest again (Chen et al. 2016).

    The same bits, less memory, a forward pass more.

    Raises:
        CheckpointError: a model has no layers that transformers marks for this.
    """
    layers: dict[nn.Module, Any] = {}
    for model in models:
        found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not found:
            raise CheckpointError(
                f"{type(model).__name__} has no layers that can be recomputed. Remove rl.gradient_checkpointing."
            )
        layers |= {layer: partial(_as_now, model.config.get_text_config()) for layer in found}
    for layer, contexts in layers.items():
        layer.forward = partial(  # type: ignore[method-assign]
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=contexts,
        )  # fmt: skip
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _as_now(config: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's forward pass and of its repetition, which attends as the first did."""
    return nullcontext(), _attending(config, config._attn_implementation)


def take(flat: Float[Tensor, "N d"], index: Int[Tensor, "*I"]) -> Float[Tensor, "*I d"]:
    """`flat[index]`; gradients of rows that are taken several times are summed in fp32, in a fixed order."""
    return _Take.apply(flat, index)  # type: ignore[no-untyped-call]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(flat)
        return flat[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, gradients
        summed = torch.ops.aten.embedding_dense_backward(
            gradient.float(), index, ctx.size, -1, False
        )
        return summed.to(gradient.dtype), None


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    memory: Memory | None = None,
    windows: list[int | None] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N H D"], None]:
    """Attention of each row's added tokens to the row's path; K key heads serve H query heads in groups."""
    keys, values = (_rows(x, packing.paths) for x in (key, value))  # (B, K, T, D)
    if windows is not None:
        windows.append(sliding_window)
    if memory is not None:
        memory.write(module.layer_idx, keys, values)  # type: ignore[arg-type]
    queries = _rows(query, packing.added)  # (B, H, Q, D)
    visible = within(sliding_window, packing.visible, packing.positions[0][packing.added])
    attended = attend(queries, keys, values, visible, scaling, softcap)  # (B, H, Q, D)
    flat = attended.transpose(1, 2).flatten(0, 1).flatten(1)
    return take(flat, packing.place).view(1, *query.shape[2:0:-1], -1), None


AttentionInterface.register("salsa_packed", packed_attention)


def _rows(heads: Float[Tensor, "1 H N D"], index: Int[Tensor, "B L"]) -> Float[Tensor, "B H L D"]:
    flat = heads[0].transpose(0, 1).flatten(1)
    return take(flat, index).unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)


def within(
    window: int | None, visible: Bool[Tensor, "B 1 Q T"], positions: Int[Tensor, "B Q"]
) -> Bool[Tensor, "B 1 Q T"]:
    """What is visible of the last `window` tokens, for queries at these positions."""
    if window is None:
        return visible
    ago = positions[:, None, :, None] - torch.arange(visible.shape[-1], device=visible.device)
    return visible & (ago < window)


def attend(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K T D"],
    values: Float[Tensor, "B K T D"],
    visible: Bool[Tensor, "B 1 Q T"],
    scaling: float | None,
    softcap: float | None,
) -> Float[Tensor, "B H Q D"]:
    """Scaled dot-product attention of grouped heads; up to SHORT scores by plain matrix products."""
    heads, groups = keys.shape[1], queries.shape[1] // keys.shape[1]
    if softcap is None and visible.numel() * queries.shape[1] > SHORT:
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scaling)
    scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = (queries * scaling).unflatten(1, (heads, groups)).flatten(2, 3)  # (B, K, G·Q, D)
    scores = (grouped @ keys.mT).unflatten(2, (groups, -1))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = torch.zeros(visible.shape, dtype=scores.dtype, device=scores.device)
    hidden.masked_fill_(~visible, torch.finfo(scores.dtype).min / 2)
    scores += hidden[:, :, None]  # in place, its gradient is free: a layer's largest tensor
    weights = scores.softmax(dim=-1)
    return (weights.flatten(2, 3) @ values).unflatten(2, (groups, -1)).flatten(1, 2)


def _in_order(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(Row numbers such that rows that begin alike are neighbours, how many tokens each adds to those before it)."""
    order = sorted(range(len(rows)), key=lambda row: tuple(rows[row]))
    ordered: list[Sequence[int]] = [rows[row] for row in order]
    new = [len(row) - _shared(before, row) for before, row in pairwise([(), *ordered])]
    return order, new


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their start."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def _cut(lengths: Sequence[int], new: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill pack after pack; a row costs what is new in it, the first of a pack all of it."""
    packs: list[list[int]] = []
    tokens = 0
    for place, (length, added) in enumerate(zip(lengths, new, strict=True)):
        if packs and tokens + added <= max_tokens:
            packs[-1].append(place)
            tokens += added
        else:
            packs.append([place])
            tokens = length
    return packs
