"""Each step of the RL loop by itself, in milliseconds: what it must use, keep, clear and put back."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from salsa import rl, rl_models
from salsa.artifacts import Checkpoint
from salsa.config import AdaptiveKL, Select
from salsa.config.expressions import ReferenceRule
from salsa.data import draw_prompts
from salsa.errors import CheckpointError, ConfigError, WorkFailed
from salsa.models import LanguageModel
from salsa.objectives import Moments
from salsa.references import Reference, sha256_of
from salsa.rl_models import Learner, Progress, load_progress, save_progress
from salsa.runtime.checkpoint import load_state, state_file
from salsa.types import rows_of
from tests.tiny_rl import FP32, GRPO, ascii_share, changed, drawn, first_experience, run_killed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_update(job, models, experience, progress=None, **kwargs):
    progress = progress or Progress(job.config.kl_coef)
    return rl.update(models, experience, job, progress, generator(**kwargs), FP32)


def policy_weights(models):
    return {name: weight.detach().clone() for name, weight in models.policy.trained().items()}


def moved(models, before):
    return max(
        (weight - before[name]).abs().max().item()
        for name, weight in models.policy.trained().items()
    )


@pytest.fixture
def apart(job, make_checkpoint):
    """A policy that does not start at its reference."""
    return replace(job, reference=make_checkpoint("llama", 1))


# what an update draws


def test_prompts_depend_on_update_and_seed(job):
    first = drawn(job, 0)
    assert first == drawn(job, 0)
    assert first != drawn(job, 1) and first != drawn(replace(job, seed=1), 0)


def test_every_prompt_comes_once_in_a_pass(job):
    count = len(job.prompts)
    passed = [p for k in range(3) for p in draw_prompts(job.prompts, count // 3, 1, 0, k)]
    assert sorted(p.ids for p in passed) == sorted(p.ids for p in job.prompts)
    again = [p for k in range(3, 6) for p in draw_prompts(job.prompts, count // 3, 1, 0, k)]
    assert again != passed and sorted(p.ids for p in again) == sorted(p.ids for p in passed)


def test_random_numbers_depend_on_update_and_seed():
    draw = lambda *key: torch.rand(4, generator=FP32.generator(*key)).tolist()
    assert draw(0, 1) == draw(0, 1)
    assert draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1) and draw(1, 0) != draw(0, 1)


def test_minibatches_are_shuffled_anew_in_every_pass(job):
    _, experience, _ = first_experience(job)
    experience = replace(experience, scores=torch.arange(8.0))
    parts = list(rl.minibatches(experience, job.config, generator()))
    assert [epoch for epoch, _ in parts] == [0, 0, 1, 1]
    orders = [torch.cat([p.scores for e, p in parts if e == k]).tolist() for k in (0, 1)]
    assert orders[0] != sorted(orders[0]) and orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    other = list(rl.minibatches(experience, job.config, generator(1)))
    assert other[0][1].scores.tolist() != parts[0][1].scores.tolist()


def test_microbatches_weigh_by_their_real_tokens(job):
    _, experience, _ = first_experience(job)
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:4, 1:] = False  # four responses of one token, four of six
    rollout = replace(
        experience.rollout, response=torch.randint(5, 200, (8, 6)), response_mask=mask
    )
    experience = replace(experience, rollout=rollout)
    config = changed(job, microbatch_tokens=1).config
    parts = list(rl.microbatches(experience, config, FP32))
    assert len(parts) == 8
    for micro, share in parts:
        assert share.item() == pytest.approx(micro.rollout.response_mask.sum().item() / 28)


def test_many_microbatches_make_the_gradient_and_the_metrics_of_one(job):
    """Responses of one and of six tokens: shares of rows, or none, would give another norm. Adam would hide it."""
    made = []
    for tokens in (1, 10_000):
        one_step = changed(job, num_epochs=1, minibatch_size=8, microbatch_tokens=tokens)
        models, experience, _ = first_experience(one_step)
        mask = experience.rollout.response_mask.clone()
        mask[:4, 1:] = False
        rollout = replace(experience.rollout, response_mask=mask)
        fields = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        masked = {name: getattr(experience, name) * mask for name in fields}
        experience = replace(experience, rollout=rollout, **masked)
        made.append(one_update(one_step, models, experience).metrics)
    for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm"):
        assert made[0][name] == pytest.approx(made[1][name], rel=1e-3, abs=1e-5), name


# learning rates and optimizers


def test_learning_rates_fall_linearly_from_their_own_value_to_zero(job):
    config = changed(job, num_updates=4, learning_rate=1e-3, critic_learning_rate=1e-2).config
    models, _, _ = first_experience(changed(job, critic_learning_rate=1e-2))
    for number, factor in enumerate((1, 0.75, 0.5, 0.25)):
        rl._decay_learning_rates(models, config, number)
        rates = {n: one.optimizer.param_groups[0]["lr"] for n, one in models.learners.items()}
        assert rates == pytest.approx({"policy": 1e-3 * factor, "critic": 1e-2 * factor})


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"lr_schedule": "cosine"}, (1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2)),
        ({"lr_schedule": "constant"}, (1, 1, 1, 1)),
        ({"lr_schedule": "constant", "lr_warmup": 2}, (0.5, 1, 1, 1)),
        ({"lr_warmup": 2}, (0.5, 1, 1, 0.5)),
    ],
)
def test_other_schedules(settings, factors, job):
    job = changed(job, num_updates=4, learning_rate=1e-3, critic_learning_rate=1e-2, **settings)
    models, _, _ = first_experience(job)
    for number, factor in enumerate(factors):
        rl._decay_learning_rates(models, job.config, number)
        rates = {n: one.optimizer.param_groups[0]["lr"] for n, one in models.learners.items()}
        assert rates == pytest.approx({"policy": 1e-3 * factor, "critic": 1e-2 * factor})


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_an_entropy_bonus_raises_the_entropy(coefficient, job):
    """Nothing else acts on the policy: all advantages are 0. Without the bonus it stays where it is."""
    one_step = changed(job, entropy_coef=coefficient, num_epochs=1, minibatch_size=8)
    models, experience, _ = first_experience(one_step)
    experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
    mask = experience.rollout.response_mask
    entropy = lambda: models.policy.stats(experience.rollout, 1.0).entropy[mask].mean().item()
    before, weights = entropy(), policy_weights(models)
    stats = one_update(one_step, models, experience)
    if coefficient:
        assert entropy() > before + 1e-3
        assert stats.entropy_loss == pytest.approx(-before, rel=1e-5)
    else:
        assert moved(models, weights) == 0 and stats.entropy_loss is None


def test_an_update_uses_the_decayed_rate(job):
    """Adam's first step is as long as the learning rate."""
    one_step = changed(job, num_updates=4, num_epochs=1, minibatch_size=8, max_grad_norm=1e6)
    lengths = []
    for number in (0, 3):
        models, experience, _ = first_experience(one_step)
        before = policy_weights(models)
        one_update(one_step, models, experience, Progress(0.1, update=number))
        lengths.append(moved(models, before))
    assert lengths[1] == pytest.approx(lengths[0] / 4, rel=0.05)


