"""Model objects: loading, precision, forward passes, heads and adapters in one place."""

from salsa.models.language import LanguageModel
from salsa.models.loading import (
    check_reward_model,
    check_vocabulary,
    load_classifier,
    load_policy,
    load_tokenizer,
    prepare_base,
    same_vocabulary,
    sampling_for,
    save_checkpoint,
)
from salsa.models.scalar import RewardModel, ValueModel

__all__ = [
    "LanguageModel",
    "RewardModel",
    "ValueModel",
    "check_reward_model",
    "check_vocabulary",
    "load_classifier",
    "load_policy",
    "load_tokenizer",
    "prepare_base",
    "same_vocabulary",
    "sampling_for",
    "save_checkpoint",
]
