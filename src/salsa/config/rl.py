"""The recipe's `rl:` section: settings of the loop, and the arms that are compared.

A key that would change nothing, or two keys that contradict each other, are errors.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from salsa.config.dpo import DPOConfig
from salsa.config.expressions import Model, ReferenceRule, parse_reference
from salsa.config.lora import LoRAConfig
from salsa.config.schema import (
    MAPPING,
    WORD,
    Added,
    Count,
    DataSource,
    Execution,
    Fraction,
    Input,
    ModelText,
    NonNegative,
    Positive,
    Seeds,
    Strict,
    explain,
)

_CRITIC_ONLY = (
    "critic", "critic_learning_rate", "critic_warmup", "vf_coef", "gamma", "gae_lambda",
    "value_clip_range",
)  # fmt: skip


class ArmConfig(Strict):
    """One way of training: `init` and `reference`, which must both be given, and settings of its own.

    Every other key of an arm overrides the setting of that name in `rl:` (`kl_coef: 0.3`); with `method: dpo` the other
    keys are DPO's (`salsa.config.dpo`).
    """

    model_config = ConfigDict(extra="allow")

    init: ModelText
    """Where the policy starts: a model (`salsa.config.expressions`), e.g. sft[0], soup, base, a path."""
    reference: str
    """What the KL pulls towards: a model (plain PPO: sft[0]; SALSA: soup), mixture(…), ema(…), reset(…) or none."""
    method: Literal["rl", "dpo"] = "rl"
    """`rl`: as `rl:` says. `dpo`: direct preference optimisation on the recipe's preferences."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            kind = DPOConfig if values.get("method") == "dpo" else RLConfig
            known = [*cls.model_fields, *kind.model_fields]
            for key in (key for key in values if key not in known):
                raise PydanticCustomError("unknown_key", "{key}", {"key": key, "known": known})
        return values

    @model_validator(mode="after")
    def _parses(self) -> Self:
        rule = self.rule
        if self.method == "dpo" and (len(rule.models) > 1 or rule.moves or not rule.pulls):
            raise ValueError(
                f"reference={self.reference!r}: DPO needs one model that stands still, e.g. soup or sft[0]"
            )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The other keys of the arm, as they were written."""
        return self.model_extra or {}

    @property
    def rule(self) -> ReferenceRule[Model]:
        """The reference, parsed."""
        return parse_reference(self.reference, self.init)


class AdaptiveKL(Strict):
    """β follows the measured KL to a target (Ziegler et al. 2019, section 2.2)."""

    target: Positive
    """The KL to own reference to hold, in nats per response."""
    horizon: Count = 10_000
    """Episodes over which β may change by a factor of about e^0.2."""


class Select(Strict):
    """Which checkpoint's policy the run returns: the best by a metric, within a KL budget if one is given."""

    metric: str = "reward"
    """`reward` (the score minus penalties, what `best` goes by), `score`, or a name under `eval.scores` or
    `eval.reward_models`, which nothing is trained on; its mean over the rollouts since the checkpoint before."""
    kl: Positive | None = None
    """Only among checkpoints whose KL to own reference, in their last rollout, is at most this; nats per response."""


class Stop(Strict):
    """When a run ends before `num_updates`."""

    kl: Positive | None = None
    """After the first update whose rollout has a KL to own reference above this; nats per response."""
    patience: Count | None = None
    """After this many checkpoints in a row that are not better, by what `select` goes by, than the best before."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.kl is None and self.patience is None:
            raise ValueError("give kl, patience or both")
        return self


class VLLMConfig(Strict):
    """A vLLM server that samples the rollouts (docs/how-to/vllm.md). Experimental: not run against a real one yet."""

    url: Execution[Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")]]
    """Where it listens, e.g. http://localhost:8000; one server serves one run at a time."""
    transfer: Execution[Literal["nccl", "ipc"]] = "nccl"
    """How weights reach it: broadcast to GPUs of its own, or handed over on the GPU that both share."""
    timeout: Execution[Positive] = 600.0
    """Seconds that a call to the server, or a whole push of the weights, may take."""
    verify: Execution[bool] = True
    """After every push compare sha256 of the server's weights with the policy's; both are copied to the CPU for it."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """C of the importance weights that correct the server's numerics (`objectives.importance_weights`)."""


