"""The model card beside a checkpoint: where it comes from, in words that the hub shows. No digest covers it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa.artifacts import write_atomic

CARD = """---
library_name: transformers
tags: [{tags}]
---
# {stage}

Made by [salsa-rlhf](https://arxiv.org/abs/2411.01798) {version} on {started}: {what}.

```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

## Provenance

| | |
|---|---|
| weights (sha256 of the files) | `{output}` |
| stage | `{digest}` |
| computed in | {precision} |
{inputs}

Inputs are digests: equal ones are equal bytes. The run directory's `stages/*/stage.json` have them as `output`, and
`salsa run` with the same recipe makes these weights again.

## Settings

```json
{settings}
```

Versions: {versions}.

Nothing here says what the model is fit for. Licence and limits are those of the base model and of the data.
"""
WHAT = {
    "sft": "supervised fine-tuning",
    "reward": "a reward model, trained on preference pairs",
    "rl": "a policy, trained with a KL penalty",
    "soup": "a weight average of the models below",
    "base": "the base model as an ordinary checkpoint",
}

_UNTRAINED = {"base": "fp32: read, de-quantized if it was GGUF, and written"}
"""How what needs no engine is made, where that is no soup."""


def write_card(directory: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` into a finished stage's directory if it is a model's and has none.

    `record` is the content of its `stage.json`.
    """
    config = directory / "config.json"
    if not config.is_file() or (directory / "README.md").exists():
        return
    scores = "ForSequenceClassification" in config.read_text(encoding="utf-8")
    label = record["stage"]
    stem = next((word for word in WHAT if label.startswith(word)), "soup")
    if stem == "reward" and "ingredient 0" in record["inputs"]:
        stem = "soup"
    inputs = [f"| {name} | `{digest}` |" for name, digest in record["inputs"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = CARD.format(
        tags=", ".join(["salsa-rlhf", "rlhf", {"rl": "policy"}.get(stem, stem)]),
        stage=label,
        version=record["versions"]["salsa-rlhf"],
        started=record["started"],
        what=WHAT[stem],
        kind="AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM",
        place=directory.name.removesuffix(".partial"),
        output=record["output"],
        digest=record["digest"],
        precision=record.get("precision", _UNTRAINED.get(stem, "float64 sums, without torch")),
        inputs="\n".join(inputs),
        settings=json.dumps(record["config"], indent=1, default=str),
        versions=versions,
    )
    write_atomic(directory / "README.md", text)
