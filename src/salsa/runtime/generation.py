"""Sample responses: one prefill, then a token at a time with the cache; fp32 logits; masks from lengths."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Sample from softmax(logits / temperature) until EOS or `max_new_tokens`.

    Returns:
        Response tokens, `pad_id` after the end, and the mask of real ones, EOS included. R is the longest response.
    """
    ends = torch.tensor(list(eos_ids), device=prompt.device)
    mask = prompt_mask.long()
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alive = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    tokens, masks = [], []
    inputs, cache = prompt, None
    for _ in range(max_new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        probabilities = (output.logits[:, -1].float() / temperature).softmax(dim=-1)
        token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        tokens.append(torch.where(alive, token, pad_id))
        masks.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if not alive.any():
            break
        inputs = tokens[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = position[:, -1:] + 1
    return torch.stack(tokens, dim=1), torch.stack(masks, dim=1)
