"""Every formula against plain float64 loops that share no code with it, and against cases known in closed form."""

import inspect
import math
import random

import pytest
import torch

from salsa import objectives as o

B, R = 5, 7


def ragged(seed: int = 0):
    """Masks of every length from 1 to R, and full rows of numbers, garbage after the mask included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 3, R, 2, 5]
    mask = torch.tensor([[t < n for t in range(R)] for n in lengths])
    numbers = [torch.randn(B, R, generator=generator, dtype=torch.float64) for _ in range(4)]
    return lengths, mask, numbers


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def real(x, lengths):
    return [x[b, t].item() for b in range(B) for t in range(lengths[b])]


def test_masked_mean_is_over_tokens_not_over_sequences():
    lengths, mask, (x, *_) = ragged()
    values = real(x, lengths)
    close(o.masked_mean(x, mask), sum(values) / len(values))
    assert o.masked_mean(x, torch.zeros_like(mask)) == 0


def test_masked_mean_ignores_nan_outside_the_mask():
    _, mask, (x, *_) = ragged()
    poisoned = torch.where(mask, x, torch.nan)
    close(o.masked_mean(poisoned, mask), o.masked_mean(x, mask))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    lengths, mask, (x, *_) = ragged()
    x = x * 3 + 5
    values = real(x, lengths)
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    expected = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        for t in range(lengths[b]):
            expected[b, t] = (x[b, t] - mean) / std + (0 if shift_mean else mean)
    torch.testing.assert_close(
        o.whiten(x, mask, shift_mean=shift_mean), expected, rtol=1e-7, atol=1e-7
    )


def test_kl_estimates_by_hand():
    p, q = math.log(0.5), math.log(0.2)
    one = lambda kind: o.kl_estimate(
        torch.tensor([p], dtype=torch.float64), torch.tensor([q], dtype=torch.float64), kind
    )
    close(one("k1"), [math.log(2.5)])
    close(one("k2"), [math.log(2.5) ** 2 / 2])
    close(one("k3"), [0.4 - 1 + math.log(2.5)])
    with pytest.raises((ValueError, TypeError), match="k1"):
        one("k4")


def test_kl_estimates_have_the_true_kl_as_expectation():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    true = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for kind in ("k1", "k3"):
        close((p * o.kl_estimate(p.log(), q.log(), kind)).sum(), true)
    close(o.categorical_kl(p.log()[None] + 7, q.log()[None] - 3)[0], true)
    assert true > 0.1  # so that a flipped sign cannot pass


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_token_rewards(kind):
    lengths, mask, (logprobs, ref, *_) = ragged()
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.25], dtype=torch.float64)
    beta = 0.3
    expected = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        for t in range(lengths[b]):
            d = (logprobs[b, t] - ref[b, t]).item()
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
            expected[b, t] = -beta * kl + (scores[b].item() if t == lengths[b] - 1 else 0.0)
    close(o.token_rewards(scores, logprobs, ref, mask, kl_coef=beta, kl_kind=kind), expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_expected_gradient_of_each_estimator_in_the_loss(kind):
    """By enumeration: k1 pulls nowhere, k2 along ∇KL(π ‖ ref), k3 along ∇KL(ref ‖ π); why k1 is refused there."""
    logits = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    drawn = logprobs.detach().exp()  # π weighs the samples and carries no gradient
    (found,) = torch.autograd.grad((drawn * o.kl_estimate(logprobs, ref, kind)).sum(), logits)
    p = logits.detach().exp() / logits.detach().exp().sum()
    kl = sum(a * (math.log(a) - b) for a, b in zip(p.tolist(), ref.tolist(), strict=True))
    expected = {
        "k1": [0.0] * 3,
        "k2": [p[i].item() * (math.log(p[i]) - ref[i].item() - kl) for i in range(3)],
        "k3": [p[i].item() - math.exp(ref[i]) for i in range(3)],
    }
    close(found, expected[kind])


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """Score function × k1, by enumeration, equals ∇KL(π ‖ ref): the reward's −β·k1 pulls towards the reference."""
    logits = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    weight = (logprobs.exp() * o.kl_estimate(logprobs, ref, "k1")).detach()
    (found,) = torch.autograd.grad((weight * logprobs).sum(), logits, retain_graph=True)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    close(found, true)


