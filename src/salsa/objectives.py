"""The mathematics, once, pure: tensors in, tensors out.

Everywhere: B episodes, R response tokens; `mask` is bool or 0/1 and marks real response tokens, EOS included; what
lies outside the mask neither counts nor leaks; logprobs in nats.

Departures from the papers' notation are named in each docstring.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

KLKind = Literal["k1", "k2", "k3"]
Algorithm = Literal["ppo", "rloo", "grpo"]
Schedule = Literal["linear", "cosine", "constant"]
Mask = Bool[Tensor, "B R"] | Int[Tensor, "B R"] | Float[Tensor, "B R"]


class PolicyLoss(NamedTuple):
    """Scalars: the loss to minimise, the share of clipped tokens, the k3 estimate of KL(old ‖ new), the mean ratio."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    ratio: Float[Tensor, ""]


class ValueLoss(NamedTuple):
    """Scalars: the loss to minimise and the share of clipped tokens."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of all that was seen so far."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation (ddof 1); 1 before there are two numbers that differ."""
        return math.sqrt(self.squares / (self.n - 1)) if self.squares > 0 else 1.0


def masked_mean(x: Float[Tensor, "B R"], mask: Mask) -> Float[Tensor, ""]:
    """Mean of `x` over the real tokens of the whole batch (not a mean of sequence means); 0 if there are none."""
    mask = mask.bool()
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Float[Tensor, "B R"], mask: Mask, *, shift_mean: bool = True) -> Float[Tensor, "B R"]:
    """Scale `x` to unit variance over the real tokens, and to mean 0 if `shift_mean`; 0 outside the mask.

    The variance is the unbiased one (ddof 1). With `shift_mean=False` the mean is kept as it was.
    """
    mask = mask.bool()
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = torch.where(mask, (x - mean) ** 2, 0).sum() / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def kl_estimate(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], kind: KLKind
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(π ‖ π_ref) in nats, for tokens drawn from π (Schulman, "Approximating KL Divergence").

    With d = log π − log π_ref:  k1 = d;  k2 = d²/2;  k3 = e^(−d) − 1 + d.
    k1 and k3 are unbiased, k2 and k3 are never negative. (Schulman's r is e^(−d).)

    Raises:
        ValueError: another `kind`.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimate: kind={kind!r} is unknown. Use 'k1', 'k2' or 'k3'.")


def categorical_kl(
    logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"]
) -> Float[Tensor, "*shape"]:
    """KL(π(·|s) ‖ π_ref(·|s)) = Σ_v π(v)·(log π(v) − log π_ref(v)) in nats: the expectation that k1 samples.

    Summed over a response's tokens it estimates KL(π(y|x) ‖ π_ref(y|x)) with less variance than k1.
    """
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def token_rewards(
    scores: Float[Tensor, " B"],
    logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    mask: Mask,
    *,
    kl_coef: float,
    kl_kind: KLKind = "k1",
) -> Float[Tensor, "B R"]:
    """r_t = −β·kl_t + [t = T]·score, with T the mask's last 1 (SALSA, L = −R + β·KL(π ‖ π_ref); Ziegler et al. 2019).

    A row without real tokens has no reward: its score is not placed anywhere.
    """
    mask = mask.bool()
    rewards = -kl_coef * torch.where(mask, kl_estimate(logprobs, ref_logprobs, kl_kind), 0)
    later = mask.flip(1).cumsum(1).flip(1)
    last = mask & (later == 1)
    return rewards + last * scores[:, None]


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Mask,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), episodes ending at the mask's last 1.

    δ_t = r_t + γ·V_{t+1} − V_t;  A_t = δ_t + γλ·A_{t+1};  returns = A + V, with V = A = 0 past the end.
    `values[t]` is the value before token t is chosen. Returns (advantages, returns), both 0 outside the mask.
    """
    mask = mask.bool()
    values, rewards = torch.where(mask, values, 0), torch.where(mask, rewards, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    advantages = torch.where(mask, advantages, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def shape_scores(
    scores: Float[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    moments: Moments,
    *,
    normalize: bool,
    score_clip: float | None,
    missing_eos_penalty: float,
) -> tuple[Float[Tensor, " B"], Moments]:
    """Normalise by the moments of all scores so far, clip to ±score_clip, then fine responses without EOS.

    Returns the shaped scores and the moments from now on, which cover these scores too if `normalize`.
    """
    if normalize:
        moments = updated_moments(moments, scores)
        scores = (scores - moments.mean) / moments.std
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    return scores - missing_eos_penalty * (~ended), moments


def estimate_advantages(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Mask,
    *,
    algorithm: Algorithm,
    gamma: float,
    gae_lambda: float,
    group_size: int,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """(advantages, returns): the one step in which PPO, RLOO and GRPO differ.

    PPO: GAE with the critic's `values`, whitened over the batch's real tokens. RLOO and GRPO: the sum of the episode's
    rewards against its group's, the same for each of its tokens; they have no critic, and returns of 0.

    Raises:
        ValueError: another `algorithm`, or `group_size` does not divide the number of episodes.
    """
    if algorithm == "ppo":
        advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
        return whiten(advantages, mask), returns
    if algorithm == "rloo":
        per_episode = rloo_advantages(rewards.sum(dim=1), group_size)
    elif algorithm == "grpo":
        per_episode = grpo_advantages(rewards.sum(dim=1), group_size)
    else:
        raise ValueError(
            f"estimate_advantages: algorithm={algorithm!r} is unknown. Use 'ppo', 'rloo' or 'grpo'."
        )
    return per_episode[:, None] * mask, torch.zeros_like(values)


def rloo_advantages(scores_with_kl: Float[Tensor, " B"], group_size: int) -> Float[Tensor, " B"]:
    """A_i = R_i − mean of the other R_j in its group (Ahmadian et al. 2024); groups are consecutive rows.

    `scores_with_kl` is the whole sequence's reward, KL penalty included.

    Raises:
        ValueError: `group_size` is below 2 or does not divide B.
    """
    groups = _groups(scores_with_kl, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def grpo_advantages(scores: Float[Tensor, " B"], group_size: int) -> Float[Tensor, " B"]:
    """A_i = (R_i − mean) / (std + 1e-4) within its group (Shao et al. 2024); std has ddof 1, as in TRL.

    Raises:
        ValueError: `group_size` is below 2 or does not divide B.
    """
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Mask,
    *,
    clip_range: float,
    weights: Float[Tensor, "B R"] | None = None,
) -> PolicyLoss:
    """−mean_t w_t·min(ρ_t·A_t, clip(ρ_t, 1−ε, 1+ε)·A_t), ρ_t = π(a_t)/π_old(a_t) (Schulman et al. 2017, eq. 7).

    The mean is over the real tokens of the batch. A token counts as clipped where the clip changes its term.
    `weights` are w, for tokens that were not drawn from π_old (`importance_weights`); 1 if not given.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    terms = torch.minimum(unclipped, clipped)
    return PolicyLoss(
        loss=-masked_mean(terms if weights is None else weights * terms, mask),
        clip_fraction=masked_mean((clipped < unclipped).to(ratio.dtype), mask).detach(),
        approx_kl=masked_mean(torch.expm1(log_ratio) - log_ratio, mask).detach(),
        ratio=masked_mean(ratio, mask).detach(),
    )


