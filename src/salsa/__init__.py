"""salsa-rlhf: RLHF whose KL penalty pulls the policy towards a model soup (SALSA, arXiv 2411.01798)."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Recipe": "salsa.config",
    "RLConfig": "salsa.config",
    "make_soup": "salsa.soup",
    "run_recipe": "salsa.pipeline",
    "train_rl": "salsa.rl",
    "RLJob": "salsa.rl",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import on first use: `import salsa` itself stays free of torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'salsa' has no attribute {name!r}")
