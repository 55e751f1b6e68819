"""RL reaches the enumerated optimum of a world with one prompt and one token: π* ∝ ρ·exp(r/β), ρ the reference."""

from dataclasses import replace

import pytest
import torch

from salsa.config.expressions import ReferenceRule
from salsa.models import LanguageModel
from tests.conftest import tiny_tokenizer
from tests.tiny_rl import FP32, GRPO, RLOO, changed, job_from, run

BETA = 0.5
SHARE = 0.95
"""Of the way from the start to the optimum, by the objective."""
SETTINGS = {
    "kl_coef": BETA, "num_updates": 150, "rollout_size": 64, "minibatch_size": 32, "num_epochs": 1,
    "learning_rate": 2e-2, "max_new_tokens": 1, "checkpoint_every": 150,
    "monitor_kl_every": 150,
}  # fmt: skip


def reward(prompts, responses):
    """Letters are best, digits half as good."""
    return [1.0 if r.isascii() and r.isalpha() else 0.5 if r.isdigit() else 0.0 for r in responses]


def next_token(path, prompt) -> torch.Tensor:
    """log π(token | prompt), float64."""
    model = LanguageModel.load(path, FP32)
    with torch.no_grad():
        logits = model.backbone(torch.tensor([list(prompt.ids)])).logits[0, -1]
    return logits.double().log_softmax(-1)


def value(log_policy, log_reference, rewards) -> float:
    """E_π[r] − β·KL(π ‖ ρ)."""
    policy = log_policy.exp()
    return float(policy @ rewards - BETA * (policy @ (log_policy - log_reference)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, RLOO, GRPO, RLOO | {"kl_in": "loss", "kl_kind": "k2"}],
    ids=["ppo", "rloo", "grpo", "rloo with k2 in the loss"],
)
def test_the_optimum_is_reached(make_checkpoint, tmp_path, settings):
    init, reference = make_checkpoint("llama", 0), make_checkpoint("llama", 1)
    setup = job_from(init, reference=ReferenceRule((reference,)), reward=reward)
    setup = changed(replace(setup, prompts=setup.prompts[:1]), **SETTINGS)
    run(setup, tmp_path / "run", **settings)
    tokens = tiny_tokenizer().batch_decode([[i] for i in range(261)], skip_special_tokens=True)
    rewards = torch.tensor(reward([], [t.strip() for t in tokens]), dtype=torch.float64)
    rho = next_token(reference.path, setup.prompts[0])
    best = (rho + rewards / BETA).log_softmax(-1)
    start = value(next_token(init.path, setup.prompts[0]), rho, rewards)
    optimum = value(best, rho, rewards)
    reached = value(next_token(tmp_path / "run", setup.prompts[0]), rho, rewards)
    print(
        f"start {start:.3f} reached {reached:.3f} optimum {optimum:.3f} rho {value(rho, rho, rewards):.3f}"
    )
    assert optimum >= reached > start
    assert (reached - start) / (optimum - start) >= SHARE