def test_adapted_kl_coef_by_hand():
    adapt = lambda kl: o.adapted_kl_coef(0.5, kl, target=4.0, horizon=100, num_episodes=10)
    assert adapt(4.0) == 0.5
    assert adapt(4.4) == pytest.approx(0.5 * (1 + 0.1 * 0.1))  # 10 % over the target
    assert adapt(40.0) == pytest.approx(0.5 * 1.02)  # clipped at +0.2
    assert adapt(-3.0) == pytest.approx(0.5 * 0.98)  # clipped at −0.2


def test_moments_are_those_of_everything_together():
    _, _, (x, *_) = ragged()
    values, moments = [], o.Moments()
    assert moments.std == 1.0
    for row in (x[0, :1], x[1], x[2, :3]):
        values += row.tolist()
        moments = o.updated_moments(moments, row)
        mean = sum(values) / len(values)
        assert moments.mean == pytest.approx(mean, rel=1e-12)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    assert moments.std == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_explained_variance():
    lengths, mask, (returns, noise, *_) = ragged()
    assert o.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    values = 0.5 * returns + noise
    g, v = real(returns, lengths), real(values, lengths)
    spread = lambda xs: sum((a - sum(xs) / len(xs)) ** 2 for a in xs)
    expected = 1 - spread([a - b for a, b in zip(g, v, strict=True)]) / spread(g)
    assert o.explained_variance(values, returns, mask) == pytest.approx(expected)
    assert o.explained_variance(values, torch.ones_like(returns), mask) == 0.0


def test_token_rewards_without_penalty_sum_to_the_score():
    _, mask, (logprobs, ref, *_) = ragged()
    scores = torch.arange(B, dtype=torch.float64)
    close(o.token_rewards(scores, logprobs, ref, mask, kl_coef=0.0).sum(1), scores)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_weighted_sum_of_deltas(gamma, lam):
    lengths, mask, (rewards, values, *_) = ragged()
    expected = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        n = lengths[b]
        r = [rewards[b, t].item() for t in range(n)]
        v = [values[b, t].item() for t in range(n)] + [0.0]
        for t in range(n):
            expected[b, t] = sum(
                (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n)
            )
    advantages, returns = o.gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0))


def test_gae_at_lambda_one_is_the_discounted_return_minus_the_value():
    lengths, mask, (rewards, values, *_) = ragged()
    _, returns = o.gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    for b in range(B):
        monte_carlo = sum(0.9**t * rewards[b, t].item() for t in range(lengths[b]))
        assert returns[b, 0].item() == pytest.approx(monte_carlo)


def test_group_advantages():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    close(o.rloo_advantages(scores, 3), [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3])
    std = math.sqrt((4 + 1 + 9) / 2)
    close(
        o.grpo_advantages(scores, 3)[:3], [-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4)]
    )
    with pytest.raises(ValueError, match="group_size=4 does not fit 6"):
        o.rloo_advantages(scores, 4)


def test_policy_loss_against_a_loop():
    lengths, mask, (new, old, advantages, _) = ragged()
    old = new + 0.3 * old
    terms, clipped, kl, ratios = [], 0, [], []
    for b in range(B):
        for t in range(lengths[b]):
            log_ratio = (new[b, t] - old[b, t]).item()
            ratio, a = math.exp(log_ratio), advantages[b, t].item()
            limited = min(max(ratio, 0.8), 1.2)
            terms.append(min(ratio * a, limited * a))
            clipped += limited * a < ratio * a
            kl.append(ratio - 1 - log_ratio)
            ratios.append(ratio)
    result = o.policy_loss(new, old, advantages, mask, clip_range=0.2)
    close(result.loss, -sum(terms) / len(terms))
    close(result.clip_fraction, clipped / len(terms))
    close(result.approx_kl, sum(kl) / len(kl))
    close(result.ratio, sum(ratios) / len(ratios))
    assert 0 < clipped < len(terms)


