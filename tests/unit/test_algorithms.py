"""PPO, RLOO and GRPO against hand calculations, and every key of `rl:` against the claim that it changes something."""

import json
import math
import sys
import threading
import types
import weakref
from dataclasses import replace

import pytest
import torch

from salsa import models, objectives
from salsa import rl as rl_module
from salsa.artifacts import Checkpoint
from salsa.config import RewardFunction, RLConfig
from salsa.config.expressions import ReferenceRule
from salsa.data import draw_prompts
from salsa.models import LanguageModel
from salsa.rewards import FunctionScorer
from salsa.rl import RLSetup
from salsa.rl_models import Progress
from tests.tiny_rl import (
    FP32,
    GRPO,
    RLOO,
    ascii_share,
    changed,
    first_experience,
    run,
    without_times,
)

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
REWARDS = torch.tensor([[-0.1, -0.2, 2.0], [1.0, 0, 0], [-0.5, 0.5, 0], [0.1, 0.1, 3.8]])


def estimate_advantages(rewards, values, mask, algorithm="ppo", gamma=1.0, group_size=1):
    return objectives.estimate_advantages(
        rewards,
        values,
        mask,
        algorithm=algorithm,
        gamma=gamma,
        gae_lambda=0.95,
        group_size=group_size,
    )


def test_rloo_compares_whole_rewards_with_the_rest_of_the_group():
    """Sums 1.7, 1, 0, 4 in groups of 2: each minus the other, on every real token; no returns."""
    values = torch.zeros_like(REWARDS)
    advantages, returns = estimate_advantages(REWARDS, values, MASK, algorithm="rloo", group_size=2)
    expected = torch.tensor([[0.7] * 3, [-0.7, 0, 0], [-4.0, -4.0, 0], [4.0] * 3])
    torch.testing.assert_close(advantages, expected)
    assert (returns == 0).all()


def test_grpo_scales_by_the_groups_deviation():
    values = torch.zeros_like(REWARDS)
    advantages, _ = estimate_advantages(REWARDS, values, MASK, algorithm="grpo", group_size=2)
    one = 0.35 / (0.7 / math.sqrt(2) + 1e-4)
    two = 2.0 / (4.0 / math.sqrt(2) + 1e-4)
    expected = torch.tensor([[one] * 3, [-one, 0, 0], [-two, -two, 0], [two] * 3])
    torch.testing.assert_close(advantages, expected)


def test_ppo_whitens_gae_over_the_real_tokens():
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * MASK
    advantages, returns = estimate_advantages(REWARDS, values, MASK, gamma=0.9)
    raw, expected_returns = objectives.gae(REWARDS, values, MASK, gamma=0.9, gae_lambda=0.95)
    torch.testing.assert_close(returns, expected_returns)
    kept = advantages[MASK]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.std().item() == pytest.approx(1, abs=1e-4)
    slope = (kept[1] - kept[0]) / (raw[MASK][1] - raw[MASK][0])
    assert slope > 0


