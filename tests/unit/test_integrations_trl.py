"""TRL's own trainers on tiny models: their KL is the soup's, a moving reference is where the formula says."""

import copy
import math

import datasets
import peft
import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from salsa.errors import CheckpointError, ConfigError
from salsa.integrations.trl import STATE, use_reference
from tests.conftest import tiny_model, tiny_tokenizer

# TRL 1.16 and peft use names that transformers 5.23 has renamed
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

BETA = 0.1
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def ingredients(make_checkpoint):
    return [make_checkpoint("llama", seed).path for seed in range(2)]


@pytest.fixture(scope="module")
def soup(ingredients, tmp_path_factory):
    """The mean of two models by hand: `make_soup` has tests of its own."""
    path = tmp_path_factory.mktemp("soup")
    model = tiny_model("llama", 0)
    with torch.no_grad():
        for own, other in zip(model.parameters(), tiny_model("llama", 1).parameters(), strict=True):
            own.copy_((own + other) / 2)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def options(path, **more):
    common = {
        "output_dir": str(path), "beta": BETA, "learning_rate": 1e-2, "max_steps": 3, "seed": 0,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "bf16": False, "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return common | more


def policy_of(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def dpo(init, path, *, lora=False, dtype=torch.float32, **more):
    rows = [
        {"prompt": f"say {i}", "chosen": "yes" * (i % 3 + 1), "rejected": f"no {i}"}
        for i in range(16)
    ]
    return trl.DPOTrainer(
        model=policy_of(init, dtype),
        args=trl.DPOConfig(**options(path, **more)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
    )


def online(kind, init, path, *, lora=False, seen=None, **more):
    def reward(prompts, completions, completion_ids, **kwargs):
        if seen is not None:
            seen.append((prompts, completion_ids))
        return [sum(c.isascii() for c in text) / 6 for text in completions]

    settings = options(path, num_generations=2, max_completion_length=6, **more)
    trainer, config = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[kind]
    return trainer(
        model=policy_of(init),
        reward_funcs=reward,
        args=config(**settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"say {i}"} for i in range(16)]),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
    )


def trainer_of(kind, init, path, **how):
    return dpo(init, path, **how) if kind == "dpo" else online(kind, init, path, **how)


def logprobs(path, prompt, reply):
    """Log-probabilities of a reply's tokens, one forward pass without padding, in plain transformers."""
    tokens = torch.tensor([[*prompt, *reply]])
    with torch.no_grad():
        every = policy_of(path)(tokens).logits[0].double().log_softmax(dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
    return torch.stack([every[at, token] for at, token in zip(places, reply, strict=True)])


def first_kl(seen, policy, reference):
    """Means over reply tokens of k3 = e^(ref − π) − (ref − π) − 1, and of k1 = π − ref."""
    k3, k1 = [], []
    prompts, replies = seen[0]
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tiny_tokenizer()(prompt)["input_ids"]
        own, ref = (logprobs(path, ids, reply) for path in (policy, reference))
        k3.append(torch.exp(ref - own) - (ref - own) - 1)
        k1.append(own - ref)
    return torch.cat(k3).mean().item(), torch.cat(k1).mean().item()


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_grpo_is_pulled_towards_the_soup(lora, ingredients, soup, tmp_path):
    seen = []
    trainer = online("grpo", ingredients[0], tmp_path, lora=lora, seen=seen, max_steps=1)
    use_reference(trainer, "soup", soup=soup)
    trainer.train()
    expected, _ = first_kl(seen, ingredients[0], soup)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_rloo_is_pulled_towards_the_soup(lora, ingredients, soup, tmp_path):
    seen = []
    trainer = online("rloo", ingredients[0], tmp_path, lora=lora, seen=seen, max_steps=1)
    use_reference(trainer, "soup", soup=soup)
    trainer.train()
    _, expected = first_kl(seen, ingredients[0], soup)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert abs(expected) > 0.05


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_dpo_is_pulled_towards_the_soup(lora, ingredients, soup, tmp_path):
    """TRL's first loss: −log σ(β·[Δ chosen − Δ rejected]), from plain log-probabilities."""
    trainer = dpo(ingredients[0], tmp_path, lora=lora, max_steps=1)
    use_reference(trainer, "soup", soup=soup)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    apart = []
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        kept = ids[: int(mask.nonzero().max()) + 1].tolist()
        start = int(mask.nonzero().min())
        own, ref = (logprobs(p, kept[:start], kept[start:]).sum() for p in (ingredients[0], soup))
        apart.append(BETA * (own - ref).item())
    chosen, rejected = apart[:4], apart[4:]
    row = trainer.state.log_history[0]
    assert row["rewards/chosen"] == pytest.approx(sum(chosen) / 4, rel=1e-4, abs=1e-5)
    losses = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert abs(row["rewards/chosen"]) > 0.01


class Watch(TrainerCallback):
    """The policy after every step, adapters merged by peft itself, in float64."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model = copy.deepcopy(model)
        if isinstance(model, peft.PeftModel):
            model = model.merge_and_unload()
        self.seen.append({n: p.detach().double() for n, p in model.named_parameters()})


def written(path):
    return {n: w.double() for n, w in load_file(path / "model.safetensors").items()}


def watched(trainer):
    trainer.add_callback(watch := Watch())
    trainer.train()
    return watch.seen


def reference_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_ema_by_the_closed_form(kind, lora, ingredients, soup, tmp_path):
    """After k steps: (1−μ)^k·soup + Σ μ·(1−μ)^(k−i)·θ_i, θ_i the policy after step i."""
    trainer, share = trainer_of(kind, ingredients[0], tmp_path, lora=lora), 0.3
    use_reference(trainer, f"ema(soup, {share})", soup=soup)
    start, policies = written(soup), watched(trainer)
    assert len(policies) == 3
    for name, found in reference_of(trainer).items():
        expected = (1 - share) ** 3 * start[name]
        for number, policy in enumerate(policies, start=1):
            expected += share * (1 - share) ** (3 - number) * policy[name]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (policies[-1][moved] - policies[0][moved]).abs().max() > 1e-3
    assert (reference_of(trainer)[moved] - start[moved]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_reset_becomes_the_policy_every_other_step(lora, ingredients, soup, tmp_path):
    trainer = dpo(ingredients[0], tmp_path, lora=lora)
    use_reference(trainer, "reset(soup, 2)", soup=soup)
    policies = watched(trainer)
    for name, found in reference_of(trainer).items():
        torch.testing.assert_close(found.double(), policies[1][name], rtol=0, atol=1e-6)
    # at the start of step 3 the reference is the policy, so every log-ratio is 0
    rows = [row["rewards/chosen"] for row in trainer.state.log_history if "rewards/chosen" in row]
    assert rows[2] == pytest.approx(0, abs=1e-5) and abs(rows[1]) > 0.01


@pytest.mark.slow
def test_reset_may_drop_the_optimizers_moments(ingredients, soup, tmp_path):
    steps = {}
    for words in ("reset(soup, 2)", "reset(soup, 2, optimizer)"):
        trainer = dpo(ingredients[0], tmp_path, max_steps=2)
        use_reference(trainer, words, soup=soup)
        trainer.train()
        steps[words] = len(trainer.optimizer.state)
    assert steps["reset(soup, 2)"] > 0 and steps["reset(soup, 2, optimizer)"] == 0


@pytest.mark.slow
def test_small_steps_are_not_lost_in_bf16(ingredients, soup, tmp_path):
    """A bf16 reference follows an fp32 copy: μ = 0.001 moves none of its weights in bf16 itself."""
    trainer = dpo(ingredients[0], tmp_path, dtype=torch.bfloat16)
    use_reference(trainer, "ema(soup, 0.001)", soup=soup)
    callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "reference"))
    start, policies = written(soup), watched(trainer)
    moved = total = lost = 0
    for name, master in callback.reference.models[0].weights():
        expected = start[name]
        alone = start[name].bfloat16()
        for policy in policies:
            expected = expected + 0.001 * (policy[name] - expected)
            alone = alone.lerp(policy[name].bfloat16(), 0.001)
        assert master.dtype == torch.float32
        torch.testing.assert_close(master.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(reference_of(trainer)[name], master.bfloat16())
        moved += (master != start[name]).sum().item()
        lost += (alone == start[name].bfloat16()).sum().item()
        total += master.numel()
    assert moved > 0.9 * total and lost > 0.7 * total


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_resumed_run_is_the_straight_one(kind, lora, ingredients, soup, tmp_path):
    def run(folder, max_steps, resume):
        how = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(kind, ingredients[0], tmp_path / folder, lora=lora, **how)
        use_reference(trainer, "ema(soup, 0.3)", soup=soup)
        trainer.train(resume_from_checkpoint=resume)
        return reference_of(trainer)

    straight = run("a", 4, None)
    run("b", 2, None)
    assert (tmp_path / "b" / "checkpoint-2" / STATE).exists()
    resumed = run("b", 4, True)
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.slow
def test_a_resume_without_its_reference_is_refused(ingredients, soup, tmp_path):
    how = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = dpo(ingredients[0], tmp_path, **how)
    use_reference(trainer, "ema(soup, 0.3)", soup=soup)
    trainer.train()
    again = dpo(ingredients[0], tmp_path, **how | {"max_steps": 4})
    use_reference(again, "ema(soup, 0.2)", soup=soup)
    with pytest.raises(CheckpointError, match=r"was pulled towards reference .*'ema': 0.3"):
        again.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / STATE).unlink()
    with pytest.raises(CheckpointError, match="the reference of step 2 is missing"):
        again.train(resume_from_checkpoint=True)


def test_a_reference_beside_a_policy_with_adapters_is_itself(ingredients, soup, tmp_path):
    """TRL's forward pass is bound to the policy; a plain call of the reference must not end there."""
    trainer = online("grpo", ingredients[0], tmp_path, lora=True)
    assert trainer.ref_model is None
    use_reference(trainer, "soup", soup=soup)
    tokens = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        found = trainer.ref_model(tokens).logits
        torch.testing.assert_close(found, policy_of(soup)(tokens).logits)
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


@pytest.mark.slow
def test_a_second_call_replaces_the_first(ingredients, soup, tmp_path):
    trainer = dpo(ingredients[0], tmp_path, max_steps=1)
    use_reference(trainer, "ema(soup, 0.5)", soup=soup)
    use_reference(trainer, str(soup))
    trainer.train()
    for name, found in reference_of(trainer).items():
        torch.testing.assert_close(found.double(), written(soup)[name])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("none", "pulls towards nothing. Set the trainer's beta to 0"),
        ("mixture(soup, ./x)", "a TRL trainer has one reference model"),
        ("ema(sft[0], 0.1)", r"sft\[0\] is a model of a recipe"),
        ("ema(soup, 2)", "μ must lie between 0 and 1"),
        ("soup", "where is the soup"),
    ],
)
def test_words_that_cannot_be_meant(words, error, ingredients, tmp_path):
    with pytest.raises(ConfigError, match=error):
        use_reference(dpo(ingredients[0], tmp_path), words)