def test_importance_weights_against_a_loop():
    lengths, mask, (ours, theirs, advantages, _) = ragged()
    theirs = ours + theirs
    weights = o.importance_weights(ours, theirs, mask, cap=1.5)
    capped = 0
    for b in range(B):
        for t in range(weights.shape[1]):
            expected = min(math.exp((ours[b, t] - theirs[b, t]).item()), 1.5)
            capped += t < lengths[b] and expected == 1.5
            close(weights[b, t], expected if t < lengths[b] else 0.0)
    assert 0 < capped < mask.sum()
    weighed = o.policy_loss(ours, ours, advantages, mask, clip_range=0.2, weights=weights)
    close(weighed.loss, -(weights * advantages)[mask].sum() / mask.sum())
    kl = lambda **keys: o.kl_loss(ours, ours, theirs, mask, kl_kind="k2", importance=False, **keys)
    close(kl(weights=weights), ((ours - theirs) ** 2 / 2 * weights)[mask].sum() / mask.sum())
    close(kl(weights=torch.ones_like(weights)), kl())


def test_importance_weights_give_the_policys_own_gradient():
    """Over all actions of a bandit: E_μ[w·∇] is E_π[∇] exactly; E_μ[∇], or with a cap, is not."""
    generator = torch.Generator().manual_seed(0)
    logits, theirs, advantages = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    policy, sampler = logits.log_softmax(0), theirs.log_softmax(0)
    everything = torch.ones(6, 1, dtype=torch.bool)

    def gradient(drawn_from, cap):
        """Of the loss's expectation over actions that are drawn so; with a cap of None without weights."""
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(0)[:, None]
        columns = policy[:, None], drawn_from[:, None]
        weights = cap and o.importance_weights(*columns, everything, cap=cap)
        for action in range(6):
            one = slice(action, action + 1)
            loss = o.policy_loss(
                logprobs[one], policy[one, None], advantages[one, None], everything[one],
                clip_range=0.2, weights=cap and weights[one],
            ).loss  # fmt: skip
            (loss * drawn_from[action].exp()).backward(retain_graph=True)
        return leaf.grad

    own = gradient(policy, math.inf)
    close(gradient(sampler, math.inf), own)
    for cap in (None, 1.0, 2.0):
        assert (gradient(sampler, cap) - own).norm() > 0.05


def test_policy_gradient_points_towards_good_tokens():
    """At ratio 1 the gradient of the loss is −A/n: descending raises the logprob of what was good."""
    _, mask, (logprobs, _, advantages, _) = ragged()
    leaf = logprobs.clone().requires_grad_()
    o.policy_loss(leaf, logprobs, advantages, mask, clip_range=0.2).loss.backward()
    close(leaf.grad, torch.where(mask, -advantages / mask.sum(), 0))


def test_policy_gradient_stops_where_clipped():
    mask = torch.ones(1, 1, dtype=torch.bool)
    for advantage, log_ratio, flows in [
        (1.0, 0.5, False),
        (1.0, -0.5, True),
        (-1.0, -0.5, False),
        (-1.0, 0.5, True),
    ]:
        leaf = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
        o.policy_loss(
            leaf, torch.zeros_like(leaf), torch.full_like(leaf, advantage), mask, clip_range=0.2
        ).loss.backward()
        assert (leaf.grad.item() != 0) is flows