def test_scores_are_normalised_then_clipped_then_fined():
    scores, ended = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([True, False, True, True])
    options = {"normalize": True, "score_clip": 1.0, "missing_eos_penalty": 0.25}
    shaped, moments = objectives.shape_scores(scores, ended, objectives.Moments(), **options)
    std = math.sqrt((9 + 4 + 1 + 36) / 3)
    torch.testing.assert_close(shaped, torch.tensor([-3 / std, -2 / std - 0.25, -1 / std, 1.0]))
    _, moments = objectives.shape_scores(scores + 4, ended, moments, **options)
    assert moments.n == 8 and moments.mean == pytest.approx(6.0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_reward_rises_without_a_critic(algorithm, job, tmp_path):
    rows = run(
        job, tmp_path / "a", num_updates=20, rollout_size=32, minibatch_size=16, learning_rate=1e-2,
        kl_coef=0.0, **algorithm,
    )  # fmt: skip
    first, last = (sum(row["score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 0.15
    assert "value_loss" not in rows[0] and not (tmp_path / "a" / "critic").exists()


@pytest.mark.slow
def test_reward_rises_with_a_head_on_the_trunk(job, tmp_path):
    rows = run(
        job, tmp_path / "a", num_updates=20, rollout_size=32, minibatch_size=16, learning_rate=1e-2,
        kl_coef=0.0, critic="head",
    )  # fmt: skip
    first, last = (sum(row["score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 0.1
    assert rows[0]["value"] == 0.0 != rows[-1]["value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, RLOO, GRPO | {"kl_in": "loss", "kl_kind": "k2"}, GRPO | {"kl_in": "loss", "kl_kind": "k3"}],
    ids=["ppo", "rloo", "k2 in the loss", "k3 in the loss"],
)  # fmt: skip
def test_kl_falls_where_it_is_all_there_is(options, job, make_checkpoint, tmp_path):
    """The reward is 0 and the reference lies a short way from the start: a flipped sign would raise the KL."""
    other = models.load_policy(make_checkpoint("llama", 0).path)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.05 * torch.randn_like(weight)
    models.save_checkpoint(other, models.load_tokenizer(job.init.path), tmp_path / "near")
    apart = replace(
        job, reference=Checkpoint.of(tmp_path / "near"), reward=lambda prompts, responses: [0.0] * len(responses)
    )  # fmt: skip
    rows = run(
        apart, tmp_path / "a", num_updates=16, rollout_size=64, minibatch_size=32, learning_rate=3e-3,
        kl_coef=1.0, **options,
    )  # fmt: skip
    first, last = (sum(row["kl"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last < 0.8 * first


def test_responses_of_a_group_answer_one_prompt(job):
    drawn = draw_prompts(job.prompts, 4, group_size=2, seed=0, update=0)
    assert len(drawn) == 4 and drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_kl_in_the_loss_is_beta_times_its_mean_over_tokens(job, make_checkpoint):
    """Oracle: plain loops over real tokens; the reward is the bare score."""
    apart = replace(job, reference=make_checkpoint("llama", 1))
    apart = changed(apart, kl_in="loss", kl_kind="k3", kl_coef=0.7)
    apart = changed(apart, num_epochs=1, minibatch_size=8, microbatch_tokens=10_000)
    rl_models, found, metrics = first_experience(apart)
    assert metrics["reward"] == pytest.approx(found.scores.mean().item(), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    parts = rl_module.update(rl_models, found, apart, Progress(0.7), generator, FP32)
    terms = []
    for b, length in enumerate(found.rollout.lengths.tolist()):
        for t in range(length):
            d = (found.logprobs[b, t] - found.ref_logprobs[b, t]).item()
            terms.append(math.exp(-d) - 1 + d)
    mean = sum(terms) / len(terms)
    assert mean > 0.1
    assert parts.kl_loss == pytest.approx(mean, rel=1e-4)


def test_kl_in_the_reward_is_in_the_sequence_reward_of_rloo(job, make_checkpoint):
    apart = replace(job, reference=make_checkpoint("llama", 1))
    _, found, figures = first_experience(changed(apart, kl_coef=0.3, **RLOO))
    kl = (found.logprobs - found.ref_logprobs).sum(1)
    whole = found.scores - 0.3 * kl
    torch.testing.assert_close(found.rewards.sum(1), whole, rtol=1e-4, atol=1e-5)
    others = (whole[:4].sum() - whole[0]) / 3
    assert found.advantages[0, 0].item() == pytest.approx((whole[0] - others).item(), abs=1e-4)
    assert figures["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    spread = kl.std(correction=0).item() / math.sqrt(len(kl))
    assert figures["kl_stderr"] == pytest.approx(spread, rel=1e-4)


def test_a_head_sends_its_gradient_into_the_trunk_by_vf_coef(job):
    """∂loss/∂trunk is linear in vf_coef; the head's values start at 0."""
    norms = {}
    for coef in (0.5, 1.0):
        headed = changed(job, critic="head", vf_coef=coef)
        headed = changed(headed, num_epochs=1, minibatch_size=8, max_grad_norm=1e9)
        rl_models, found, _ = first_experience(headed)
        assert not rl_models.critic.owns_trunk and (found.values == 0).all()
        torch.nn.init.ones_(rl_models.critic.score.weight)
        still = replace(found, advantages=torch.zeros_like(found.advantages))
        generator = torch.Generator().manual_seed(0)
        stats = rl_module.update(rl_models, still, headed, Progress(0.0), generator, FP32)
        norms[coef] = stats.grad_norm
    assert norms[1.0] == pytest.approx(2 * norms[0.5], rel=1e-4) and norms[1.0] > 0


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_warm_up_moves_the_critic_and_not_the_policy(critic, job, tmp_path):
    rows = run(job, tmp_path / "a", num_updates=3, critic_warmup=2, critic=critic)
    assert [("policy_loss" in row, "value_loss" in row) for row in rows] == [
        (False, True), (False, True), (True, True),
    ]  # fmt: skip
    assert rows[0]["kl"] == rows[1]["kl"] == rows[2]["kl"] == 0.0
    assert rows[0]["value"] != rows[2]["value"]


def test_beta_follows_the_kl(job, make_checkpoint, tmp_path):
    job = replace(job, reference=make_checkpoint("llama", 1))
    options = {"num_updates": 3, "kl_coef": 0.5}
    for target, sign in ((1000.0, -1), (0.001, 1)):
        adaptive = {"target": target, "horizon": 80}
        rows = run(
            job, tmp_path / str(target), adaptive_kl=adaptive, **options
        )  # fmt: skip
        assert [row["kl_coef"] for row in rows] == pytest.approx(
            [0.5 * (1 + sign * 0.2 * 8 / 80) ** k for k in range(3)], rel=1e-5
        )


CHANGES = {
    "kl_coef": 1.0, "num_epochs": 1, "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "kl_kind": "k3",
    "critic": "head", "critic_warmup": 1, "gamma": 0.5, "gae_lambda": 0.1, "clip_range": 1e-4,
    "value_clip_range": 1e-4, "max_grad_norm": 1e-2, "temperature": 0.5, "max_new_tokens": 3, "group_size": 2,
    "normalize_scores": True, "score_clip": 0.1, "missing_eos_penalty": 1.0, "minibatch_size": 2, "rollout_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(job, make_checkpoint, tmp_path_factory):
    reference = replace(job, reference=make_checkpoint("llama", 1))
    return reference, run(reference, tmp_path_factory.mktemp("plain") / "a", num_updates=3)


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_changes_something(key, plain, tmp_path):
    changed, rows = plain
    value = CHANGES[key]
    assert getattr(changed.config, key) != value
    assert without_times(
        run(changed, tmp_path / "a", num_updates=3, **{key: value})
    ) != without_times(rows)


def test_several_rewards_are_summed_and_each_is_logged(job, tmp_path):
    lengths = lambda prompts, responses: [0.5 * len(r) for r in responses]
    one = run(job, tmp_path / "one", num_updates=1)[0]
    both = run(
        replace(job, reward={"ascii": ascii_share, "long": lengths}),
        tmp_path / "two",
        num_updates=1,
    )[0]
    assert both["score_ascii"] == one["score"] and "score_reward" not in one
    assert both["score"] == pytest.approx(both["score_ascii"] + both["score_long"], rel=1e-5)


def test_kl_to_ingredients_and_base_is_logged(job, make_checkpoint, tmp_path):
    other = make_checkpoint("llama", 1)
    job = replace(job, reference=other, kl_to={"base": job.init, "sft[1]": other})
    rows = run(job, tmp_path / "a", num_updates=4, monitor_kl_every=2)
    assert [("kl_to_base" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["kl_to_base"] == 0.0
    assert all(row["kl_to_sft[1]"] == row["kl"] for row in rows if "kl_to_base" in row)
    plain = run(replace(job, kl_to={}), tmp_path / "b", num_updates=4)
    watched = [
        {k: v for k, v in row.items() if k not in ("kl_to_base", "kl_to_sft[1]")} for row in rows
    ]
    assert without_times(watched) == without_times(plain), (
        "measuring must not change what is measured"
    )


def test_measuring_the_kl_holds_one_further_model(job, make_checkpoint, monkeypatch):
    """The model before is gone when the next one is loaded: on a card, two further ones are what does not fit."""
    others = {str(seed): make_checkpoint("llama", seed) for seed in (1, 2, 3)}
    job = replace(job, kl_to=others)
    models, experience, _ = first_experience(job)
    load, made = LanguageModel.load, []

    def counted(path, engine):
        alive.append(sum(one() is not None for one in made))
        model = load(path, engine)
        made.append(weakref.ref(model.backbone))
        return model

    alive = []
    monkeypatch.setattr(LanguageModel, "load", counted)
    assert len(rl_module.measure_kl(models, experience, job, FP32)) == 3
    assert alive == [0, 0, 0]


def test_a_bare_checkpoint_is_a_reference_that_stands_still(job):
    assert job.rule == ReferenceRule((job.reference,)) == replace(job, reference=job.rule).rule


def test_old_names_of_the_public_api_still_work():
    import salsa

    with pytest.warns(FutureWarning, match="salsa.RLJob is now salsa.rl.RLSetup"):
        assert salsa.RLJob is RLSetup
    assert json.dumps(RLConfig(kl_coef=0.1).model_dump(mode="json"))


def test_functions_score_while_the_models_compute(job, tmp_path, monkeypatch):
    """The reward, the watched score and the forward passes wait for each other: in turn, they would time out."""
    meet = threading.Barrier(3, timeout=10)

    def score(prompts, responses):
        meet.wait()
        return ascii_share(prompts, responses)

    def forward(*args):
        meet.wait()
        return original(*args)

    original = rl_module._forward
    monkeypatch.setitem(sys.modules, "slow_rewards", types.SimpleNamespace(score=score))
    reward = FunctionScorer([RewardFunction(call="slow_rewards:score")])
    inline = run(replace(job, monitors={"gold": ascii_share}), tmp_path / "inline", num_updates=1)
    monkeypatch.setattr(rl_module, "_forward", forward)
    waiting = replace(job, reward=reward, monitors={"gold": reward})
    overlapped = run(waiting, tmp_path / "overlapped", num_updates=1)
    assert without_times(overlapped) == without_times(inline)
