"""Reward callables of the tests."""


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """How many letters a response has."""
    return [float(sum(c.isalpha() for c in response)) for response in responses]
