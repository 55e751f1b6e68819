"""Every gate of `salsa doctor` on made-up evidence: sound where all is well, faulty where one thing is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from salsa.doctor import (
    advantages,
    critic,
    data,
    evaluation,
    hacking,
    kl,
    optimisation,
    reward,
    rollout,
    sft,
)
from salsa.doctor.evidence import (
    SFT,
    Data,
    Episodes,
    Likelihood,
    Pairs,
    Reward,
    RLRun,
    Samples,
    Source,
)
from salsa.doctor.findings import Finding, diagnosis, p_above, p_below, p_mean_above
from salsa.doctor.terminal import lines

RNG = np.random.default_rng(0)
CONFIG = {
    "kl_in": "reward", "kl_kind": "k1", "algorithm": "ppo", "gamma": 1.0, "gae_lambda": 0.95, "max_new_tokens": 12,
    "temperature": 0.7, "rollout_size": 32, "clip_range": 0.2, "group_size": 1, "num_epochs": 2,
    "minibatch_size": None,
}  # fmt: skip
BETA, EOS = 0.1, 2
WORDS = [
    "kitchen",
    "window",
    "evening",
    "holiday",
    "river",
    "garden",
    "music",
    "winter",
    "coffee",
    "train",
]


def verdicts(*findings: Finding | None) -> list[str]:
    return [finding.verdict for finding in findings if finding is not None]


# data


def source(role: str, count: int, start: int = 0) -> Source:
    return Source(
        role, [f"a rather long question with the number {start + i}" for i in range(count)]
    )


def pairs(count: int = 400, noise: float = 0.2, flipped: float = 0.0, longer: float = 0.5) -> Pairs:
    """Pairs whose labels follow Bradley and Terry on made-up scores, a share of them flipped."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, count))
    prefer = rng.random(count) < 1 / (1 + np.exp(-(a - b) / noise))
    prefer ^= rng.random(count) < flipped
    scores = np.where(prefer[:, None], np.stack([a, b], 1), np.stack([b, a], 1))
    long_first = rng.random(count) < longer
    texts = [("one two three four", "one two")[:: 1 if first else -1] for first in long_first]
    return Pairs([""] * count, [t[0] for t in texts], [t[1] for t in texts], scores, noise)


def test_marks_of_the_template_inside_messages():
    well = Data(marks=("<|end|>",), contents=["hello there"] * 90)
    assert data.template_marks(well).verdict == "sound"
    ill = replace(well, contents=["<|user|>hello<|end|>"] * 20 + ["hello"] * 70)
    found = data.template_marks(ill)
    assert found.verdict == "faulty" and found.numbers["share"] == pytest.approx(20 / 90)
    assert (
        data.template_marks(replace(well, contents=["<|end|>"] * 2 + ["hello"] * 88)).verdict
        == "suspicious"
    )
    assert data.template_marks(Data()) is None


def likelihood(loss: float, end: float = 1.0, count: int = 64, seed: int = 0) -> Likelihood:
    rng = np.random.default_rng(seed)
    return Likelihood(loss + rng.normal(0, 0.1, count), end + rng.normal(0, 0.1, count))


def an_sft(**changes) -> SFT:
    """Two models that gained 0.5 nats on seen and 0.4 on unseen rows."""
    base = {"seen": likelihood(4.0, 1.0, seed=1), "unseen": likelihood(4.0, 1.0, seed=2)}
    model = lambda n: {
        "seen": likelihood(3.5, 0.8, seed=3 + n),
        "unseen": likelihood(3.6, 0.8, seed=5 + n),
    }
    plain = SFT(
        base, [model(0), model(1)], ["a" * 64, "b" * 64], "c" * 64,
        midpoint={"seen": likelihood(3.45), "unseen": likelihood(3.55)},
        renderings={"template": likelihood(3.5).loss, "twice": likelihood(3.6).loss, "bare": likelihood(4.8).loss},
        base_renderings={
            "template": likelihood(4.1).loss, "twice": likelihood(4.15).loss, "bare": likelihood(5.3).loss,
        },
        ended=np.array([1.0] * 190 + [0.0] * 10), expected_ends=0.95, vocabulary=8000,
    )  # fmt: skip
    return replace(plain, **changes)


