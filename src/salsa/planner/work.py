"""Tokens and FLOPs of each stage, and the seconds that they take. No torch.

A pass over n tokens takes 2·M·n FLOPs for M elements of weight matrices (Kaplan et al. 2020, section 2.1), 2·V·d for
each logit vector, and 2·l·H·D a layer and token for attention to the l/2 tokens before it. A backward pass takes twice
that, once where only adapters learn; recomputed activations are a pass more.
"""

from dataclasses import dataclass

from salsa.config import RLConfig
from salsa.planner.hardware import Hardware
from salsa.planner.memory import SLOTS, Rank
from salsa.planner.shapes import Shape


@dataclass(frozen=True)
class Work:
    """What a stage has to do, all ranks together."""

    tokens: float = 0.0
    """Read or written, an epoch each time."""
    flops: float = 0.0
    decode_bytes: float = 0.0
    """That a rank's memory moves while it decodes."""
    traffic: float = 0.0
    """Bytes that a rank sends to others."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * value for value in vars(self).values()))

    def seconds(self, hardware: Hardware) -> float:
        """On this hardware: computing and sending overlap, decoding comes on top."""
        assumed, number = hardware.assumed, hardware.count
        computing = self.flops / (number * assumed.tflops * 1e12 * assumed.utilisation)
        bandwidth = assumed.bandwidth * 1e9 * assumed.decode_utilisation
        if hardware.on_cpu:
            bandwidth *= number
        sending = self.traffic / hardware.link if hardware.ranks > 1 else 0.0
        return max(computing, sending) + self.decode_bytes / bandwidth


def forward_flops(shape: Shape, tokens: float, length: float, logits: float) -> float:
    """FLOPs of a pass over `tokens` in rows of `length`, with `logits` logit vectors."""
    attention = 2.0 * shape.layers * shape.heads * shape.head_size * length * tokens
    return 2.0 * shape.matrices * tokens + attention + 2.0 * shape.embedding * logits


def traffic(shape: Shape, rank: Rank, passes: float, *, gathers: int, scatters: bool) -> float:
    """Bytes a rank sends under FSDP2: weights gathered, once each way of a pass; fp32 gradients scattered."""
    others = (rank.world_size - 1) / rank.world_size
    return passes * others * shape.parameters * (gathers * rank.bytes + (4 if scatters else 0))


def sft_work(
    shape: Shape, rows: float, length: float, epochs: float, steps_rows: int, rank: Rank
) -> Work:
    """One SFT model: `rows` of `length` tokens, `steps_rows` of them a pass."""
    tokens = rows * length * epochs
    flops = 3 * forward_flops(shape, tokens, length, tokens)
    passes = max(1, round(rows * epochs / steps_rows))
    return Work(tokens, flops, 0.0, traffic(shape, rank, passes, gathers=2, scatters=True))


def rl_work(
    shape: Shape, config: RLConfig, prompt: float, response: float, references: int,
    reward: Shape | None, rank: Rank,
) -> Work:  # fmt: skip
    """One RL run, from the rollouts to the last update."""
    rows, length = config.rollout_size, prompt + response
    tokens, logits = rows * length, rows * response
    own = forward_flops(shape, tokens, length, logits)
    critic = forward_flops(shape, tokens, length, 0) if config.algorithm == "ppo" else 0.0
    scored = forward_flops(reward, tokens, length, 0) if reward is not None else 0.0
    monitored = own / config.monitor_kl_every
    again = 1 if config.gradient_checkpointing else 0
    learning = (2 if config.lora is not None else 3) + again
    training = config.num_epochs * learning * (own + critic)
    flops = own + (1 + references) * own + critic + scored + monitored + training
    passes = max(1, round(rows * length / config.microbatch_tokens / rank.world_size))
    scoring = (1 + references + bool(critic)) * passes
    steps = config.num_epochs * passes * (2 if critic else 1)
    one = Work(
        tokens * (2 + config.num_epochs),
        flops,
        generation_bytes(shape, rows / rank.world_size, prompt, response, rank),
        traffic(shape, rank, scoring, gathers=1, scatters=False)
        + traffic(shape, rank, steps, gathers=2, scatters=config.lora is None),
    )
    return one * config.num_updates


def generation_work(shape: Shape, rows: float, prompt: float, response: float, rank: Rank) -> Work:
    """Sampling one response to each of `rows` prompts."""
    tokens = rows * (prompt + response)
    flops = forward_flops(shape, tokens, prompt + response, rows * response)
    return Work(
        tokens, flops, generation_bytes(shape, rows / rank.world_size, prompt, response, rank)
    )


def generation_bytes(
    shape: Shape, rows: float, prompt: float, response: float, rank: Rank
) -> float:
    """What a rank reads to decode its rows, SLOTS at once: all weights a step, and every sequence's keys and values."""
    steps = response * max(1.0, rows / SLOTS)
    size = 4 if rank.on_cpu else rank.bytes
    cache = 2.0 * shape.layers * shape.kv_heads * shape.head_size * size * (prompt + response / 2)
    return steps * (shape.parameters * rank.bytes + min(SLOTS, rows) * cache)
