"""Every anchor against a hand calculation, and what a resumed run refuses."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from salsa import make_soup, models, objectives
from salsa.artifacts import Checkpoint
from salsa.config import Recipe, SoupConfig
from salsa.config.expressions import ReferenceRule, parse_model
from salsa.errors import CheckpointError
from salsa.models import LanguageModel
from salsa.references import Reference
from salsa.resolve import Models
from salsa.runtime.checkpoint import load_state, save_state, saved_steps, state_file
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph, Node
from tests.conftest import tiny_model
from tests.tiny_rl import FP32, changed, first_experience, run, run_killed


@pytest.fixture(scope="module")
def trio(make_checkpoint):
    return [make_checkpoint("llama", seed) for seed in range(3)]


def recipe_of(soup: SoupConfig) -> Recipe:
    """A recipe of which only `soup:` matters here."""
    return Recipe.model_validate(
        {
            "name": "a", "model": {"path": "x"}, "sft": {"checkpoints": ["a/0", "a/1"]},
            "soup": soup.model_dump(), "reward": {"functions": [{"call": "a:b"}]},
            "rl": {"kl_coef": 0.1, "prompts": "p", "arms": {"a": {"init": "base", "reference": "base"}}},
            "eval": {"prompts": "p", "baseline": "a"},
        }
    )  # fmt: skip


class Made:
    """The checkpoints of model expressions, made when they are asked for."""

    def __init__(self, path, trio, soup: SoupConfig) -> None:
        self.run = RunDirectory(path)
        given = [Node(f"given {i}", (), lambda c=c: c) for i, c in enumerate(trio)]
        self.models = Models(recipe_of(soup), given[2], given[:2], self.run.hashes)

    def __getitem__(self, text: str) -> Checkpoint:
        node = self.models[parse_model(text)]
        with self.run.opened("recipe"):
            graph = Graph(self.run)
            graph.finish([node])
        return graph[node]


@pytest.fixture(scope="module")
def made(trio, tmp_path_factory):
    return Made(tmp_path_factory.mktemp("runs") / "run", trio, SoupConfig(weights=(0.25, 0.75)))


def numbers(checkpoint):
    tensors = load_file(checkpoint.path / "model.safetensors")
    return {key: value.double().numpy() for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("expression", "factors"),
    [
        ("sft[1]", (0, 1, 0)),
        ("base", (0, 0, 1)),
        ("soup", (0.25, 0.75, 0)),
        ("soup[0,1]", (0.5, 0.5, 0)),
        ("soup(0.25*sft[0], 0.75*sft[1])", (0.25, 0.75, 0)),
        ("soup(0*sft[0], 1*sft[1])", (0, 1, 0)),
        ("soup(0.5*sft[0], 0.5*base)", (0.5, 0, 0.5)),
        ("shrink(sft[0], base, 0.7)", (0.7, 0, 0.3)),
        ("shrink(soup, base, 0.5)", (0.125, 0.375, 0.5)),
    ],
)
def test_models_of_weight_arithmetic(expression, factors, made, trio):
    """base + a·(sft − base), Σ w_i θ_i: in float64, by hand."""
    result, parts = numbers(made[expression]), [numbers(checkpoint) for checkpoint in trio]
    for key, value in result.items():
        expected = sum(f * part[key] for f, part in zip(factors, parts, strict=True))
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    assert made[expression].digest == made[expression].digest


def test_shrinking_to_a_soups_norm(made, trio):
    """The control of METHOD's claims: one SFT model, as near to the base as the soup is."""
    base, sft, soup, near = (
        numbers(checkpoint)
        for checkpoint in (trio[2], trio[0], made["soup"], made["shrink(sft[0], base, soup)"])
    )
    norm = lambda one: sum(((one[k] - base[k]) ** 2).sum() for k in base) ** 0.5
    assert norm(near) == pytest.approx(norm(soup), rel=1e-5) and norm(near) < norm(sft)
    share = norm(soup) / norm(sft)
    for key, value in near.items():
        expected = base[key] + share * (sft[key] - base[key])
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"method": "slerp"}, {"method": "model_stock"}, {"method": "wise", "alpha": 0.5}, {"method": "greedy"}],
    ids=lambda options: options["method"],
)  # fmt: skip
def test_every_method_of_the_soup_engine(options, trio, tmp_path, monkeypatch):
    """`soup:` of a recipe gives what `make_soup` gives."""
    score = lambda path: -float(abs(numbers(Checkpoint.of(path))["model.norm.weight"]).sum())
    monkeypatch.setitem(sys.modules, "my_score", types.SimpleNamespace(score=score))
    greedy = options["method"] == "greedy"
    config = SoupConfig(**options | ({"score": "my_score:score"} if greedy else {}))
    made = Made(tmp_path / "run", trio, config)["soup"]
    given = options | ({"score": score} if greedy else {"base": trio[2].path})
    expected = make_soup([c.path for c in trio[:2]], out=tmp_path / "soup", **given)
    assert made.digest == expected.digest


def test_mixture_is_the_weighted_sum_of_kls(job, trio):
    """Σ a_i·KL(π ‖ π_i), each computed by a run of its own."""
    alone = []
    for checkpoint in trio[1:]:
        _, _, figures = first_experience(replace(job, reference=checkpoint))
        alone.append(figures["kl"])
    mixed = ReferenceRule((trio[1], trio[2]), (0.3, 0.7))
    _, experience, figures = first_experience(replace(job, reference=mixed))
    assert figures["kl"] == pytest.approx(0.3 * alone[0] + 0.7 * alone[1], rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=0.01)
    expected = experience.scores.mean() - job.config.kl_coef * figures["kl"]
    assert figures["reward"] == pytest.approx(expected.item(), rel=1e-4)