def test_the_rendering_that_sft_learned():
    assert data.template_known(an_sft()).verdict == "sound"
    ill = {
        "template": likelihood(3.6).loss,
        "twice": likelihood(3.7).loss,
        "bare": likelihood(3.9).loss,
    }
    found = data.template_known(
        an_sft(renderings=ill)
    )  # bare text is still harder, and gained far more
    assert found.verdict == "faulty" and "without any template" in found.says
    assert data.template_known(an_sft(trained=False)) is None
    spoilt = {name: likelihood(9.0).loss for name in ("template", "twice", "bare")}
    found = data.template_known(an_sft(renderings=spoilt))
    assert found.verdict == "sound"  # SFT lost everywhere, least on bare text


def test_rows_at_the_length_limit():
    well = Data([source("rl", 100)], sft_tokens=[20] * 100, sft_max_length=32)
    assert data.truncated(well).verdict == "sound"
    assert data.truncated(replace(well, sft_tokens=[20] * 70 + [40] * 30)).verdict == "faulty"
    assert data.truncated(replace(well, sft_tokens=[20] * 95 + [40] * 5)).verdict == "suspicious"
    half_gone = replace(source("rl", 100), dropped=150)
    assert data.truncated(replace(well, sources=[half_gone])).verdict == "suspicious"


def test_repeated_prompts_are_worth_fewer():
    well = Data([source("rl", 400), source("eval", 100)])
    assert data.repeats(well).verdict == "sound"
    ill = Data([Source("rl", list(source("rl", 20).prompts) * 20)])
    found = data.repeats(ill)
    assert found.verdict == "faulty" and "400 prompts are worth 20 different ones" in found.says
    replies = [f"reply {i}" for i in range(400)]
    many = Data([], pairs=Pairs(["one prompt"] * 400, replies, replies[::-1]))
    assert data.repeats(many).verdict == "sound"  # a prompt may have many pairs
    labelled = replace(
        many.pairs, scores=np.zeros((400, 2))
    )  # sampled from prompts that somebody gave
    sampled = Data([Source("preferences", ["one prompt"] * 400)], pairs=labelled)
    assert "400 prompts are worth 1 different ones" in data.repeats(sampled).says
    assert data.repeats(replace(sampled, pairs=None)).verdict == "faulty"
    same = data.repeats(Data([], pairs=Pairs(["p"] * 40, ["yes"] * 40, ["no"] * 40)))
    assert same.verdict == "faulty" and "40 pairs are worth 1 different ones" in same.says


def test_held_out_prompts_that_train():
    well = Data([source("rl", 400), source("eval", 100, start=1000)])
    assert data.leaks(well).verdict == "sound"
    ill = Data([source("rl", 400), source("eval", 100, start=350)])  # half of them are shared
    found = data.leaks(ill)
    assert found.verdict == "faulty" and "50 of 100" in found.says
    greetings = Data([Source("rl", ["Hello!"] * 50), Source("eval", ["Hello!"] * 50)])
    assert data.leaks(greetings) is None or data.leaks(greetings).verdict == "sound"


def test_replies_without_a_word_and_pairs_of_equal_ones():
    well = Data(sft_replies=["yes"] * 100, pairs=pairs(100))
    assert data.empty_replies(well).verdict == "sound"
    assert (
        data.empty_replies(replace(well, sft_replies=["yes"] * 80 + [" "] * 20)).verdict == "faulty"
    )
    same = pairs(100)
    same = replace(same, rejected=[*same.chosen[:25], *same.rejected[25:]])
    found = data.empty_replies(replace(well, pairs=same))
    assert found.verdict == "faulty" and found.numbers["pairs of equal replies"] == 0.25
    silent = replace(pairs(100), chosen=[*pairs(100).chosen[:20], *[" "] * 80], scores=None)
    assert data.empty_replies(replace(well, pairs=silent)).verdict == "faulty"
    own = replace(silent, scores=np.zeros((100, 2)))  # a broken SFT model's, not the data's
    assert data.empty_replies(replace(well, pairs=own)).verdict == "suspicious"


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.5, "sound"), (0.68, "suspicious"), (0.98, "faulty"), (0.02, "faulty")]
)
def test_labels_that_follow_length(share, verdict):
    assert data.length_labels(Data(pairs=pairs(600, longer=share))).verdict == verdict


