"""Data and rewards with a fault in them, for recipes: `call: "tests.faults.inputs:…"`."""

from salsa import demo

TEMPLATE = "<|bos|>{}<|assistant|>"


def sft_rendered() -> list[dict]:
    """SFT rows whose prompts went through the chat template before: it will be applied again."""
    return [
        row | {"prompt": [{"role": "user", "content": _rendered(row["prompt"])}]}
        for row in demo.sft_replies()
    ]


def few_prompts() -> list[dict]:
    """RL prompts: 30 different ones, 40 times each."""
    return [row for row in demo.rl_prompts()[:30] for _ in range(40)]


def opposite(prompts, responses) -> list[float]:
    """A reward that wants the opposite of gold."""
    return [-score for score in demo.gold(prompts, responses)]


def _rendered(messages: list[dict]) -> str:
    return TEMPLATE.format("".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages))
