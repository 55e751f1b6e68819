"""The schema of a recipe: strict, frozen, torch-free; a file a section."""

from salsa.config.dpo import DPOConfig
from salsa.config.engine import EngineConfig
from salsa.config.evaluation import EvalConfig
from salsa.config.forecast import ForecastConfig
from salsa.config.landscape import LandscapeConfig
from salsa.config.model import ModelConfig
from salsa.config.preferences import PreferencesConfig
from salsa.config.recipe import Recipe
from salsa.config.reward import RewardConfig
from salsa.config.rl import AdaptiveKL, ArmConfig, LoRAConfig, RLConfig, RLSection
from salsa.config.schema import DataSource, RewardFunction, Strict
from salsa.config.sft import SFTConfig
from salsa.config.soup import SoupConfig

__all__ = [
    "AdaptiveKL",
    "ArmConfig",
    "DPOConfig",
    "DataSource",
    "EngineConfig",
    "EvalConfig",
    "ForecastConfig",
    "LandscapeConfig",
    "LoRAConfig",
    "ModelConfig",
    "PreferencesConfig",
    "RLConfig",
    "RLSection",
    "Recipe",
    "RewardConfig",
    "RewardFunction",
    "SFTConfig",
    "SoupConfig",
    "Strict",
]