def test_labels_against_the_labeller():
    well = data.labels_follow_labeller(Data(pairs=pairs()))
    assert well.verdict == "sound"
    ill = data.labels_follow_labeller(Data(pairs=pairs(flipped=0.4)))
    assert ill.verdict == "faulty" and ill.numbers["flipped"] == pytest.approx(0.4, abs=0.1)
    assert data.labels_follow_labeller(Data(pairs=replace(pairs(), scores=None))) is None


# SFT


def test_sft_learned():
    assert sft.learned(an_sft()).verdict == "sound"
    assert sft.overfitted(an_sft()).verdict == "sound"
    memory = {"seen": likelihood(1.0, seed=3), "unseen": likelihood(5.5, seed=4)}
    found = sft.learned(an_sft(models=[memory, memory]))
    assert found.verdict == "faulty" and "by heart" in found.todo
    diverged = {"seen": likelihood(8.0, seed=3), "unseen": likelihood(8.0, seed=4)}
    assert "diverged" in sft.learned(an_sft(models=[diverged, diverged])).todo
    mild = {"seen": likelihood(3.0, seed=3), "unseen": likelihood(4.01, seed=4)}
    assert (
        verdicts(sft.learned(an_sft(models=[mild, mild])), sft.overfitted(an_sft(models=[mild])))
        == ["suspicious"] * 2
    )


def test_sft_ends_its_replies():
    assert sft.ends(an_sft()).verdict == "sound"
    lost = {"seen": likelihood(3.5, 3.0, seed=3), "unseen": likelihood(3.6, 3.0, seed=4)}
    assert sft.ends(an_sft(models=[lost, lost])).verdict == "faulty"
    ended = lambda many: an_sft(ended=np.array([1.0] * many + [0.0] * (200 - many)))
    assert [sft.ends(ended(many)).verdict for many in (190, 100, 5)] == [
        "sound",
        "suspicious",
        "faulty",
    ]
    rare = replace(ended(0), expected_ends=0.05)  # within the margin: the limit is short
    assert sft.ends(rare).verdict == "sound"


def test_sft_seeds_differ():
    assert sft.differ(an_sft()).verdict == "sound"
    assert "same model" in sft.differ(an_sft(digests=["a" * 64, "a" * 64])).says
    assert "the base itself" in sft.differ(an_sft(digests=["a" * 64, "c" * 64])).says


def test_a_barrier_between_ingredients():
    assert sft.barrier(an_sft()).verdict == "sound"
    assert sft.barrier(an_sft(midpoint={"unseen": likelihood(5.0)})).verdict == "faulty"


# reward


def a_reward(right: float, count: int = 200, size: float = 1.0) -> Reward:
    rng = np.random.default_rng(2)
    d = size * np.abs(rng.normal(1, 0.3, count)) * np.where(rng.random(count) < right, 1, -1)
    scored = np.stack([d, np.zeros(count)], axis=1)
    return Reward(scored, scored, 0.8)


def test_accuracy_of_the_reward_model():
    assert reward.accuracy(a_reward(0.72)).verdict == "sound"
    assert reward.accuracy(a_reward(0.25)).verdict == "faulty"
    assert reward.accuracy(a_reward(0.52, count=60)).verdict == "suspicious"
    known = reward.accuracy(replace(a_reward(0.72), known_prompts=9))
    assert "The prompts of 9 have other pairs that it was trained on" in known.says
    assert "other pairs" not in reward.accuracy(a_reward(0.72)).says
    exchanged = replace(a_reward(0.55), seen=a_reward(0.2).held_out)
    assert reward.accuracy(exchanged).verdict == "faulty"


