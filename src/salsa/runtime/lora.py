"""A section's `lora:` as peft takes it, and peft's complaint about layers that are not there as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from salsa.errors import ConfigError


def lora_config(config: Any, **others: Any) -> Any:
    """Peft's LoraConfig of `config` (rank, alpha, target_modules), with peft's `others`."""
    import peft

    targets = list(config.target_modules) or "all-linear"
    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, **others)


@contextmanager
def finding_targets(config: Any, section: str) -> Iterator[None]:
    """For a block in which peft looks for the layers of `config`, which may be None.

    Raises:
        ConfigError: it finds none; the message names `section`'s target_modules.
    """
    try:
        yield
    except ValueError as error:
        if config is None or "target module" not in str(error).lower():
            raise
        words = " ".join(str(error).split())
        raise ConfigError(
            f"{section}.lora.target_modules={list(config.target_modules)}: {words} "
            "Name linear layers of this model, e.g. q_proj, or leave it out for all of them."
        ) from error