def test_adam_is_set_as_the_method_says(job):
    models, _, _ = first_experience(job)
    for learner in models.learners.values():
        defaults = learner.optimizer.defaults
        assert defaults["betas"] == (0.9, 0.95) and defaults["eps"] == 1e-8
        assert defaults["weight_decay"] == 0.0


def test_gradients_are_cleared_between_steps(job, monkeypatch):
    """Also those of what did not step."""
    models, experience, _ = first_experience(job)
    step, at_start = Learner.step, []

    def watched(learner, norm):
        value = step(learner, norm)
        at_start.append(value.item())
        return value

    monkeypatch.setattr(Learner, "step", watched)
    one_update(changed(job, learning_rate=1e-30), models, experience)
    for learner in models.learners.values():
        for weight in learner.model.trained().values():
            assert weight.grad is None or not weight.grad.any()
    # without learning, the second pass finds gradients as large as the first, not twice
    policy = at_start[::2]
    assert sum(policy[2:]) == pytest.approx(sum(policy[:2]), rel=0.5)


def test_policy_and_critic_step_once_a_minibatch(job, monkeypatch):
    models, experience, _ = first_experience(job)
    steps = []
    monkeypatch.setattr(Learner, "step", lambda self, norm: steps.append(self) or torch.zeros(()))
    one_update(job, models, experience)
    names = ["policy" if one is models.learners["policy"] else "critic" for one in steps]
    assert names == ["policy", "critic"] * 4