def test_calibration_of_the_reward_model():
    assert reward.calibration(a_reward(0.73, count=1000)).verdict == "sound"  # σ(1) = 0.73
    assert reward.calibration(a_reward(0.73, count=1000, size=5)).verdict == "suspicious"


def samples(arm: str, mean, gold=None, trained: bool = True, **columns) -> Samples:
    """200 prompts × 2 seeds."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.3, (2, 200))
    made = {
        "proxy": noise + mean, "gold": noise + (mean if gold is None else gold),
        "length": rng.integers(5, 20, (2, 200)).astype(float), "kl_to_sft[0]": np.full((2, 200), float(trained)),
    }  # fmt: skip
    return Samples(arm, trained, source("eval", 200).prompts, made | columns, ["a reply"] * 200)


def test_length_bias_and_drift():
    before = samples("sft", 0.0, trained=False)
    assert reward.length_bias([before]).verdict == "sound"
    long = samples("sft", 0.0, trained=False, length=before.columns["proxy"] * 10 + 20)
    assert reward.length_bias([long]).verdict == "faulty"
    assert reward.drift([before, samples("ppo", 0.2)]).verdict == "sound"
    assert reward.drift([before, samples("ppo", 3.0)]).verdict == "suspicious"


# one update


def whitened(x: list[np.ndarray]) -> list[np.ndarray]:
    every = np.concatenate(x)
    return [(a - every.mean()) / every.std(ddof=1) for a in x]


def gae(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The recursion, backwards."""
    advantage, after = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        after = advantage[t] = rewards[t] + following - values[t] + 0.95 * after
    return advantage


def episodes(*, beta: float = BETA, place: int = -1, turned: int = 1, **changes) -> Episodes:
    """Twelve episodes as the loop makes them; `beta`, the score's `place` and the advantages' sign may be wrong."""
    rng = np.random.default_rng(4)
    sizes = [int(n) for n in rng.integers(4, 12, 12)]
    ragged = lambda scale=1.0: [rng.normal(0, scale, n) for n in sizes]
    ours = ragged()
    theirs = [a - d for a, d in zip(ours, ragged(0.3), strict=True)]
    values, scores = ragged(), rng.normal(0, 1, 12)
    rewards = []
    for a, b, score in zip(ours, theirs, scores, strict=True):
        rewards.append(-beta * (a - b))
        rewards[-1][place] += score
    made = [turned * a for a in whitened([gae(r, v) for r, v in zip(rewards, values, strict=True)])]
    again = {"logprobs": ours, "ref_logprobs": theirs, "values": values}
    plain = Episodes(
        run="ppo seed 0", arm="ppo", update=1, config=CONFIG, precision="fp32", kl_coef=BETA, prompts=[(1, 5)] * 12,
        responses=[[7] * (n - 1) + [EOS] for n in sizes], texts=[" ".join(WORDS[:n]) for n in sizes], eos_ids=(EOS,),
        known_prompts=True, scores=scores, logprobs=ours, ref_logprobs=theirs, sampler_logprobs=ours, values=values,
        rewards=rewards, advantages=made, returns=values, again=again, scores_again=scores,
    )  # fmt: skip
    return replace(plain, **changes)


def shifted(x, by: float):
    return [a + by for a in x]


def test_a_healthy_update_passes_every_gate():
    one = [episodes()]
    found = verdicts(
        reward.constant(one), reward.scores_in_training(one), rollout.prompts(one), rollout.ends(one, []),
        rollout.old_logprobs(one), kl.reference_used(one), kl.sign(one), critic.start(one), advantages.placement(one),
        advantages.recursion(one),
    )  # fmt: skip
    assert found == ["sound"] * 10