def importance_weights(
    logprobs: Float[Tensor, "B R"],
    sampler_logprobs: Float[Tensor, "B R"],
    mask: Mask,
    *,
    cap: float,
) -> Float[Tensor, "B R"]:
    """w_t = min(π_old(a_t)/μ(a_t), C) for tokens drawn from the sampler's μ, not from π_old; 0 outside the mask.

    Truncated importance sampling (Ionides 2008; per token, between a sampler's numerics and the trainer's: Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", whose π_learner is π_old here and
    π_sampler μ). A cap C keeps the variance finite and biases what lies above it towards 0. As there, a token's weight
    leaves out the tokens before it, and the weights are not normalised.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 0)


def kl_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    mask: Mask,
    *,
    kl_kind: KLKind,
    importance: bool,
    weights: Float[Tensor, "B R"] | None = None,
) -> Float[Tensor, ""]:
    """mean_t w_t·ρ_t·kl_t, a term of the loss whose gradient is that of KL(π ‖ π_ref); ρ_t = π(a_t)/π_old(a_t).

    Tokens were drawn from π_old, so that after the first step the estimator needs the ratio ρ (`importance`). ∇k2 is
    (log π − log π_ref)·∇log π, whose mean under π is ∇KL: ρ only weighs it, and is detached. k3 is unbiased as a value
    and its own gradient is not that of its mean: ρ·k3 is differentiated through ρ too (arXiv 2512.21852, OpenRLHF
    issue 1309).
    Per token: the effect of a token on the states that follow is left out, as everywhere in the loss. `weights` are w,
    for tokens that were not drawn from π_old (`importance_weights`); 1 if not given.
    """
    mask = mask.bool()
    logprobs, old_logprobs, ref_logprobs = (
        torch.where(mask, x, 0) for x in (logprobs, old_logprobs, ref_logprobs)
    )
    kl = kl_estimate(logprobs, ref_logprobs, kl_kind)
    if importance:
        ratio = (logprobs - old_logprobs).exp()
        kl = (ratio.detach() if kl_kind == "k2" else ratio) * kl
    return masked_mean(kl if weights is None else weights * kl, mask)


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Mask,
    *,
    value_clip_range: float,
) -> ValueLoss:
    """½·mean_t max((V−G)², (V_old + clip(V−V_old, ±ε) − G)²), as in OpenAI's PPO; the mean is over real tokens."""
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    return ValueLoss(
        loss=masked_mean(torch.maximum(unclipped, clipped), mask) / 2,
        clip_fraction=masked_mean((clipped > unclipped).to(values.dtype), mask).detach(),
    )


