"""`lora:` of the sections `sft:`, `reward:` and `rl:`."""

from salsa.config.schema import Count, Strict


class LoRAConfig(Strict):
    """Low-rank adapters on a frozen base (in RL one that policy and critic share); checkpoints have them merged."""

    rank: Count = 16
    """r of ΔW = (alpha / r)·B·A."""
    alpha: Count = 32
    """Scale of the adapters."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get one; every one but the output head if not given."""