def test_scores_of_training_and_their_explanations():
    well = episodes()
    says = lambda scores, **more: reward.scores_in_training([replace(well, scores=scores, **more)])
    assert "shifted by one row" in says(np.roll(well.scores, 1)).says
    lengths = np.array(list(map(len, well.responses)))
    assert "follows the reply's length" in says(well.scores + 0.3 * lengths).says
    flat = np.full(12, 0.5)
    assert (
        "all the same" in says(flat).says
        and reward.constant([replace(well, scores=flat)]).verdict == "faulty"
    )
    turn = RNG.normal(size=12)
    found = says(turn, other_scores={"the user's last turn": turn})
    assert found.verdict == "faulty" and "the user's last turn" in found.says


def test_scores_are_compared_as_training_shaped_them():
    """Scaled, then clipped, then fined (`objectives.shape_scores`)."""
    settings = {**CONFIG, "score_clip": 1.0, "missing_eos_penalty": 1.0}
    well = episodes(config=settings)
    raw = well.scores * 3
    responses = [r[:-1] if i % 3 == 0 else r for i, r in enumerate(well.responses)]
    missing = np.array([i % 3 == 0 for i in range(12)])
    shown = lambda scores, **config: reward.scores_in_training(
        [replace(well, scores=scores, scores_again=raw, responses=responses, config=settings | config)]
    ).verdict  # fmt: skip
    assert shown(raw.clip(-1, 1) - missing) == "sound"
    assert shown((raw - missing).clip(-1, 1)) == "faulty"
    scaled = (raw - 0.7) / 2.5  # by the moments of some longer past
    assert shown(scaled - missing, normalize_scores=True, score_clip=None) == "sound"
    assert shown(scaled.clip(-1, 1) - missing, normalize_scores=True) == "sound"
    assert shown(np.roll(scaled, 1).clip(-1, 1) - missing, normalize_scores=True) == "faulty"


def test_a_constant_is_told_of_the_run_that_has_it():
    flat = episodes(run="salsa seed 0", scores=np.full(12, 0.5))
    assert "salsa seed 0: every reply scores 0.5" in reward.constant([episodes(), flat]).says


def test_ends_of_replies():
    well = episodes()
    open_ = replace(well, responses=[r[:-1] for r in well.responses])
    assert "leaves EOS out" in rollout.ends([open_], []).says
    beyond = replace(well, responses=[[*r, EOS] for r in well.responses])
    assert "counts padding" in rollout.ends([beyond], []).says
    full = replace(well, responses=[[7] * 12] * 12)  # at the limit a reply needs no end
    assert rollout.ends([full], []).verdict == "sound"
    assert rollout.ends([], [a_run(length=6.0, eos_rate=0.0)]).verdict == "faulty"
    assert rollout.ends([], [a_run(length=12.0, eos_rate=0.0)]).verdict == "sound"


def test_logprobs_of_policy_and_reference():
    well = episodes()
    other = shifted(well.logprobs, 0.3)
    hot = replace(well, logprobs=other, other_temperatures={"1": other})
    assert "at temperature 1" in rollout.old_logprobs([hot]).says
    off = replace(well, ref_logprobs=well.logprobs)
    assert "the policy itself" in kl.reference_used([off]).says
    base = replace(well, ref_logprobs=other, other_references={"base": other})
    assert "base" in kl.reference_used([base]).says
    assert rollout.prompts([replace(well, known_prompts=False)]).verdict == "faulty"
    rounding = replace(well, logprobs=shifted(well.logprobs, 0.02), precision="bf16")
    assert rollout.old_logprobs([rounding]).verdict == "sound"