def test_metrics_are_means_over_the_steps(job, monkeypatch):
    models, experience, _ = first_experience(job)
    norms = iter([1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0])
    monkeypatch.setattr(Learner, "step", lambda self, norm: torch.tensor(next(norms)))
    stats = one_update(job, models, experience)
    assert stats.grad_norm == 2.5 and stats.critic_grad_norm == 25.0


# the reference


def test_ema_moves_after_every_optimizer_step(job, monkeypatch):
    moves = []
    monkeypatch.setattr(Reference, "after_step", lambda self, policy: moves.append(policy))
    models, experience, _ = first_experience(job)
    one_update(job, models, experience)
    assert moves == [models.policy] * 4


def test_a_still_reference_does_not_follow(job):
    models, experience, _ = first_experience(job)
    before = {n: w.clone() for n, w in models.reference.models[0].weights()}
    one_update(job, models, experience)
    assert not models.reference.after_update(models.policy, 1)
    assert all(torch.equal(w, before[n]) for n, w in models.reference.models[0].weights())


@pytest.mark.parametrize(("optimizer", "kept"), [(True, False), (False, True)])
def test_a_reset_clears_the_optimizers_if_asked(optimizer, kept, job):
    rule = ReferenceRule((job.init,), reset_every=2, reset_optimizer=optimizer)
    moving = replace(job, reference=rule)
    models, experience, metrics = first_experience(moving)
    one_update(moving, models, experience)
    progress = rl.advance(models, Progress(0.1), moving.config, metrics)  # no reset is due
    assert all(learner.optimizer.state for learner in models.learners.values())
    rl.advance(models, progress, moving.config, metrics)
    assert all(bool(one.optimizer.state) == kept for one in models.learners.values())


def test_the_reference_is_verified_when_it_is_loaded(make_checkpoint):
    checkpoint = make_checkpoint("llama", 0)
    broken = Checkpoint(checkpoint.path, "0" * 64)
    with pytest.raises(CheckpointError, match="changed since it was made"):
        Reference(ReferenceRule((broken,)), FP32)


def test_a_moving_reference_is_put_back(job, make_checkpoint):
    rule = ReferenceRule((job.init,), ema=0.5)
    reference = Reference(rule, FP32)
    reference.after_step(LanguageModel.load(make_checkpoint("llama", 1).path, FP32))
    state = reference.state()
    state = state | {"weights": {n: w.clone() for n, w in state["weights"].items()}}
    again = Reference(rule, FP32)
    again.load_state(state, job.init.path)
    for (name, ours), (_, theirs) in zip(
        reference.models[0].weights(), again.models[0].weights(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_hash_of_weights_covers_every_tensor_and_name():
    weights = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([3.0])}
    whole = sha256_of(weights.items())
    assert whole == sha256_of(reversed(weights.items()))
    for name in weights:
        assert sha256_of((weights | {name: weights[name] + 1}).items()) != whole
    assert sha256_of([("c", weights["b"]), ("a", weights["a"])]) != whole


def test_a_reference_of_none_does_not_pull(job, tmp_path, make_checkpoint, monkeypatch):
    """β is 0 from the start: in the reward, in the metrics and in the loss."""
    seen = []

    def stop(models, rollout, prompts, setup, source, progress):
        seen.append(progress.kl_coef)
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "compute_experience", stop)
    for pulls, expected in ((False, 0.0), (True, 0.1)):
        rule = ReferenceRule((make_checkpoint("llama", 1),), pulls=pulls)
        (tmp_path / str(pulls)).mkdir()
        with pytest.raises(KeyboardInterrupt):
            rl.train_rl(replace(job, reference=rule), tmp_path / str(pulls), FP32)
        assert seen[-1] == expected


# β, scores and their moments


def test_beta_as_it_is_now_weighs_the_penalty(apart):
    _, experience, metrics = first_experience(apart, progress=Progress(0.7))
    kl = (experience.logprobs - experience.ref_logprobs).sum(1)
    expected = experience.scores - 0.7 * kl
    torch.testing.assert_close(experience.rewards.sum(1), expected, rtol=1e-4, atol=1e-5)
    assert metrics["kl_coef"] == 0.7 and apart.config.kl_coef == 0.1


