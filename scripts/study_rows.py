"""Rows that the study's sweeps name: `call: "scripts.study_rows:held_out_replies"`, from the repository's root."""

import random

from salsa.demo import sft_replies

TRAINED = 1200
"""`sft.dataset.limit` of the quickstart, whose rows are drawn with the shuffle seed 0."""


def held_out_replies() -> list[dict]:
    """The quickstart's upbeat replies that no SFT model learns from."""
    rows = sft_replies()
    trained = set(random.Random(0).sample(range(len(rows)), TRAINED))
    return [row for number, row in enumerate(rows) if number not in trained]
