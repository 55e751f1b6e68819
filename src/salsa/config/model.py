"""The recipe's `model:` section."""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from salsa.config.schema import Execution, Input, Strict


class ModelConfig(Strict):
    """The base that SFT starts from."""

    path: Input[str]
    """`embedded`, a directory that save_pretrained wrote, or a hub name such as `HuggingFaceTB/SmolLM2-135M`."""
    revision: Input[str | None] = None
    """Branch, tag or commit of a hub name."""
    gguf_file: str | None = None
    """Name of a GGUF file in `path`; it is de-quantized to fp32."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for a model that has none."""
    precision: Execution[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of forward and backward passes; master weights stay fp32. auto: what is faster here, measured. What it
    resolves to is part of every stage's identity."""

    @field_validator("chat_template")
    @classmethod
    def _template_exists(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_file():
            raise ValueError(f"{value}: no such file. Give the path of a Jinja template")
        return value
