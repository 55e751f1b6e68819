"""LoRA equals full-weight arithmetic, and shares its base."""

from dataclasses import replace

import pytest
import torch

from salsa import make_soup, models, objectives
from salsa.config import LoRAConfig, Recipe
from salsa.config.expressions import RecipeSoup, ReferenceRule
from salsa.errors import ConfigError
from salsa.models import LanguageModel
from salsa.models.weights import add_adapters, merged, shared_copy
from salsa.resolve import Models
from salsa.rl_models import load
from salsa.runtime.engine import Engine
from salsa.stages import nodes
from salsa.stages.directory import RunDirectory
from salsa.stages.graph import Graph
from tests.conftest import tiny_model, wrap
from tests.tiny_rl import FP32, GRPO, changed, first_experience, run
from tests.unit.test_models import rollout_of

RANK_2 = LoRAConfig(rank=2, alpha=6)


@pytest.fixture
def adapted():
    """A model with adapters that do something, and the same model with the sum W + (alpha/r)·B·A as its weights."""
    model = tiny_model()
    add_adapters(model, RANK_2, seed=0)
    torch.manual_seed(1)
    whole = tiny_model()
    weights = whole.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
            torch.nn.init.normal_(b, std=0.1)
            weights[f"{name}.weight"] += (6 / 2) * (b.detach() @ a.detach())
    whole.load_state_dict(weights)
    return model, whole


def test_merged_equals_unmerged(adapted):
    model, whole = adapted
    rollout = rollout_of()
    one, other = (wrap(m).stats(rollout, 1.0).logprobs for m in adapted)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = wrap(tiny_model()).stats(rollout, 1.0).logprobs
    assert (plain - one).abs().max() > 0.01
    expected = dict(whole.named_parameters())
    effective = dict(merged(model, lambda parameter: parameter))
    assert effective.keys() == expected.keys()
    for key, value in effective.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


