"""Sample responses: one prefill, then a token at a time with the cache; rows that have ended are dropped.

Logits are fp32, masks come from lengths.
"""

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
    responses = torch.full((len(prompt), max_new_tokens), pad_id, device=prompt.device)
    lengths = torch.zeros(len(prompt), dtype=torch.long, device=prompt.device)
    rows = torch.arange(len(prompt), device=prompt.device)  # those that still speak
    mask = prompt_mask.long()
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs, cache = prompt, None
    for step in range(max_new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        probabilities = (output.logits[:, -1].float() / temperature).softmax(dim=-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
        responses[rows, step] = token.squeeze(1)
        lengths[rows] += 1
        speaking = ~torch.isin(token.squeeze(1), ends)
        if not speaking.any():
            break
        cache, inputs, position = output.past_key_values, token, position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if not speaking.all():
            cache.batch_select_indices(speaking.nonzero().squeeze(1))
            rows, inputs = rows[speaking], inputs[speaking]
            position, mask = position[speaking], mask[speaking]
    responses = responses[:, : int(lengths.max())]
    return responses, torch.arange(responses.shape[1], device=prompt.device) < lengths[:, None]