def test_trainers_without_a_use_for_it(ingredients, soup, tmp_path):
    for how, error in (
        ({"sync_ref_model": True}, "sync_ref_model=True moves the reference too"),
        ({"precompute_ref_log_probs": True}, "has asked the reference already"),
    ):
        with pytest.raises(ConfigError, match=error):
            use_reference(dpo(ingredients[0], tmp_path, **how), "soup", soup=soup)
    with pytest.raises(ConfigError, match="beta=0 asks for no reference"):
        use_reference(online("grpo", ingredients[0], tmp_path, beta=0.0), "soup", soup=soup)


def test_adapters_that_cannot_be_merged_are_not_followed(ingredients, soup, tmp_path):
    for special, error in (
        ({"use_dora": True}, "this policy has use_dora"),
        ({"modules_to_save": ["lm_head"]}, "this policy has modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on the embedding"),
    ):
        lora = peft.LoraConfig(**LORA | special, task_type="CAUSAL_LM")
        trainer = trl.DPOTrainer(
            model=policy_of(ingredients[0]),
            args=trl.DPOConfig(**options(tmp_path)),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
            ),
            processing_class=tiny_tokenizer(),
            peft_config=lora,
        )
        with pytest.raises(ConfigError, match=error):
            use_reference(trainer, "ema(soup, 0.1)", soup=soup)


def test_a_soup_of_other_models_is_refused(ingredients, make_checkpoint, tmp_path):
    trainer = dpo(ingredients[0], tmp_path)
    other = make_checkpoint("llama", 0, pad_is_eos=True)
    small = tmp_path / "small"
    model = tiny_model("llama", 0)
    model.config.num_hidden_layers = 1
    del model.model.layers[1]
    model.save_pretrained(small)
    tiny_tokenizer().save_pretrained(small)
    with pytest.raises(CheckpointError, match=r"layers\.1\..* is missing, in the trainer's refer"):
        use_reference(trainer, str(small))
    use_reference(trainer, str(other.path))  # the same vocabulary; another padding token is fine
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(small)
    with pytest.raises(CheckpointError, match="the reference's tokenizer is not the policy's"):
        use_reference(trainer, str(small))