def entropy_loss(entropy: Float[Tensor, "B R"], mask: Mask) -> Float[Tensor, ""]:
    """−mean_t H(π(·|s_t)), in nats: minimising it raises the entropy (Mnih et al. 2016, section 4; PPO, eq. 9).

    `entropy` is that of each next-token distribution, Σ_v −π(v)·log π(v), exact and differentiable. The loss gets
    c·this; the papers maximise and add +c·H. As elsewhere a token's effect on later states is left out.
    """
    return -masked_mean(entropy, mask)


def schedule(kind: Schedule, number: int, total: int, *, warmup: int = 0) -> float:
    """The factor on a learning rate in update `number` of `total`, from 0: w(n)·s((n − W)/(total − W)).

    w(n) = min(1, (n+1)/W) rises over the W `warmup` updates, so that the first one moves; s is held at s(0) meanwhile.
    linear: s(x) = 1 − x;  cosine: s(x) = (1 + cos πx)/2 (Loshchilov and Hutter 2017, eq. 5);  constant: s(x) = 1.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in get_args(Schedule):
        known = ", ".join(map(repr, get_args(Schedule)))
        raise ValueError(f"schedule: kind={kind!r} is unknown. Use one of {known}.")
    if number < warmup:
        return (number + 1) / warmup
    done = (number - warmup) / (total - warmup)
    if kind == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1.0


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: int, num_episodes: int
) -> float:
    """β·(1 + e·n/horizon) with e = clip(KL/target − 1, ±0.2) (Ziegler et al. 2019, section 2.2, and its code).

    `kl` and `target` in nats per response; n = `num_episodes` seen since the last change.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def updated_moments(moments: Moments, x: Float[Tensor, " B"]) -> Moments:
    """Moments of everything seen and `x` together (Chan, Golub and LeVeque 1983)."""
    numbers = x.double()
    count = moments.n + len(numbers)
    mean = numbers.mean().item()
    squares = (numbers - mean).square().sum().item()
    shift = mean - moments.mean
    return Moments(
        count,
        moments.mean + shift * len(numbers) / count,
        moments.squares + squares + shift**2 * moments.n * len(numbers) / count,
    )


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Mask
) -> float:
    """1 − Var(returns − values)/Var(returns) over the real tokens; 0 where the returns do not vary."""
    mask = mask.bool()
    variance = returns[mask].var(correction=0)
    rest = (returns - values)[mask].var(correction=0)
    return (1 - rest / variance).item() if variance > 0 else 0.0


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    margin: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """−mean log σ(r_chosen − r_rejected − margin) (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023)."""
    difference = chosen_scores - rejected_scores
    return -logsigmoid(difference if margin is None else difference - margin).mean()


def _groups(x: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(x) % group_size:
        raise ValueError(
            f"group_size={group_size} does not fit {len(x)} episodes. Use a divisor of that, 2 or more."
        )
    return x.view(-1, group_size)