def test_value_loss_against_a_loop():
    lengths, mask, (new, old, returns, _) = ragged()
    terms, clipped = [], 0
    for b in range(B):
        for t in range(lengths[b]):
            v, v_old, g = (x[b, t].item() for x in (new, old, returns))
            limited = v_old + min(max(v - v_old, -0.2), 0.2)
            terms.append(max((v - g) ** 2, (limited - g) ** 2))
            clipped += (limited - g) ** 2 > (v - g) ** 2
    result = o.value_loss(new, old, returns, mask, value_clip_range=0.2)
    close(result.loss, 0.5 * sum(terms) / len(terms))
    close(result.clip_fraction, clipped / len(terms))


def test_bradley_terry():
    chosen, rejected = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.5, 1.0]).double()
    probability = lambda d: 1 / (1 + math.exp(-d))
    close(
        o.bradley_terry_loss(chosen, rejected),
        -(math.log(probability(1.5)) + math.log(probability(-1))) / 2,
    )
    margin = torch.tensor([1.0, 0.0]).double()
    expected = -(math.log(probability(0.5)) + math.log(probability(-1))) / 2
    close(o.bradley_terry_loss(chosen, rejected, margin), expected)


def test_nothing_outside_the_mask_matters():
    """Replace everything outside the mask by large numbers: no result may move."""
    _, mask, (a, b, c, d) = ragged()
    noise = torch.tensor([[random.Random(1).uniform(50, 60)] * R] * B, dtype=torch.float64)
    dirty = [torch.where(mask, x, noise) for x in (a, b, c, d)]
    scores = torch.ones(B, dtype=torch.float64)
    for clean, soiled in [
        (
            o.token_rewards(scores, a, b, mask, kl_coef=0.1),
            o.token_rewards(scores, *dirty[:2], mask, kl_coef=0.1),
        ),
        (
            o.gae(a, b, mask, gamma=1.0, gae_lambda=0.9)[0],
            o.gae(*dirty[:2], mask, gamma=1.0, gae_lambda=0.9)[0],
        ),
        (o.whiten(a, mask), o.whiten(dirty[0], mask)),
        (
            o.policy_loss(a, b, c, mask, clip_range=0.2).loss,
            o.policy_loss(*dirty[:3], mask, clip_range=0.2).loss,
        ),
        (
            o.value_loss(a, b, c, mask, value_clip_range=1.0).loss,
            o.value_loss(*dirty[:3], mask, value_clip_range=1.0).loss,
        ),
    ]:
        close(soiled, clean)


def test_nan_outside_the_mask_reaches_neither_a_value_nor_a_gradient():
    _, mask, (a, b, c, _) = ragged()
    dirty = lambda x: torch.where(mask, x, math.nan)
    scores = torch.ones(B, dtype=torch.float64)
    whole = {"mask": mask, "gamma": 0.9, "gae_lambda": 0.5}
    plain = o.gae(dirty(a), dirty(b), **whole)
    for value, clean in zip(plain, o.gae(a, b, **whole), strict=True):
        close(value, clean)
    assert o.token_rewards(scores, dirty(a), dirty(b), mask, kl_coef=0.1).isfinite().all()
    assert o.whiten(dirty(a), mask).isfinite().all()
    for algorithm in ("ppo", "rloo", "grpo"):
        rewards = o.token_rewards(scores, a, b, mask, kl_coef=0.1)[:4]
        for value in o.estimate_advantages(
            rewards, dirty(b)[:4], mask[:4], algorithm=algorithm, gamma=1.0, gae_lambda=0.9, group_size=2
        ):  # fmt: skip
            assert (value.isfinite() | ~mask[:4]).all()
    losses = {
        "policy": lambda x: o.policy_loss(x, dirty(b), dirty(c), mask, clip_range=0.2).loss,
        "value": lambda x: o.value_loss(x, dirty(b), dirty(c), mask, value_clip_range=0.2).loss,
    } | {
        kind: lambda x, kind=kind: o.kl_loss(x, dirty(b), dirty(c), mask, kl_kind=kind, importance=True)
        for kind in ("k2", "k3")
    }  # fmt: skip
    for name, loss in losses.items():
        leaf = dirty(a).requires_grad_()
        value = loss(leaf)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), name
        assert (leaf.grad[~mask] == 0).all() and leaf.grad[mask].abs().max() > 0, name