def test_exact_kl_of_a_mixture():
    """With whole distributions: E_π[log π − Σ a_i log π_i] = Σ a_i KL(π ‖ π_i)."""
    generator = torch.Generator().manual_seed(0)
    own, one, two = (torch.randn(7, generator=generator).double().log_softmax(0) for _ in range(3))
    mixed = 0.3 * one + 0.7 * two
    found = (own.exp() * objectives.kl_estimate(own, mixed, "k1")).sum()
    kls = [objectives.categorical_kl(own, other) for other in (one, two)]
    torch.testing.assert_close(found, 0.3 * kls[0] + 0.7 * kls[1])


def test_ema_by_hand(trio):
    """θ ← (1−μ)·θ + μ·θ_policy, twice, in float64; the small steps are not lost as they would be in bf16."""
    reference = Reference(ReferenceRule((trio[0],), ema=0.01), FP32)
    start = {k: v.double().clone() for k, v in reference.models[0].weights()}
    policies = [tiny_model("llama", 0), tiny_model("llama", 0)]
    for number, policy in enumerate(policies):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 1e-3 * (number + 1) * torch.randn_like(parameter)
        reference.after_step(LanguageModel(policy, FP32))
    first, second = (dict(policy.named_parameters()) for policy in policies)
    moved = 0
    for key, value in reference.models[0].weights():
        expected = 0.99 * (0.99 * start[key] + 0.01 * first[key]) + 0.01 * second[key]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-6, atol=1e-8)
        moved += (value.double() != start[key]).sum().item() / value.numel()
    assert value.dtype == torch.float32 and moved / len(start) > 0.95


def test_ema_follows_the_policy_at_every_optimizer_step(job, tmp_path):
    """One update of one step: the anchor that is written is (1−μ)·start + μ·policy."""
    rule = ReferenceRule((job.init,), ema=0.25)
    run(replace(job, reference=rule), tmp_path / "a", num_updates=1, num_epochs=1, minibatch_size=8)
    start, policy, anchor = (
        numbers(Checkpoint.of(path))
        for path in (job.init.path, tmp_path / "a", tmp_path / "a" / "reference")
    )
    for key, value in anchor.items():
        np.testing.assert_allclose(value, 0.75 * start[key] + 0.25 * policy[key], atol=1e-7)
    assert any(not np.array_equal(anchor[key], start[key]) for key in anchor)


def test_reset_makes_the_policy_its_own_reference(job, tmp_path):
    rule = ReferenceRule((job.init,), reset_every=2)
    rows = run(replace(job, reference=rule), tmp_path / "a", num_updates=5)
    assert [row["kl"] == 0.0 for row in rows] == [True, False, True, False, True]


def test_reset_may_forget_the_optimizers_moments(job, tmp_path):
    kept, forgotten = (
        run(replace(job, reference=rule), tmp_path / str(rule.reset_optimizer), num_updates=4)
        for rule in (
            ReferenceRule((job.init,), reset_every=2),
            ReferenceRule((job.init,), reset_every=2, reset_optimizer=True),
        )
    )
    assert kept[2]["kl"] == forgotten[2]["kl"] == 0.0
    assert kept[3]["kl"] != forgotten[3]["kl"]


def test_none_penalises_nothing_and_logs_the_kl_to_the_start(job, tmp_path):
    rule = ReferenceRule((job.init,), pulls=False)
    rows = run(replace(job, reference=rule), tmp_path / "a", kl_coef=5.0, num_updates=2)
    free = run(job, tmp_path / "b", kl_coef=0.0, num_updates=2)
    assert rows[1]["kl_coef"] == 0.0 and rows[1]["kl"] == free[1]["kl"] != 0.0
    assert rows[1]["reward"] == rows[1]["score"]


def test_a_changed_rule_is_refused_on_resume(job, tmp_path):
    run_killed(replace(job, reference=ReferenceRule((job.init,), ema=0.1)), tmp_path / "a", 3)
    with pytest.raises(
        CheckpointError, match=r"was pulled towards reference .*'ema': 0.1.*, now it"
    ):
        run(replace(job, reference=ReferenceRule((job.init,), ema=0.2)), tmp_path / "a")


def test_damaged_anchor_weights_are_refused_on_resume(job, tmp_path):
    rule = replace(job, reference=ReferenceRule((job.init,), ema=0.1))
    run_killed(rule, tmp_path / "a", 3)
    file = state_file(tmp_path / "a" / "resume", saved_steps(tmp_path / "a" / "resume")[-1])
    state = load_state(file)
    state["reference"]["weights"]["model.norm.weight"][3] += 1e-3
    save_state(file, state)
    with pytest.raises(
        CheckpointError, match="the reference's weights are not those that were writ"
    ):
        run(rule, tmp_path / "a")


def test_reference_stays_put_while_the_policy_learns(job, tmp_path):
    before = job.reference.digest
    run(job, tmp_path / "a", num_updates=2)
    assert Checkpoint.of(job.reference.path).digest == before
    assert not (tmp_path / "a" / "reference").exists()
    loaded = models.load_policy(job.reference.path)
    rl_models, _, _ = first_experience(changed(job, num_updates=2))
    for key, value in rl_models.reference.models[0].weights():
        assert torch.equal(value, loaded.state_dict()[key])
    assert not any(p.requires_grad for p in rl_models.reference.models[0].parameters())