def test_beta_as_it_is_now_weighs_the_loss(apart):
    """With advantages of 0 the whole gradient is β times that of the KL."""
    in_loss = changed(
        apart, kl_in="loss", kl_kind="k3", num_epochs=1, minibatch_size=8, max_grad_norm=1e9
    )
    norms = {}
    for beta in (0.5, 1.0):
        models, experience, _ = first_experience(in_loss)
        experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
        norms[beta] = one_update(in_loss, models, experience, Progress(beta)).grad_norm
    assert norms[1.0] == pytest.approx(2 * norms[0.5], rel=1e-4) and norms[0.5] > 1e-3


@pytest.mark.parametrize(
    ("setting", "epochs"),
    [("from_second_pass", [False, True]), ("always", [True, True]), ("never", [False, False])],
)
def test_the_ratio_weighs_the_kl_in_the_passes_that_were_asked_for(
    setting, epochs, job, monkeypatch
):
    in_loss = changed(job, kl_in="loss", kl_kind="k2", minibatch_size=8, kl_importance=setting)
    seen, real = [], rl.objectives.kl_loss
    monkeypatch.setattr(
        rl.objectives, "kl_loss", lambda *a, **k: seen.append(k["importance"]) or real(*a, **k)
    )
    models, experience, _ = first_experience(in_loss)
    one_update(in_loss, models, experience)
    assert seen == epochs


def test_beta_adapts_to_the_measured_kl_per_response(job):
    adaptive = changed(job, adaptive_kl=AdaptiveKL(target=2.0, horizon=80).model_dump())
    models, _, metrics = first_experience(adaptive)
    after = rl.advance(models, Progress(0.5), adaptive.config, metrics | {"kl": 2.2})
    assert after.kl_coef == pytest.approx(0.5 * (1 + 0.1 * 8 / 80)) and after.update == 1
    assert after.rewards == (metrics["reward"],)


def test_the_moments_are_those_of_all_scores_so_far(job):
    normalised = changed(job, normalize_scores=True)
    models, source = rl.load(normalised, FP32)
    prompts = drawn(job, 0)
    rollout = rl.collect_rollout(models.policy, source, prompts, generator()).rollout
    before = Moments(100, 5.0, 99.0)
    _, metrics, after = rl.compute_experience(
        models, rollout, prompts, normalised, source, Progress(0.1, moments=before)
    )
    assert after.n == 108
    assert after.mean == pytest.approx((5.0 * 100 + metrics["score"] * 8) / 108)


def test_a_run_carries_the_moments_on(job, tmp_path):
    """After two updates of 8 episodes the checkpoint has seen 16 scores."""
    run_killed(job, tmp_path / "a", 3, normalize_scores=True)
    state = load_state(state_file(tmp_path / "a" / "resume", 2))
    assert state["progress"]["moments"][0] == 16