class RLConfig(Strict):
    """Policy optimization with a KL penalty towards the arm's reference."""

    kl_coef: NonNegative
    """β, the weight of the KL penalty; no default, since peers' defaults span 0 to 0.05."""
    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    """How advantages are estimated: GAE with a critic, against the rest of the group, or scaled within the group."""
    num_updates: Count = 50
    """Rollouts, each followed by num_epochs passes over it."""
    rollout_size: Count = 32
    """Episodes per update."""
    group_size: Count = 1
    """Responses per prompt; rloo and grpo need 2 or more."""
    minibatch_size: Count | None = None
    """Episodes per optimizer step; rollout_size if not given."""
    microbatch_tokens: Execution[Count] = 1024
    """Tokens per forward pass, a prefix that episodes share counted once: memory and speed, not the result."""
    gradient_checkpointing: Execution[bool] = False
    """Compute activations again in the backward pass: less memory, a forward pass more per epoch, the same bits."""
    num_epochs: Count = 2
    """Passes over each rollout."""
    learning_rate: Positive = 1.0e-6
    """Policy's learning rate at its peak."""
    critic_learning_rate: Positive | None = None
    """Critic's learning rate; the policy's if not given."""
    lr_schedule: Added[Literal["linear", "cosine", "constant"]] = "linear"
    """How both learning rates go from their peak to 0 over the updates, or stay (`objectives.schedule`)."""
    lr_warmup: Added[Annotated[int, Field(ge=0)]] = 0
    """First updates in which both learning rates rise linearly to their peak."""
    entropy_coef: Added[NonNegative] = 0.0
    """Weight of an entropy bonus in the loss, per nat of the policy's mean entropy per token; 0 is none."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty acts: subtracted from the per-token reward, or added to the loss."""
    kl_kind: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL."""
    kl_importance: Literal["from_second_pass", "always", "never"] = "from_second_pass"
    """With kl_in: loss, in which passes over a rollout the estimate is weighed by π/π_old (`objectives.kl_loss`)."""
    adaptive_kl: AdaptiveKL | None = None
    """Adapt β to a target KL; kl_coef is its first value."""
    critic: Literal["separate", "head"] = "separate"
    """A model of its own that starts from the reward model, or a scalar head on the policy's trunk."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First updates in which only the critic learns."""
    vf_coef: Positive | None = None
    """Weight of the value loss where it shares the policy's trunk (critic: head); 0.1 if not given."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation."""
    clip_range: Positive = 0.2
    """ε of the policy's clipped ratio."""
    value_clip_range: Positive = 0.2
    """How far a value may move from the one that was recorded with the rollout."""
    max_grad_norm: Positive = 1.0
    """Gradients of policy and critic are clipped to this norm, each by itself."""
    temperature: Positive = 1.0
    """Divides the logits of policy and reference alike, in sampling and in logprobs."""
    max_new_tokens: Count = 32
    """Length limit of a response, in tokens."""
    max_prompt_tokens: Count = 256
    """Longer prompts are dropped (and counted)."""
    normalize_scores: bool = False
    """Scale scores to mean 0 and deviation 1 by the moments of all scores so far."""
    score_clip: Positive | None = None
    """Scores (normalised, if they are) are cut to ± this."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that hits the length limit, after scaling and clipping."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights."""
    vllm: Added[VLLMConfig | None] = None
    """Let a vLLM server sample the rollouts; they are sampled in this process if not given."""
    monitor_kl_every: Count = 5
    """Updates between measurements of the KL to every ingredient and to the base (also in the first and the last)."""
    checkpoint_every: Execution[Count] = 10
    """Updates between checkpoints."""
    keep_checkpoints: Execution[Count] = 2
    """Newest checkpoints kept while the run lasts; unless `select` is `last`, the best one besides. Each holds what
    is trained in fp32, with the optimizer's moments: 12 bytes a parameter, 24 with a critic as large as the policy."""
    select: Annotated[
        Annotated[Literal["last", "best"], Tag(WORD)] | Annotated[Select, Tag(MAPPING)],
        Discriminator(lambda value: WORD if isinstance(value, str) else MAPPING),
    ] = "last"
    """Which policy the run returns: the last; that of the checkpoint with the highest mean reward (`best`); or the best
    by another metric or within a KL budget, `{metric: gold, kl: 8}`."""
    stop: Added[Stop | None] = None
    """When to end early, `{kl: 8}` or `{patience: 3}`; the learning rates' schedule is that of all updates."""

    @model_validator(mode="before")
    @classmethod
    def _no_truncation(cls, values: Any) -> Any:
        for key in ("top_p", "top_k", "min_p"):
            if isinstance(values, dict) and key in values:
                raise ValueError(
                    f"{key} is refused: truncated sampling draws from another distribution than the logprobs "
                    "describe, which biases every ratio. Use temperature"
                )
        return values

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        self.check_divides("group_size", "rollout_size")
        self.check_divides("minibatch_size", "rollout_size")
        if self.algorithm != "ppo":
            if self.group_size < 2:
                raise ValueError(
                    f"algorithm={self.algorithm} compares the responses to one prompt. Set group_size to 2 or more"
                )
            self.check_unset(_CRITIC_ONLY, f"with algorithm={self.algorithm}, which has no critic")
        if self.vf_coef is not None and self.critic == "separate":
            raise ValueError(
                f"vf_coef={self.vf_coef:g} changes nothing for a separate critic, which has an Adam of its own. "
                "Remove it, or set critic: head"
            )
        if self.critic_warmup >= self.num_updates:
            raise ValueError(
                f"critic_warmup={self.critic_warmup} leaves none of {self.num_updates} updates for the policy. "
                "Lower it"
            )
        if self.lr_warmup >= self.num_updates:
            raise ValueError(
                f"lr_warmup={self.lr_warmup} leaves none of {self.num_updates} updates at the full rate. Lower it"
            )
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise ValueError(
                "kl_kind=k1 in the loss has an expected gradient of 0. Use k2 (the gradient of KL(π ‖ reference)) "
                "or k3 (GRPO's), or kl_in: reward"
            )
        if self.kl_in == "reward" and self.kl_importance != "from_second_pass":
            raise ValueError(
                f"kl_importance={self.kl_importance} changes nothing with kl_in=reward. Remove it, or set kl_in: loss"
            )
        if self.adaptive_kl is not None and self.kl_coef == 0:
            raise ValueError(
                "adaptive_kl cannot move kl_coef=0, which it multiplies. Start above 0"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """As of every section; checkpoints count where they are what is selected from, or when it stops.

        A vLLM server's numerics decide the result, its address does not.
        """
        server = {"vllm": self.vllm.identity()} if self.vllm else {}
        return super().identity() | self._counted_checkpoints() | server

    def decisive(self) -> dict[str, Any]:
        """As of every section; checkpoints count where they do in the identity."""
        return super().decisive() | self._counted_checkpoints()

    def _counted_checkpoints(self) -> dict[str, Any]:
        chosen = self.select != "last" or (self.stop is not None and self.stop.patience)
        return {"checkpoint_every": self.checkpoint_every} if chosen else {}

    def execution(self) -> dict[str, Any]:
        """As of every section, and where a vLLM server is."""
        return super().execution() | {"vllm": self.vllm and self.vllm.execution()}

    @property
    def selection(self) -> Select:
        """What checkpoints are compared by."""
        return self.select if isinstance(self.select, Select) else Select()

    def weighs_kl(self, number: int) -> bool:
        """Whether the KL in the loss gets the ratio π/π_old in pass `number` (from 0) over a rollout."""
        return self.kl_importance == "always" or (number > 0 and self.kl_importance != "never")

    @property
    def minibatch(self) -> int:
        """Episodes per optimizer step."""
        return self.minibatch_size or self.rollout_size

    @property
    def value_weight(self) -> float:
        """Factor on the value loss."""
        if self.critic == "separate":
            return 1.0
        return 0.1 if self.vf_coef is None else self.vf_coef


class RLSection(RLConfig):
    """The recipe's `rl:`; one run per arm and seed."""

    arms: Input[Annotated[dict[str, ArmConfig], Field(min_length=1)]]
    """Name → init, reference and settings of its own."""
    prompts: Input[DataSource]
    """Rows with `prompt`, or `messages` whose last turn is the user's."""
    seeds: Input[Seeds] = (0, 1)
    """Runs per arm."""

    @field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        for name in arms:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "sft":
                raise ValueError(
                    f"cannot have an arm named {name!r}; use letters, digits, . _ - (and not 'sft')"
                )
        return arms

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        for name, arm in self.arms.items():
            config = self.config_of(name)
            for key in ("kl_coef", "adaptive_kl"):
                if not arm.rule.pulls and key in arm.settings:
                    raise ValueError(
                        f"arms.{name}.{key} changes nothing with reference: none, which does not pull. Remove it"
                    )
            if isinstance(config, RLConfig) and len(arm.rule.models) > 1:
                wanted = "k1" if config.kl_in == "reward" else "k2"
                if config.kl_kind != wanted:
                    raise ValueError(
                        f"arms.{name}: a mixture is penalised right by kl_kind={wanted} with kl_in={config.kl_in}, "
                        f"not by {config.kl_kind}. Use that, or one reference"
                    )
        return self

    def decisive(self) -> dict[str, Any]:
        """As of every section; an arm's own settings count as those of `rl:` do."""
        arms = {}
        for name, arm in self.arms.items():
            own = self.config_of(name).decisive()
            arms[name] = arm.model_dump(mode="json", include={"init", "reference", "method"})
            arms[name] |= {key: own[key] for key in arm.settings if key in own}
        return super().decisive() | {"arms": arms}

    def config_of(self, arm: str) -> RLConfig | DPOConfig:
        """The settings of one arm: those of `rl:` with its own in their place; DPO's for a DPO arm.

        Raises:
            ValueError: a setting of the arm is unknown or wrong.
        """
        dpo = self.arms[arm].method == "dpo"
        kind: type[RLConfig] | type[DPOConfig] = DPOConfig if dpo else RLConfig
        given = set() if dpo else self.model_fields_set & RLConfig.model_fields.keys()
        try:
            return kind(**{name: getattr(self, name) for name in given} | self.arms[arm].settings)
        except ValidationError as error:
            text = explain(error, kind)
            joint = ": " if " " in text.split("=")[0] else "."
            raise ValueError(f"arms.{arm}{joint}{text}") from None
