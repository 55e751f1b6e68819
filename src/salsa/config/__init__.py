"""The schema of a recipe: strict, frozen, torch-free; a file a section."""

from salsa.config.dpo import DPOConfig as DPOConfig
from salsa.config.engine import EngineConfig as EngineConfig
from salsa.config.engine import SlurmConfig as SlurmConfig
from salsa.config.evaluation import EvalConfig as EvalConfig
from salsa.config.forecast import ForecastConfig as ForecastConfig
from salsa.config.landscape import LandscapeConfig as LandscapeConfig
from salsa.config.lora import LoRAConfig as LoRAConfig
from salsa.config.model import ModelConfig as ModelConfig
from salsa.config.preferences import PreferencesConfig as PreferencesConfig
from salsa.config.recipe import Recipe as Recipe
from salsa.config.reward import RewardConfig as RewardConfig
from salsa.config.rl import AdaptiveKL as AdaptiveKL
from salsa.config.rl import ArmConfig as ArmConfig
from salsa.config.rl import RLConfig as RLConfig
from salsa.config.rl import RLSection as RLSection
from salsa.config.rl import Select as Select
from salsa.config.rl import Stop as Stop
from salsa.config.rl import VLLMConfig as VLLMConfig
from salsa.config.schema import DataSource as DataSource
from salsa.config.schema import RewardFunction as RewardFunction
from salsa.config.schema import Strict as Strict
from salsa.config.sft import SFTConfig as SFTConfig
from salsa.config.soup import SoupConfig as SoupConfig