@pytest.mark.parametrize(
    ("ratio", "advantage", "clips"),
    [
        (0.81, -1.0, False), (0.79, -1.0, True), (1.19, 1.0, False), (1.21, 1.0, True), (0.5, 1.0, False),
        (2.0, -1.0, False),
    ],
)  # fmt: skip
def test_the_ratio_is_clipped_at_one_minus_and_one_plus_epsilon(ratio, advantage, clips):
    """1/(1+ε) = 0.833 in place of 1−ε = 0.8 would clip at 0.81."""
    one = lambda x: torch.tensor([[x]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = o.policy_loss(one(math.log(ratio)), one(0.0), one(advantage), mask, clip_range=0.2)
    assert result.clip_fraction.item() == clips
    limited = min(max(ratio, 0.8), 1.2)
    close(result.loss, -min(ratio * advantage, limited * advantage))


@pytest.mark.parametrize("advantages", [o.rloo_advantages, o.grpo_advantages])
def test_a_group_of_one_has_nothing_to_compare(advantages):
    with pytest.raises(
        ValueError, match="group_size=1 does not fit 4 episodes. Use a divisor of that, 2 or more"
    ):
        advantages(torch.ones(4), 1)


# score shaping


def test_scores_are_clipped_on_both_sides():
    scores, ended = torch.tensor([-9.0, -1.0, 1.0, 9.0]), torch.ones(4, dtype=torch.bool)
    shaped, moments = o.shape_scores(
        scores, ended, o.Moments(), normalize=False, score_clip=2.0, missing_eos_penalty=0.0
    )
    assert shaped.tolist() == [-2.0, -1.0, 1.0, 2.0] and moments == o.Moments()


def test_scores_are_normalised_by_all_that_were_seen():
    """The second batch is scaled by the moments of both: its own would give it mean 0."""
    ended = torch.ones(2, dtype=torch.bool)
    shape = lambda scores, moments: o.shape_scores(
        torch.tensor(scores).double(), ended, moments, normalize=True, score_clip=None, missing_eos_penalty=0.0
    )  # fmt: skip
    _, moments = shape([0.0, 2.0], o.Moments())
    shaped, after = shape([4.0, 6.0], moments)
    mean, std = 3.0, math.sqrt(20 / 3)
    close(shaped, [(4 - mean) / std, (6 - mean) / std])
    assert after.n == 4 and after.mean == mean


def test_the_penalty_is_for_those_that_did_not_end_and_comes_after_the_clip():
    scores, ended = torch.tensor([9.0, 9.0]), torch.tensor([True, False])
    shaped, _ = o.shape_scores(
        scores, ended, o.Moments(), normalize=False, score_clip=1.0, missing_eos_penalty=0.5
    )
    assert shaped.tolist() == [1.0, 0.5]


# the KL in the loss

REF = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
OLD = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64).log()


def gradient(kind: str, importance: bool, old: torch.Tensor | None) -> torch.Tensor:
    """E under π_old of the gradient of kl_loss, by enumerating a vocabulary of three; `old` None: π_old = π."""
    logits = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    drawn_from = logprobs.detach() if old is None else old
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses = [
        o.kl_loss(
            logprobs[i].view(1, 1), drawn_from[i].view(1, 1), REF[i].view(1, 1), mask,
            kl_kind=kind, importance=importance,
        )
        for i in range(3)
    ]  # fmt: skip
    expected = sum(p * loss for p, loss in zip(drawn_from.exp(), losses, strict=True))
    return torch.autograd.grad(expected, logits)[0]


def true_gradient() -> torch.Tensor:
    """∇ Σ π (log π − log π_ref)."""
    logits = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    return torch.autograd.grad((logprobs.exp() * (logprobs - REF)).sum(), logits)[0]


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_weighed_by_the_ratio_the_gradient_is_that_of_the_kl(kind, old):
    close(gradient(kind, True, old), true_gradient())


def test_without_the_ratio_only_k2_on_policy_is_right():
    close(gradient("k2", False, None), true_gradient())
    for kind, old in (("k2", OLD), ("k3", None), ("k3", OLD)):
        assert (gradient(kind, False, old) - true_gradient()).abs().max() > 0.01, (kind, old)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss_against_a_loop(kind):
    lengths, mask, (new, old, ref, _) = ragged()
    old = new + 0.3 * old
    weighed, plain = [], []
    for b in range(B):
        for t in range(lengths[b]):
            d = (new[b, t] - ref[b, t]).item()
            kl = {"k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
            plain.append(kl)
            weighed.append(kl * math.exp((new[b, t] - old[b, t]).item()))
    close(o.kl_loss(new, old, ref, mask, kl_kind=kind, importance=True), sum(weighed) / len(plain))
    close(o.kl_loss(new, old, ref, mask, kl_kind=kind, importance=False), sum(plain) / len(plain))


def test_entropy_loss_and_its_gradient_in_closed_form():
    """∂H/∂z_k = −p_k·(log p_k + H): a step against the gradient of the loss raises the entropy."""
    lengths, mask, _ = ragged()
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(B, R, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    loss = o.entropy_loss(entropy, mask)
    loss.backward()
    count, total = sum(lengths), 0.0
    for b in range(B):
        for t in range(R):
            weights = [math.exp(z) for z in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            h = -sum(x * math.log(x) for x in p)
            real_token = t < lengths[b]
            total += h * real_token
            for k in range(4):
                expected = p[k] * (math.log(p[k]) + h) / count if real_token else 0.0
                assert logits.grad[b, t, k].item() == pytest.approx(expected, abs=1e-12)
    close(loss.detach(), -total / count)
    uniform = torch.full((1, 1), math.log(4), dtype=torch.float64)
    close(o.entropy_loss(uniform, torch.ones(1, 1)), -math.log(4))


@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers_after_the_warm_up(warmup):
    import transformers

    total = 11
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for kind in ("linear", "cosine"):
        make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
        (theirs,) = make(optimizer, warmup, total).lr_lambdas
        for number in range(warmup, total):
            assert o.schedule(kind, number, total, warmup=warmup) == pytest.approx(theirs(number))
    assert {o.schedule("constant", n, total, warmup=warmup) for n in range(warmup, total)} == {1.0}
    rising = [o.schedule("cosine", n, total, warmup=warmup) for n in range(warmup)]
    assert rising == pytest.approx([1 / 3, 2 / 3, 1][:warmup])


def test_unknown_kinds_are_refused():
    """Without the tests' type checker, which would refuse them itself: a typo must not be another algorithm."""
    x = torch.zeros(2, 3)
    estimate, schedule, kl = map(inspect.unwrap, (o.estimate_advantages, o.schedule, o.kl_estimate))
    options = {"gamma": 1.0, "gae_lambda": 0.9, "group_size": 2}
    with pytest.raises(ValueError, match=r"algorithm='gppo' is unknown. Use 'ppo', 'rloo' or"):
        estimate(x, x, x.bool(), algorithm="gppo", **options)
    for number in (0, 5):
        with pytest.raises(ValueError, match=r"kind='linaer' is unknown. Use one of 'linear', 'co"):
            schedule("linaer", number, 10, warmup=2)
    with pytest.raises(ValueError, match=r"kind='k4' is unknown. Use 'k1'"):
        kl(x, x, "k4")