def test_gradients_are_the_chain_rule_of_the_full_ones(adapted):
    """∂L/∂B = s·G·Aᵀ and ∂L/∂A = s·Bᵀ·G, with G = ∂L/∂W of the merged model."""
    model, whole = adapted
    rollout = rollout_of()
    for each in adapted:
        wrap(each, learns=True).logprobs(rollout, 1.0).sum().backward()
    full = dict(whole.named_parameters())
    seen = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            gradient = full[f"{name}.weight"].grad
            torch.testing.assert_close(b.grad, 3 * gradient @ a.detach().T, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(a.grad, 3 * b.detach().T @ gradient, rtol=1e-3, atol=1e-4)
            seen += 1
    assert seen == 2 * 7


def test_only_adapters_learn_and_all_share_one_base(job):
    """Policy, critic and a reference that is the start: one set of base tensors."""
    actors, _ = load(changed(job, lora={"rank": 2}), FP32)
    is_base = lambda name: "embed" in name or "base_layer" in name
    owned = lambda model: {p.data_ptr() for n, p in model.named_parameters() if is_base(n)}
    base = owned(actors.policy)
    assert len(base) == 1 + 2 * 7
    assert owned(actors.critic) == base
    assert base < {p.data_ptr() for p in actors.reference.models[0].parameters()}
    learning = [n for n, p in actors.policy.named_parameters() if p.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    critic = [n for n, p in actors.critic.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name == "score.weight" for name in critic)


def test_shared_copies_are_independent_modules():
    model = tiny_model()
    twin = shared_copy(model)
    add_adapters(twin, RANK_2, seed=0)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_first_update_starts_at_the_reference_and_the_base_stays(job, tmp_path):
    rows = run(job, tmp_path / "a", num_updates=3, lora={"rank": 2}, learning_rate=1e-2)
    assert rows[0]["kl"] == 0.0 and rows[0]["value"] == 0.0
    assert rows[2]["kl"] != 0.0
    trained = models.load_policy(tmp_path / "a").state_dict()
    start = models.load_policy(job.init.path).state_dict()
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(trained[key], start[key])
    delta = (
        trained["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    )
    assert delta.abs().max() > 0 and torch.linalg.matrix_rank(delta, rtol=1e-3) == 2
    critic = models.load_classifier(tmp_path / "a" / "critic", pad_id=0)
    assert critic.get_submodule("score").weight.abs().max() > 0


def test_one_step_towards_a_soup_equals_full_weight_arithmetic(job, make_checkpoint, tmp_path):
    """The gradient of the whole RL loss, KL to a full-weight soup included, through adapters and through weights."""
    soup = make_soup([job.init.path, make_checkpoint("llama", 1).path], out=tmp_path / "soup")
    options = GRPO | {"kl_in": "loss", "kl_kind": "k2", "kl_coef": 0.5}
    against = changed(replace(job, reference=soup), **options)
    full, experience, _ = first_experience(against)
    lora, _, _ = first_experience(changed(against, lora={"rank": 2, "alpha": 4}))
    mask = experience.rollout.response_mask
    for one in (full, lora):
        logprobs = one.policy.logprobs(experience.rollout, 1.0)
        loss = objectives.policy_loss(
            logprobs, experience.logprobs, experience.advantages, mask, clip_range=0.2
        ).loss
        kl = objectives.kl_loss(
            logprobs,
            experience.logprobs,
            experience.ref_logprobs,
            mask,
            kl_kind="k2",
            importance=False,
        )
        (loss + 0.5 * kl).backward()
    weights = dict(full.policy.backbone.named_parameters())
    seen = 0
    for name, module in lora.policy.backbone.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            expected = 2 * weights[f"{name}.weight"].grad @ a.detach().T
            torch.testing.assert_close(b.grad, expected, rtol=1e-3, atol=1e-5)
            seen += b.grad.abs().max() > 1e-4
    assert seen == 2 * 7


def test_ema_of_adapters_is_the_ema_of_weights(job, tmp_path):
    """Averaging B and A apart would not be: the anchor follows W + (alpha/r)·B·A."""
    rule = ReferenceRule((job.init,), ema=0.25)
    options = {"num_updates": 1, "num_epochs": 1, "minibatch_size": 8, "lora": {"rank": 2}}
    run(replace(job, reference=rule), tmp_path / "a", **options)
    start, policy, anchor = (
        models.load_policy(path).state_dict()
        for path in (job.init.path, tmp_path / "a", tmp_path / "a" / "reference")
    )
    for key, value in anchor.items():
        torch.testing.assert_close(
            value, 0.75 * start[key] + 0.25 * policy[key], atol=1e-6, rtol=1e-5
        )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_soup_of_adapters_is_the_mean_of_their_products(make_checkpoint, tmp_path):
    """sft.checkpoints of two peft adapters: the reference is W + mean(s·B·A), not W + s·mean(B)·mean(A)."""
    import peft

    base = make_checkpoint("llama", 0)
    deltas = []
    for number in (0, 1):
        lora = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
        model = peft.get_peft_model(tiny_model(), lora)
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        deltas.append(layer.get_delta_weight("default").detach())
        model.peft_config["default"].base_model_name_or_path = str(base.path)
        model.save_pretrained(tmp_path / f"adapter{number}")
    recipe = Recipe.model_validate(
        {
            "name": "adapters",
            "model": {"path": str(base.path), "precision": "fp32"},
            "sft": {"checkpoints": [str(tmp_path / "adapter0"), str(tmp_path / "adapter1")]},
            "reward": {"functions": [{"call": "a:b"}]},
            "rl": {"kl_coef": 0.1, "prompts": "p.jsonl", "arms": {"a": {"init": "sft[0]", "reference": "soup"}}},
            "eval": {"prompts": "p.jsonl", "baseline": "a"},
        }
    )  # fmt: skip
    run = RunDirectory(tmp_path / "run")
    with run.opened("recipe"):
        base_node = nodes.base(recipe, run.hashes)
        sft = [nodes.sft(recipe, base_node, i, run.hashes) for i in (0, 1)]
        node = Models(recipe, base_node, sft, run.hashes)[RecipeSoup()]
        graph = Graph(run)
        graph.finish([node])
        soup = graph[node]
    key = "model.layers.1.self_attn.q_proj.weight"
    averaged = models.load_policy(soup.path).state_dict()[key]
    start = models.load_policy(base.path).state_dict()[key]
    torch.testing.assert_close(averaged - start, (deltas[0] + deltas[1]) / 2, rtol=1e-4, atol=1e-6)


def test_targets_that_do_not_exist(job):
    with pytest.raises(ConfigError, match=r"rl.lora.target_modules=\['nothing'\]: "):
        add_adapters(tiny_model(), LoRAConfig(target_modules=("nothing",)), seed=0)
    model = tiny_model()
    add_adapters(model, LoRAConfig(target_modules=("q_proj",)), seed=0)
    assert {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")} == {
        "q_proj"
    }


def test_bf16_adapters_are_merged_from_fp32_masters(make_checkpoint, tmp_path):
    """The base is written as exact as it was read, although it is computed with in bf16."""
    checkpoint = make_checkpoint("llama", 0)
    model = LanguageModel.load(checkpoint.path, Engine.create("bf16"), learns=True)
    model.add_adapters(RANK_2, 0)
    with torch.no_grad():
        for name, master in model.trained().items():
            master.copy_(torch.full_like(master, 1e-4 if "lora_B" in name else 1.0))
    model.sync()
    model.save(models.load_tokenizer(checkpoint.path), tmp_path)
    start, saved = (models.load_policy(p).state_dict() for p in (checkpoint.path, tmp_path))
    for key, value in saved.items():
        adapted = any(part in key for part in ("proj",))
        expected = start[key] + (3 * 2 * 1e-4 if adapted else 0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-8, msg=key)
