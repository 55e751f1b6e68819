"""salsa-rlhf: RLHF whose KL penalty pulls the policy towards a model soup (SALSA, arXiv 2411.01798)."""

import warnings
from importlib import import_module
from typing import Any

_EXPORTS = {
    "Recipe": "salsa.config",
    "RLConfig": "salsa.config",
    "Run": "salsa.run",
    "load_policy": "salsa.models",
    "make_soup": "salsa.soup",
    "run_recipe": "salsa.pipeline",
    "train_rl": "salsa.rl",
}
_RENAMED = {"RLJob": ("salsa.rl", "RLSetup")}
"""Old name → module and new name; to go in 0.3."""

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import on first use: `import salsa` itself stays free of torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _RENAMED:
        module, new = _RENAMED[name]
        message = f"salsa.{name} is now {module}.{new}; the old name goes in 0.3"
        warnings.warn(message, FutureWarning, stacklevel=2)
        return getattr(import_module(module), new)
    raise AttributeError(f"module 'salsa' has no attribute {name!r}")