def test_sign_of_the_penalty():
    assert kl.sign([episodes()]).numbers["share of β"] == pytest.approx(1)
    turned = kl.sign([episodes(beta=-BETA)])
    assert turned.verdict == "faulty" and turned.numbers["share of β"] == pytest.approx(-1)
    assert kl.sign([episodes(place=-2)]).verdict == "sound"  # the score's place is another gate's


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_sign_of_other_estimators(kind):
    one = episodes()
    formula = {"k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}[kind]
    rewards = [-BETA * formula(a - b) for a, b in zip(one.logprobs, one.ref_logprobs, strict=True)]
    other = replace(one, rewards=rewards, config=CONFIG | {"kl_kind": kind})
    assert kl.sign([other]).numbers["share of β"] == pytest.approx(1)
    assert kl.sign([replace(other, config=CONFIG)]).verdict == "faulty"


def test_the_scores_place_and_the_recursion():
    early = advantages.placement([episodes(place=-2)])
    assert early.verdict == "faulty" and "1 before the last token" in early.says
    assert advantages.recursion([episodes(place=-2)]).verdict == "sound"
    assert advantages.recursion([episodes(turned=-1)]).verdict == "faulty"
    longer_memory = episodes(config=CONFIG | {"gae_lambda": 0.5})
    assert advantages.recursion([longer_memory]).verdict == "faulty"


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_advantages_against_the_group(algorithm):
    one = episodes()
    totals = [float(r.sum()) for r in one.rewards]
    of_episode = []
    for row, total in enumerate(totals):
        group = totals[row // 4 * 4 : row // 4 * 4 + 4]
        if algorithm == "rloo":
            of_episode.append(total - (sum(group) - total) / 3)
        else:
            mean = sum(group) / 4
            sd = (sum((g - mean) ** 2 for g in group) / 3) ** 0.5
            of_episode.append((total - mean) / (sd + 1e-4))
    made = [np.full(len(r), a) for r, a in zip(one.rewards, of_episode, strict=True)]
    group = replace(one, advantages=made, config=CONFIG | {"algorithm": algorithm, "group_size": 4})
    assert advantages.recursion([group]).verdict == "sound"
    cut = {name: list(getattr(group, name))[:10] for name in ("rewards", "values", "advantages")}
    assert advantages.recursion([replace(group, **cut)]).verdict == "sound"  # ends within a group
    assert advantages.recursion([replace(group, advantages=[-a for a in made])]).verdict == "faulty"


def test_where_the_critic_starts():
    well = episodes()
    late = [np.append(v[1:], 0.7) for v in well.values]
    found = critic.start([replace(well, values=late, late_values=late)])
    assert found.verdict == "faulty" and "one position late" in found.says


# a run


def a_run(name: str = "ppo seed 0", **row) -> RLRun:
    """Twelve updates in which the score rises; `row` changes every update."""
    rows = []
    for step in range(1, 13):
        one = {
            "step": step, "score": 0.1 * step, "score_std": 0.8, "kl": 0.3 * step, "kl_stderr": 0.1, "kl_coef": BETA,
            "entropy": 2.0, "length": 10.0, "eos_rate": 0.9, "explained_variance": 0.4 + 0.02 * (step % 3),
            "approx_kl": 0.02, "clip_fraction": 0.1, "grad_norm": 1.0, "sampler_gap": 1e-6, "gold": 0.1 * step,
        }  # fmt: skip
        rows.append(one | row)
    return RLRun(
        name, name.split()[0], rows, CONFIG, "fp32", policy_moved=True, critic_moved=True, named_reference=name,
        reference_digest="a" * 64, expected_digest="a" * 64, vocabulary=8000,
    )  # fmt: skip


def test_a_healthy_run_passes_every_gate():
    two = [a_run(), a_run("salsa seed 0")]
    found = verdicts(
        rollout.sampler(two), kl.reference_named(two), kl.negative(two), kl.weight(two, 400), critic.trained(two),
        critic.explained(two), advantages.signal(two), optimisation.moved(two), optimisation.step_size(two),
        optimisation.improves(two), hacking.over_optimised(two, ["gold"]),
    )  # fmt: skip
    assert found == ["sound"] * 11


def test_sampler_against_trainer():
    assert rollout.sampler([a_run(sampler_gap=0.01)]).verdict == "faulty"
    stale = a_run()
    stale = replace(
        stale, rows=[r | {"sampler_gap": 1e-6 if r["step"] == 1 else 0.2} for r in stale.rows]
    )
    assert "old weights" in rollout.sampler([stale]).todo
    bf16 = replace(a_run(sampler_gap=0.01), precision="bf16")
    assert rollout.sampler([bf16]).verdict == "sound"


def test_the_reference_by_digest_and_a_negative_kl():
    assert kl.reference_named([replace(a_run(), reference_digest="b" * 64)]).verdict == "faulty"
    assert kl.negative([a_run(kl=-1.0)]).verdict == "faulty"
    assert kl.negative([a_run(kl=-0.05)]).verdict == "sound"  # within the noise of k1


def test_the_weight_of_the_penalty():
    two = lambda **row: [a_run(**row), a_run("salsa seed 0", **row)]
    strong = kl.weight(two(kl_coef=10.0), 200)
    assert strong.verdict == "faulty" and "best policy at this β" in strong.says
    # σ²/β = 0.064 is 0.08 σ; 200 replies an arm see 2.8·√(2/200) = 0.28 σ
    assert strong.numbers["possible gain over what can be seen"] == pytest.approx(
        0.08 / 0.2802, rel=1e-3
    )
    weak = kl.weight(two(kl_coef=0.001), 200)
    assert weak.verdict == "faulty" and "nothing is held back" in weak.says
    assert (
        kl.weight([a_run(kl_coef=0.001)], 200).verdict == "suspicious"
    )  # no references are compared
    assert kl.weight([replace(a_run(kl_coef=0.0), pulls=False)], 200) is None
    assert kl.weight(two(kl=0.001), 200).verdict == "suspicious"


def test_critic_policy_and_steps():
    assert critic.trained([replace(a_run(), critic_moved=False)]).verdict == "faulty"
    assert critic.explained([a_run(explained_variance=-0.2)]).verdict == "suspicious"
    assert optimisation.moved([replace(a_run(), policy_moved=False)]).verdict == "faulty"
    assert optimisation.moved([a_run(grad_norm=0.0)]).verdict == "suspicious"
    # two steps, of which the first sees nothing: 1.2 nats are 2.4 after the first one, more than the 2 there were
    assert optimisation.step_size([a_run(approx_kl=1.2)]).verdict == "faulty"
    assert optimisation.step_size([a_run(approx_kl=0.9)]).verdict == "suspicious"
    jumped = a_run()
    jumped = replace(
        jumped, rows=[r | {"kl": 0.0 if r["step"] == 1 else 30.0} for r in jumped.rows]
    )
    assert optimisation.step_size([jumped]).numbers["largest step"] == pytest.approx(
        (30 - 3 * 0.1 * 2**0.5) / 10 / 2
    )
    fell = replace(a_run(), rows=[r | {"score": -r["score"]} for r in a_run().rows])
    assert optimisation.improves([fell]).verdict == "suspicious"


def test_signal_against_penalty_before_any_step():
    # deviation of the penalty β·stderr·√32 = 5.66·β·stderr; a share of 1/32 of the variance is one reply
    noisy = advantages.signal([a_run(kl_coef=10.0, kl_stderr=0.2)])
    assert noisy.verdict == "faulty"
    share = 0.64 / (0.64 + (10 * 0.2) ** 2 * 32)
    assert noisy.numbers["replies' worth at the start"] == pytest.approx(32 * share)
    later = a_run()
    later = replace(
        later, rows=[r | {"kl_stderr": 0.0 if r["step"] == 1 else 8.0} for r in later.rows]
    )
    assert advantages.signal([later]).verdict == "suspicious"


# the end of it


def test_proxy_against_gold():
    before = samples("sft", 0.0, trained=False)
    judge = lambda arm: hacking.proxy_against_gold([before, arm], ["gold"]).verdict
    assert judge(samples("ppo", 1.0)) == "sound"
    assert judge(samples("ppo", 1.0, gold=-0.5)) == "faulty"
    assert judge(samples("ppo", 1.0, gold=0.0)) == "suspicious"
    assert judge(samples("ppo", -1.0, gold=-0.5)) == "sound"  # nothing was raised


def test_a_held_out_score_that_was_better_earlier():
    peaked = [
        replace(
            r,
            rows=[
                row | {"gold": (1.0, 2.0, 0.5)[(row["step"] - 1) // 4] + 0.01 * i} for row in r.rows
            ],
        )
        for i, r in enumerate([a_run(), a_run("ppo seed 1"), a_run("ppo seed 2")])
    ]
    assert hacking.over_optimised(peaked, ["gold"]).verdict == "suspicious"


def test_scores_of_the_evaluation():
    one = samples("ppo", 1.0)
    well = replace(one, proxy_again=one.columns["proxy"][0][:32])
    assert evaluation.scores([well], "fp32").verdict == "sound"
    ill = evaluation.scores([replace(well, proxy_again=np.roll(well.proxy_again, 1))], "fp32")
    assert ill.verdict == "faulty" and "shifted by one row" in ill.says


def test_arms_that_cannot_be_paired():
    before, arm = samples("sft", 0.0, trained=False), samples("ppo", 1.0)
    assert evaluation.paired([before, arm]).verdict == "sound"
    assert (
        evaluation.paired([before, replace(arm, prompts=list(arm.prompts)[::-1])]).verdict
        == "faulty"
    )
    moved = samples("sft", 0.0, trained=False, **{"kl_to_sft[0]": np.full((2, 200), 0.4)})
    assert evaluation.paired([moved, arm]).verdict == "faulty"


def test_what_the_evaluation_could_see():
    rng = np.random.default_rng(5)
    base = samples("ppo", 1.0)
    other = samples("salsa", 1.0, proxy=base.columns["proxy"] + rng.normal(0, 1, (2, 200)))
    before = samples("sft", 0.0, trained=False)
    found = evaluation.power([before, base, other], "ppo")
    differences = other.columns["proxy"] - base.columns["proxy"]
    over_prompts = differences.mean(axis=0).std(ddof=1) / 200**0.5
    over_seeds = differences.mean(axis=1).std(ddof=1) / 2**0.5
    assert found.verdict == "sound"
    assert found.numbers["smallest difference"] == pytest.approx(
        2.8016 * max(over_prompts, over_seeds), rel=1e-4
    )
    nothing = samples("ppo", 0.0, proxy=before.columns["proxy"] + 0.001)
    assert (
        evaluation.power([before, nothing, replace(other, arm="salsa")], "ppo").verdict
        == "suspicious"
    )


# together


def test_the_first_faulty_stage_is_the_culprit():
    later = Finding("kl", "sign", "faulty", "…", "mend it")
    first = Finding("reward", "scores", "faulty", "…", "mend it", samples=["a", "b"])
    odd = Finding("data", "labels", "suspicious", "…", "look at it", {"x": float("nan")})
    found = diagnosis("run", [later, None, odd, first])
    assert (found.verdict, found.culprit) == ("faulty", "reward")
    rows = {
        row["gate"]: row["consequence"]
        for row in json.loads(json.dumps(found.as_json()))["findings"]
    }
    assert rows == {"labels": False, "scores": False, "sign": True}
    assert diagnosis("run", [odd]).culprit == "data"
    assert diagnosis("run", []).culprit is None
    text = "\n".join(lines(found))
    assert "FAULTY at reward (scores)" in text and "→ mend it" in text


def test_the_tests_keep_their_level():
    """On data without an effect a one-sided 5 % test says so in 5 % of cases, within three standard errors."""
    rng = np.random.default_rng(6)
    false = np.mean([p_mean_above(rng.normal(size=20)) < 0.05 for _ in range(4000)])
    assert false == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / 4000) ** 0.5)
    assert p_above(3, 4, 0.5) == pytest.approx(5 / 16) and p_below(1, 4, 0.5) == pytest.approx(
        5 / 16
    )
