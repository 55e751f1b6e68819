"""Forward passes without padding, in which no prefix is computed twice: rows of tokens as one sequence, a trie.

    rows      a b c d e       N tokens      a b c d e f g h
              a b c f         positions     0 1 2 3 4 3 4 3
              a b c f g       paths         0 1 2 3 4 · 0 1 2 5 · 0 1 2 5 6 · 0 1 2 7
              a b c h

A chat template's opening, a prompt that several responses share, a response that is another's beginning: each is one
path in the trie, read once, and its gradient is the sum over the rows that go through it. Every layer but attention
works on the N tokens as they are; attention alone goes back to rows (`_attention`), through the interface that
transformers offers for that. A model that cannot be run so is run on padded rows, to the same result. While sequences
are generated, their keys and values are kept in a `KVCache`, and attention goes to that instead.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "salsa"
"""Name under which transformers finds this attention."""
SHORT = 2**22
"""Attention scores of a layer up to which they are made at once: faster on a CPU than torch's masked kernel."""
SPARE_COLUMNS = 64
"""Tokens for which a slot of the cache has room beyond what it needs, when it is made."""


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
    owners: list[int] = []
    steps: list[int] = []
    paths, added = ([torch.empty(0)] * len(rows) for _ in range(2))
    path: list[int] = []
    for number, new in zip(*_in_order(rows), strict=True):
        start, shared = len(tokens), len(rows[number]) - new
        tokens += rows[number][shared:]
        positions += range(shared, shared + new)
        owners += [number] * new
        steps += range(new)
        path = path[:shared] + list(range(start, start + new))
        paths[number], added[number] = torch.tensor(path), torch.arange(start, start + new)
    position, padded = torch.tensor(positions), pad_sequence(added, batch_first=True)
    place = torch.tensor(owners) * padded.shape[1] + torch.tensor(steps)
    path_of = pad_sequence(paths, batch_first=True)
    visible = position[padded][:, None, :, None] >= torch.arange(path_of.shape[1])
    fields = torch.tensor([tokens]), position[None], path_of, padded, place, visible
    return Packing(*(field.to(device) for field in fields))