# temperature


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_old_and_reference_logprobs_are_under_the_temperature(temperature, apart):
    """Oracle: transformers' own logits, divided by the temperature."""
    warm = changed(apart, temperature=temperature)
    models, experience, _ = first_experience(warm)
    rollout = experience.rollout
    for model, ours in (
        (models.policy, experience.logprobs),
        (models.reference.models[0], experience.ref_logprobs),
    ):
        for b in range(3):
            ids = rollout.tokens[b][rollout.mask[b]]
            with torch.no_grad():
                logits = model.backbone(ids[None]).logits[0] / temperature
            n = int(rollout.lengths[b])
            expected = logits.log_softmax(-1)[-n - 1 : -1].gather(-1, ids[-n:, None]).squeeze(-1)
            torch.testing.assert_close(ours[b, :n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_new_logprobs_are_under_the_temperature_too(temperature, job):
    """Before the first step the ratio is 1."""
    warm = changed(job, temperature=temperature, num_epochs=1, minibatch_size=8)
    models, experience, _ = first_experience(warm)
    assert one_update(warm, models, experience).ratio == pytest.approx(1.0, abs=1e-5)


# stale samples, checkpoints, the best policy


def test_samples_of_other_weights_stop_the_run(job):
    models, source = rl.load(job, FP32)
    stale = source.sampler.generate([p.ids for p in drawn(job, 0)], source.sampling, generator())
    with torch.no_grad():
        next(iter(models.policy.trained().values())).add_(1e-3)
    models.policy.sync()
    source = replace(source, sampler=SimpleNamespace(generate=lambda *args: stale))
    with pytest.raises(WorkFailed, match="stale"):
        rl.collect_rollout(models.policy, source, drawn(job, 0), generator())


@pytest.mark.parametrize("kind", [{}, {"critic": "head"}, GRPO, {"lora": {"rank": 2}}], ids=str)
def test_a_checkpoint_holds_all_that_changes(kind, job, tmp_path):
    kind = changed(job, **kind)
    models, experience, _ = first_experience(kind)
    one_update(kind, models, experience)
    progress = Progress(0.37, update=2, moments=Moments(8, 1.5, 3.0), rewards=(0.5, 0.7))
    kept = save_progress(models, progress, tmp_path, keep_last=2)
    assert kept.best == (2, pytest.approx(0.6)) and kept.rewards == ()
    fresh, _ = rl.load(kind, FP32)
    assert load_progress(fresh, tmp_path) == kept == replace(progress, best=kept.best, rewards=())
    assert fresh.learners.keys() == models.learners.keys()
    for name, learner in models.learners.items():
        other = fresh.learners[name]
        for key, weight in learner.model.trained().items():
            assert torch.equal(weight, other.model.trained()[key]), (name, key)
        ours, theirs = learner.optimizer.state_dict(), other.optimizer.state_dict()
        assert ours["state"].keys() == theirs["state"].keys() != set()
        for number, moments in ours["state"].items():
            assert all(torch.equal(v, theirs["state"][number][k]) for k, v in moments.items())


def test_moments_are_divided_like_their_own_weight_where_another_has_none(job, monkeypatch):
    """Adam's states have numbers; a weight that never had a gradient has no state, and the numbers go on."""
    models, experience, _ = first_experience(job)
    one_update(job, models, experience)
    learner = models.learners["policy"]
    weights = list(learner.model.trained().values())
    del learner.optimizer.state[weights[0]]
    state = learner.state()
    moments = state["optimizer"]["state"]
    likes = {}

    def noted(x, like):
        likes[id(x)] = like
        return x

    monkeypatch.setattr(rl_models, "divided_like", noted)
    learner.load_state(state)
    assert 0 not in moments and 1 in moments
    for number, of in moments.items():
        assert likes[id(of["exp_avg"])] is weights[number]


def test_weights_that_are_not_finite_are_not_saved(job, tmp_path):
    models, _, _ = first_experience(job)
    with torch.no_grad():
        next(iter(models.learners["critic"].model.trained().values())).fill_(math.nan)
    with pytest.raises(WorkFailed, match="the critic's weights hold NaN"):
        save_progress(models, Progress(0.1, 2, rewards=(0.0,)), tmp_path, keep_last=2)
    assert not state_file(tmp_path, 2).exists()


@pytest.mark.parametrize(("best", "returns"), [(0.9, True), (0.3, False)])
def test_select_best_returns_to_the_best_checkpoint(best, returns, job, tmp_path):
    models, experience, _ = first_experience(job)
    save_progress(models, Progress(0.1, 2, rewards=(best,)), tmp_path, keep_last=2)
    before = policy_weights(models)
    one_update(job, models, experience)
    assert moved(models, before) > 0
    progress = Progress(0.1, 4, rewards=(0.5, 0.7), best=(2, best))
    rl._return_to_best(models, progress, tmp_path, "test", Select())
    assert (moved(models, before) == 0) == returns


@pytest.mark.parametrize(
    ("now", "kl", "best", "budget", "returns"),
    [
        ((0.5,), 3.0, (2, 0.3), 2.0, True),  # the last policy is better and over the budget
        ((0.5,), 1.0, (2, 0.3), 2.0, False),
        ((), 1.0, (2, 0.3), None, True),  # stopped right after a checkpoint that was not the best
        ((), 1.0, (4, 0.3), None, False),  # that one is the best
        ((0.5,), 3.0, None, 2.0, False),  # nothing was within the budget
    ],
)
def test_selection_within_a_kl_budget(now, kl, best, budget, returns, job, tmp_path, capsys):
    models, experience, _ = first_experience(job)
    save_progress(models, Progress(0.1, 2, rewards=(0.3,)), tmp_path, keep_last=2)
    before = policy_weights(models)
    one_update(job, models, experience)
    progress = Progress(0.1, 4, rewards=now, best=best, kl=kl)
    rl._return_to_best(models, progress, tmp_path, "test", Select(kl=budget))
    assert (moved(models, before) == 0) == returns
    assert ("no checkpoint is within select.kl=2" in capsys.readouterr().err) == (best is None)


def test_what_is_over_the_budget_is_not_the_best(job, tmp_path):
    models, _, _ = first_experience(job)
    progress = Progress(0.1)
    for update, reward, kl in ((1, 0.9, 5.0), (2, 0.2, 1.0), (3, 0.8, 3.1), (4, 0.1, 0.5)):
        progress = replace(progress, update=update, rewards=(reward,), kl=kl)
        progress = save_progress(models, progress, tmp_path, keep_last=1, within=3.0)
        assert progress.best == (None if update == 1 else (2, 0.2))
    assert sorted(p.name[-4] for p in tmp_path.glob("state-*")) == ["2", "4"]


@pytest.mark.parametrize(
    ("progress", "reason"),
    [
        (Progress(0.1, 4, best=(2, 0.5), kl=7.9), None),
        (Progress(0.1, 4, best=(2, 0.5), kl=8.1), "its KL 8.1 is above rl.stop.kl=8"),
        (Progress(0.1, 7, best=(2, 0.5)), None),
        (Progress(0.1, 8, best=(2, 0.5)), "no checkpoint since update 2 is better than its mean gold of 0.5"),
        (Progress(0.1, 80), None),
    ],
)  # fmt: skip
def test_when_a_run_stops(progress, reason, job):
    rules = {"stop": {"kl": 8, "patience": 3}, "select": {"metric": "gold"}, "checkpoint_every": 2}
    monitored = replace(job, monitors={"gold": ascii_share})
    assert rl.stop_reason(progress, changed(monitored, **rules).config) == reason
    assert rl.stop_reason(progress, job.config) is None


def test_a_metric_that_is_not_measured_is_refused(job):
    with pytest.raises(
        ConfigError, match=r"select.metric='gold' is not measured here. Known: reward, score."
    ):
        changed(job, select={"metric": "gold"})


def test_the_best_checkpoint_is_the_one_with_the_highest_reward(job, tmp_path):
    models, _, _ = first_experience(job)
    progress = save_progress(models, Progress(0.1, 1, rewards=(0.9,)), tmp_path, keep_last=1)
    for update, reward in ((2, 0.5), (3, 0.7)):
        progress = replace(progress, update=update, rewards=(reward,))
        progress = save_progress(models, progress, tmp_path, keep_last=1)
    assert progress.best == (1, 0.9)
    assert sorted(p.name for p in tmp_path.glob("state-*")) == [
        "state-000001.pt",
        "state-000003.pt",
    ]


def test_rows_of_an_experience_stay_together(job):
    _, experience, _ = first_experience(job)
    part = rows_of(experience, torch.tensor([3, 1]))
    assert torch.equal(part.rollout.response[0], experience.rollout.response[3])
    assert torch.equal(part.advantages[1], experience.advantages[1])


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_every_reference_is_a_forward_pass_of_the_work(job, make_checkpoint, algorithm):
    """The FLOPs behind mfu_*: gradients thrice a forward pass, the critic's where there is one."""
    setup = changed(job, algorithm=algorithm, group_size=4, num_epochs=2)
    others, done = [make_checkpoint("llama", seed) for seed in (1, 2)], {}
    for count in (1, 2):
        rule = ReferenceRule(tuple(others[:count]), (1.0,) if count == 1 else (0.5, 0.5))
        models, experience, _ = first_experience(replace(setup, reference=rule))
        done[count] = rl._work(models, experience.rollout, setup.config)
    policy = done[1]["rollout"].flops
    assert done[2]["experience"].flops - done[1]["experience"].flops == policy
    critic = done[1]["experience"].flops - 2 * policy
    assert (critic > 0) == (algorithm == "ppo")
    assert done[2]["update"].flops == 3 * 2 * (policy + critic)
    assert done[1]["update"].tokens == 2 * done[1]["experience"].tokens
