"""What the gates judge: plain numbers and texts, read from a run's directory or computed with a few forward passes.

Per-token arrays are ragged: a list of one array an episode. Logprobs are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Ragged = Sequence[np.ndarray]


@dataclass(frozen=True)
class Source:
    """The rows of one role, as texts."""

    role: str
    """`sft`, `preferences`, `rl` or `eval`."""
    prompts: Sequence[str]
    """One a row: every message's words, in order."""
    dropped: int = 0
    """Prompts that were too long and left out."""


@dataclass(frozen=True)
class Data:
    """What a recipe learns from, before anything is trained."""

    sources: Sequence[Source] = ()
    sft_replies: Sequence[str] = ()
    sft_tokens: Sequence[int] = ()
    """Tokens of prompt and reply of each SFT row, under the chat template."""
    sft_reply_tokens: Sequence[int] = ()
    """Of the reply alone, its end included."""
    sft_max_length: int = 0
    pairs: "Pairs | None" = None
    marks: Sequence[str] = ()
    """What the chat template puts around a message: it has no place inside one."""
    contents: Sequence[str] = ()
    """The words of all messages of all roles."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs."""

    prompts: Sequence[str]
    chosen: Sequence[str]
    rejected: Sequence[str]
    scores: np.ndarray | None = None
    """[pairs, 2] of chosen and rejected by the labeller, where the preferences are synthetic; of the first pairs."""
    noise: float = 1.0
    """The labels follow sigmoid(difference / noise), where there is a labeller."""
    tokens: Sequence[int] = ()
    """Tokens of prompt and the longer reply of each pair, under the chat template."""
    max_length: int = 0


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihood of each row's reply, in nats per token, and of its end."""

    loss: np.ndarray
    end: np.ndarray
    """−log π(EOS | the whole reply) of each row."""


@dataclass(frozen=True)
class SFT:
    """The SFT models, measured on rows that they were trained on and, where there are any left, on others."""

    base: Mapping[str, Likelihood]
    """`seen` and, if the data has rows that were not used, `unseen` → the base model's."""
    models: Sequence[Mapping[str, Likelihood]]
    """The same of every SFT model."""
    digests: Sequence[str]
    base_digest: str
    midpoint: Mapping[str, Likelihood] | None = None
    """Of the average of the soup's first two ingredients, `ends`."""
    ends: tuple[int, int] = (0, 1)
    renderings: Mapping[str, np.ndarray] = field(default_factory=dict)
    """How the seen rows are shown → the first model's loss: `template`, `twice`, `bare`."""
    base_renderings: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The same of the base."""
    ended: np.ndarray | None = None
    """Whether each reply of the first model to the held-out prompts ended by itself."""
    expected_ends: float = 1.0
    """Share of the training replies that end within the length limit of those replies."""
    trained: bool = True
    """Whether this run trained them."""
    vocabulary: int = 1
    """Tokens that the base chooses from."""


@dataclass(frozen=True)
class Reward:
    """The trained reward model on its preference pairs."""

    held_out: np.ndarray
    """[pairs, 2]: scores of chosen and rejected of the pairs that were kept back."""
    seen: np.ndarray
    """The same of pairs that it was trained on."""
    ceiling: float | None = None
    """Accuracy that knowing the labeller's score would give, where that is known."""
    known_prompts: int = 0
    """Held-out pairs whose prompt has other pairs that were trained on."""


@dataclass(frozen=True)
class Episodes:
    """The traced episodes of one update of one RL run, and what independent forward passes say of them."""

    run: str
    """Arm and seed."""
    arm: str
    update: int
    config: Mapping[str, Any]
    """The stage's settings."""
    precision: str
    kl_coef: float
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    texts: Sequence[str]
    eos_ids: Sequence[int]
    known_prompts: bool
    """Whether every prompt is one of the recipe's, as the chat template renders it."""
    scores: np.ndarray
    logprobs: Ragged
    ref_logprobs: Ragged
    sampler_logprobs: Ragged
    values: Ragged
    rewards: Ragged
    advantages: Ragged
    returns: Ragged
    again: Mapping[str, Ragged] = field(default_factory=dict)
    """Computed anew: `logprobs`, `ref_logprobs`, `values`, where the models of that moment are on disk."""
    scores_again: np.ndarray | None = None
    """What the reward model on disk gives the same texts."""
    other_references: Mapping[str, Ragged] = field(default_factory=dict)
    """Name of another model → logprobs under it, where the reference's are not what they should be."""
    other_temperatures: Mapping[str, Ragged] = field(default_factory=dict)
    """Temperature → logprobs under it, where the logprobs are not what they should be."""
    late_values: Ragged | None = None
    """The critic's values one position late, where the values are not what they should be."""
    other_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What was scored → scores, where the scores are not what they should be."""

    @property
    def unfined(self) -> np.ndarray:
        """The scores before `missing_eos_penalty`, which training subtracts after scaling and clipping them."""
        ends = set(self.eos_ids)
        missing = np.array([not reply or reply[-1] not in ends for reply in self.responses])
        return self.scores + float(self.config.get("missing_eos_penalty", 0)) * missing


@dataclass(frozen=True)
class RLRun:
    """One arm and seed: its learning curve and what became of its models."""

    name: str
    arm: str
    rows: Sequence[Mapping[str, float]]
    config: Mapping[str, Any]
    precision: str
    policy_moved: bool | None
    """Whether the policy's weights differ from those it started from."""
    critic_moved: bool | None
    """Whether the critic's weights do; None where it has none or its start is not known."""
    pulls: bool = True
    """Whether its reference pulls at all."""
    named_reference: str = ""
    """The recipe's words for the reference."""
    reference_digest: str | None = None
    """What the stage was pulled towards, by its record."""
    expected_digest: str | None = None
    """Digest of the model that the recipe names, as it lies on disk now."""
    vocabulary: int = 2
    """Tokens that the policy chooses from."""
    unfinished: bool = False
    """Whether it is going on, was killed, or failed."""


@dataclass(frozen=True)
class Samples:
    """An arm's replies to the held-out prompts, [seeds, prompts] a column."""

    arm: str
    trained: bool
    prompts: Sequence[str]
    columns: Mapping[str, np.ndarray]
    texts: Sequence[str]
    """Replies of the first seed."""
    proxy_again: np.ndarray | None = None
    """What the reward model on disk gives the first of these texts."""


@dataclass(frozen=True)
class Evidence:
    """Everything that the gates judge; None or empty where a run has not got that far."""

    name: str
    data: Data = Data()
    sft: SFT | None = None
    reward: Reward | None = None
    episodes: Sequence[Episodes] = ()
    runs: Sequence[RLRun] = ()
    samples: Sequence[Samples] = ()
    baseline: str = ""
    held_out_scores: Sequence[str] = ()
    """Scores that trained nothing, e.g. gold."""
    num_eval: int = 0
    """Held-out prompts × seeds."""
    not_measured: Sequence[str] = ()