def packs_of(rows: Sequence[Sequence[int]], max_tokens: int, processes: int = 1) -> list[list[int]]:
    """Row numbers in packs of at most `max_tokens` distinct tokens: as few as fit, as even as that allows.

    For several processes as many more as it takes to give each the same number.

    Rows that begin alike stay together. A row that is longer than the budget is a pack of its own. Which rows meet
    depends on the tokens only, so it is the same for every model that sees them.
    """
    order, new = _in_order(rows)
    lengths = [len(rows[row]) for row in order]
    num_packs = lambda size: len(_cut(lengths, new, size))
    fewest = -(-num_packs(max_tokens) // processes) * processes
    enough = bisect_left(range(max_tokens), True, key=lambda size: num_packs(size) <= fewest)
    return [[order[place] for place in pack] for pack in _cut(lengths, new, enough)]


def num_distinct(rows: Sequence[Sequence[int]]) -> int:
    """N, the tokens of the trie of `rows`."""
    return sum(_in_order(rows)[1])


def arguments(packing: Packing) -> dict[str, Any]:
    """What a model of transformers is called with; a mask of four dimensions is passed on as it is."""
    return {
        "input_ids": packing.tokens,
        "position_ids": packing.positions,
        "attention_mask": packing.visible,
        "packing": packing,
    }


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


class KVCache:
    """The sequences being decoded: row numbers, lengths, and in every layer a slot each for keys and values."""

    def __init__(self, model: Any, slots: int) -> None:
        """Room for `slots` sequences of a `LanguageModel` that packs."""
        self.model, self.slots = model, slots
        here = model.engine.device
        self.rows = torch.empty(0, dtype=torch.long, device=here)
        """Which response each sequence is."""
        self.lengths = torch.empty(0, dtype=torch.long, device=here)
        """Tokens of each sequence that are in its slot."""
        self.longest = 0
        """Columns in use."""
        self.stores: dict[tuple[int, str], Tensor] = {}
        """Keys and values of each layer, (slots, heads, columns, size).

        They are fp32 on a CPU: its bf16 products copy what is not contiguous.
        """

    def prefill(
        self, rows: Int[Tensor, " new"], prompts: Sequence[Sequence[int]]
    ) -> Float[Tensor, "new V"]:
        """Give prompts a slot each; the logits of their first response tokens."""
        packing = pack(prompts, rows.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
        last = packing.paths.gather(1, lengths[:, None] - 1).squeeze(1)
        self.longest = max(self.longest, packing.paths.shape[1])
        logits = self.model.next_logits(last, cache=self, **arguments(packing))
        self.rows = torch.cat([self.rows, rows])
        self.lengths = torch.cat([self.lengths, lengths])
        return logits

    def decode(self, token: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences V"]:
        """Append a token to each sequence; the logits of the next."""
        self.longest = int(self.lengths.max()) + 1
        every = torch.arange(len(token), device=token.device)
        visible = torch.arange(self.longest, device=token.device) <= self.lengths[:, None]
        mask = visible[:, None, None]  # (sequences, 1, 1, columns)
        inputs = {"input_ids": token[None], "position_ids": self.lengths[None]}
        logits = self.model.next_logits(every, **inputs, attention_mask=mask, cache=self)
        self.lengths = self.lengths + 1
        return logits

    def keep(self, which: Bool[Tensor, " sequences"]) -> Int[Tensor, " kept"]:
        """Drop the other sequences and fill their slots from the end; where each of the kept ones was before."""
        count = int(which.sum())
        if count == len(which):
            return torch.arange(count, device=which.device)
        holes = (~which[:count]).nonzero().squeeze(1)
        movers = which[count:].nonzero().squeeze(1) + count
        order = torch.arange(count, device=which.device)
        order[holes] = movers
        for slots in self.stores.values():
            slots[holes, :, : self.longest] = slots[movers, :, : self.longest]
        self.rows, self.lengths = self.rows[order], self.lengths[order]
        return order

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Prefill of one layer: keys and values of the new sequences, each (new, heads, columns, size)."""
        slots = slice(len(self.rows), len(self.rows) + len(keys))
        for name, new in (("keys", keys), ("values", values)):
            self._with_room((layer, name), new)[slots, :, : new.shape[2]] = new

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:
        """Decode of one layer: a new token attends to its sequence, (1, heads, rows, size) → (1, rows, heads, size)."""
        rows = torch.arange(len(self.rows), device=query.device)
        used: list[Any] = []
        for name, new in (("keys", key), ("values", value)):
            slots = self._with_room((layer, name), new)
            slots[rows, :, self.lengths] = new[0].transpose(0, 1).to(slots.dtype)
            used.append(slots[: len(rows), :, : self.longest])
        attended = attend(query.transpose(0, 2).to(used[0].dtype), *used, *given)
        return attended[:, :, 0][None].to(query.dtype)

    def _with_room(self, place: tuple[int, str], like: Tensor) -> Tensor:
        """A layer's keys or values, with room for `longest` columns; what is not written yet is 0."""
        store = self.stores.get(place)
        if store is None:
            shape = (self.slots, like.shape[1], self.longest + SPARE_COLUMNS, like.shape[3])
            dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            store = self.stores[place] = torch.zeros(shape, dtype=dtype, device=like.device)
        elif (columns := store.shape[2]) < self.longest:
            more = max(columns, self.longest - columns)
            store = self.stores[place] = pad(store, (0, 0, 0, more))
        return store


def _attention(
    module: Any,
    query: Float[Tensor, "A H N D"],
    key: Float[Tensor, "A K N D"],
    value: Float[Tensor, "A K N D"],
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    cache: KVCache | None = None,
    windows: list[int | None] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "A N H D"], None]:
    """Attention as transformers calls it: of packed rows, of one new token a sequence (decode), or as torch does it.

    K key heads serve H query heads in groups. Packed: each row's added tokens attend to the row's path.
    """
    if packing is None and cache is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **others
            )
        if attention_mask is None:
            square = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            attention_mask = square.tril(key.shape[2] - query.shape[2])[None, None]
        attended = attend(query, key, value, attention_mask, scaling, softcap)
        return attended.transpose(1, 2), None
    if packing is None:
        assert cache is not None and attention_mask is not None
        visible = within(sliding_window, attention_mask, cache.lengths[:, None])
        given = key, value, visible, scaling, softcap
        return cache.attend(module.layer_idx, query, *given), None
    keys, values = (_rows(x, packing.paths) for x in (key, value))  # (B, K, T, D)
    if windows is not None:
        windows.append(sliding_window)
    if cache is not None:
        cache.write(module.layer_idx, keys, values)
    queries = _rows(query, packing.added)  # (B, H, Q, D)
    visible = within(sliding_window, packing.visible, packing.positions[0][packing.added])
    attended = attend(queries, keys, values, visible, scaling, softcap)  # (B, H, Q, D)
    flat = attended.transpose(1, 2).flatten(0, 1).flatten(1)
    return take(flat, packing.place).view(1, *query.shape[2:0:-1], -1), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
    new = []
    for before, row in pairwise([(), *(rows[number] for number in order)]):
        pairs = enumerate(zip(before, row, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(row)))
        new.append(len(row) - shared)
    return order, new


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
