"""The planner against what it plans: counts of transformers, bytes of loaded models, tensors that autograd keeps."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig

from salsa.config import Recipe, RLConfig
from salsa.errors import CheckpointError, ConfigError
from salsa.models import LanguageModel
from salsa.planner import hardware_of, on_hardware, plan
from salsa.planner.estimate import planned_stages, smallest_change
from salsa.planner.memory import (
    LIBRARIES,
    Pass,
    Rank,
    RLWork,
    kv_cache_bytes,
    layer_bytes,
    rl_memory,
    trainer_memory,
)
from salsa.planner.shapes import GEMMA_2B, LLAMA_2_7B, MISTRAL_7B, Shape, shape_of, shape_or
from salsa.planner.work import forward_flops
from salsa.rl import load
from salsa.runtime.engine import Engine
from salsa.runtime.packing import KVCache
from salsa.types import Rollout
from tests.conftest import tiny_model
from tests.tiny_rl import changed

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma": GemmaConfig}
LORA = {"lora": {"rank": 2}}


def config_of(shape: Shape, **others):
    return CONFIGS[shape.family](
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, **others,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA_2_7B, 6_738_415_616), (MISTRAL_7B, 7_241_732_096), (GEMMA_2B, 2_506_172_416)],
)
def test_counts_of_the_papers_models_are_exact(shape, published):
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == counted == published
    trunk = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert shape.trunk == trunk
    assert Shape.from_config(config.to_dict(), "config.json") == shape


def test_biases_and_adapters_are_counted():
    shape = Shape.from_config(
        tiny_model("llama").config.to_dict() | {"attention_bias": True, "mlp_bias": True}, "x"
    )
    model = AutoModelForCausalLM.from_config(config_of(shape, attention_bias=True, mlp_bias=True))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_family_that_is_not_known_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match=r"model_type='mamba' cannot be planned. Known: llama"):
        shape_of(str(tmp_path))
    for wrong, message in (
        ({"num_attention_heads": 0}, "num_attention_heads=0 is no positive whole number"),
        ({"hidden_size": "x"}, "hidden_size='x' is no positive whole number"),
        ({"vocab_size": None}, "has no vocab_size, which a plan needs"),
    ):
        values = tiny_model("llama").config.to_dict() | wrong
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=message):
            shape_of(str(tmp_path))
    for text in ("{", "[" * 100_000, "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
            shape_of(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"org/model: its shape is not known .* model.path=DIRECTORY"
    ):
        shape_of("org/model")


def test_a_published_model_is_known_at_any_revision():
    assert shape_or("google/gemma-2b@main", MISTRAL_7B) == GEMMA_2B
    assert shape_or("org/model", MISTRAL_7B) == MISTRAL_7B
    assert shape_or("embedded", MISTRAL_7B).vocabulary < 10_000


def test_the_copied_constants_are_the_runtimes():
    """The planner imports no torch, so it has them a second time."""
    from salsa.models import language, scalar
    from salsa.planner import memory
    from salsa.runtime import packing
    from salsa.runtime.sampler import local

    theirs = (
        local.MAX_SEQUENCES, packing.SPARE_COLUMNS, packing.SHORT, language.LOGITS_CHUNK, scalar.SCORING_TOKENS,
    )  # fmt: skip
    assert theirs == (
        memory.SLOTS, memory.SPARE_COLUMNS, memory.SHORT, memory.LOGITS_CHUNK, memory.SCORING_TOKENS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides", [(), ("rl.lora={rank: 4}",), ("rl.arms.salsa.lora={rank: 4}",)]
)
def test_the_outlines_memory_is_that_of_the_largest_stage(repository, overrides):
    recipe = Recipe.load(repository / "recipes" / "quickstart.yaml", overrides)
    line = plan(recipe).splitlines()[-1]
    held = max(
        one.total - one.activations - one.logits - one.kv_cache - one.process
        for stage in planned_stages(recipe, hardware_of("cpu:1"))
        for one in stage.phases.values()
    )
    assert f"up to {held / 2**30:.2f} GiB (" in line and "3.0 M parameters" in line


def bytes_of(tensors) -> int:
    """Of each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, {"critic": "head"}, LORA, {"algorithm": "rloo", "group_size": 4}], ids=str
)
def test_parts_are_the_bytes_of_loaded_models(job, precision, settings):
    """Weights with masters, optimizer and frozen models as `rl_models.load` makes them."""
    job = changed(job, **settings)
    models, _ = load(job, Engine.create(precision))
    learning = [model for model in (models.policy, models.critic) if model is not None]
    held = [p for model in learning for p in (*model.parameters(), *model._masters.values())]
    frozen = [p for one in models.reference.models for p in one.parameters()]
    trained = [
        weight
        for learner in models.learners.values()
        for weight in learner.model.trained().values()
    ]
    for learner in models.learners.values():
        for weight in learner.model.trained().values():
            weight.grad = torch.zeros_like(weight)
        learner.optimizer.step()
    states = [
        value
        for learner in models.learners.values()
        for state in learner.optimizer.state.values()
        for value in state.values()
        if value.ndim
    ]
    gradients = [
        bytes_of(w.grad for w in learner.model.trained().values())
        for learner in models.learners.values()
    ]
    shape = Shape.from_config(tiny_model().config.to_dict(), "tiny")
    work = RLWork(shape, job.config, 8, 6, references=0 if job.config.lora else 1, monitored=False)
    planned = rl_memory(work, Rank(precision, on_cpu=True))["update"]
    assert planned.weights == bytes_of(held)
    assert planned.optimizer == bytes_of(states) == 8 * sum(w.numel() for w in trained)
    shared = {t.untyped_storage().data_ptr() for t in held}
    assert planned.frozen == bytes_of(
        t for t in frozen if t.untyped_storage().data_ptr() not in shared
    )
    together = sum(gradients) if settings.get("critic") == "head" else max(gradients)
    assert planned.gradients == together  # untied: nothing is added up besides


def test_the_kv_cache_is_what_is_allocated():
    """A slot starts with spare columns, and doubles."""
    model = LanguageModel(tiny_model("mistral"), Engine.create("fp32"))
    cache = KVCache(model, slots=3)
    cache.prefill(torch.arange(3), [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    shape = Shape.from_config(model.backbone.config.to_dict(), "tiny")
    for response in (1, 64, 65):
        while cache.longest < 4 + response:
            cache.decode(torch.tensor([5, 6, 7]))
        planned = kv_cache_bytes(shape, 3, 4, response, Rank("fp32", on_cpu=True))
        assert planned == bytes_of(cache.stores.values())


WIDE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_activations_are_the_tensors_that_autograd_keeps(precision, family):
    """Of one forward pass; the formula leaves out what is small beside layers: positions, logits, the last norm."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**WIDE)).eval()
    policy = LanguageModel(model, Engine.create(precision), learns=True)
    rows, length = 4, 48
    tokens = torch.randint(5, 300, (rows, length))
    whole = torch.ones(rows, length, dtype=torch.bool)
    rollout = Rollout(tokens[:, :40], whole[:, :40], tokens[:, 40:], whole[:, 40:])
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.logprobs(rollout, 1.0)
    shape = Shape.from_config(model.config.to_dict(), "wide")
    one = Pass(rows * length, rows, length, length)
    planned = shape.layers * layer_bytes(shape, one, 4 if precision == "fp32" else 2)
    measured = bytes_of(kept.values())
    assert planned == pytest.approx(measured, rel=0.08)


def test_flops_are_those_of_a_counter():
    """PyTorch's counter of matrix products; causal attention is counted there in full, here half."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    config = LlamaConfig(**WIDE, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    shape = Shape.from_config(model.config.to_dict(), "wide")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, 300, (2, 32)))
    half = 2 * shape.layers * shape.heads * shape.head_size * 32 * 64
    assert forward_flops(shape, 64, 32, 64) + half == counter.get_total_flops()


@pytest.mark.parametrize(
    "text", ["8xA100", "0xH100-80GB", "cpu", "cpu:0", "xA100-80GB", "8x A100-80GB", "gpu:1"]
)
def test_bad_hardware_is_one_line_with_the_forms(text):
    with pytest.raises(
        ConfigError, match=r"write <number>x<card> with one of A100-80GB, .* or cpu:<cores>"
    ):
        hardware_of(text)


@pytest.mark.parametrize("assume", ["memory=3", "price", "price=-1", "price=much"])
def test_bad_assumptions_are_one_line(assume):
    with pytest.raises(
        ConfigError, match=r"write key=number, above 0, with one of memory_gib, tflops"
    ):
        hardware_of("1x24GB", [assume])


def test_assumptions_are_used_and_printed(repository):
    recipe = Recipe.load(repository / "recipes" / "quickstart.yaml")
    dear = on_hardware(recipe, hardware_of("2xH100-80GB", ["price=9", "memory_gib=70"]))
    assert "price=9 $ an hour" in dear and "memory_gib=70 GiB a card" in dear
    assert f"of {70 * 0.92:.1f}" in dear


def test_a_trainer_holds_16_bytes_a_parameter_and_a_process_its_libraries():
    card, cpu = (
        trainer_memory(GEMMA_2B, Rank("fp32", on_cpu=c), 1, 8, head=True) for c in (False, True)
    )
    held = card.weights + card.gradients + card.optimizer
    assert held == 16 * GEMMA_2B.parameters and card.process == 0
    assert cpu.process > LIBRARIES and cpu.total == pytest.approx(1.12 * card.total + LIBRARIES)
    dpo = trainer_memory(GEMMA_2B, Rank("bf16", 4), 1, 8, head=True, frozen=GEMMA_2B)
    assert dpo.frozen == dpo.optimizer / 2 == GEMMA_2B.parameters


def test_more_ranks_need_less_each_and_one_rank_is_not_divided():
    config = RLConfig(kl_coef=0.1, rollout_size=64, microbatch_tokens=1024)
    work = RLWork(LLAMA_2_7B, config, 256, 256, reward=LLAMA_2_7B)
    one, two, many = (rl_memory(work, Rank("bf16", ranks))["update"] for ranks in (1, 2, 64))
    assert one.optimizer == 2 * two.optimizer == 64 * many.optimizer
    assert one.frozen == 2 * two.frozen and one.gradients > two.gradients > many.gradients
    assert one.total > two.total > many.total
    # what computes is whole on every rank: a layer, the next one, embedding and head
    layer = 2 * (2 * LLAMA_2_7B.layer + 2 * LLAMA_2_7B.embedding)
    assert many.weights > layer


@pytest.mark.parametrize("on", ["1xA100-40GB", "2xA100-80GB", "1x24GB"])
def test_the_smallest_change_makes_it_fit(repository, on):
    """What is advised is enough, and half of the cards that are advised are not."""
    recipe = Recipe.load(repository / "recipes" / "paper" / "mistral-7b.yaml")
    hardware = hardware_of(on)
    tried = 0
    for stage in planned_stages(recipe, hardware):
        if stage.peak.total <= hardware.budget:
            continue
        for change in smallest_change(recipe, hardware, stage):
            tried += 1
            overrides = [f"{key}={value}" for key, value in change.settings.items()]
            better = Recipe.load(repository / "recipes" / "paper" / "mistral-7b.yaml", overrides)
            assert peak(better, change.hardware, stage.name) <= change.hardware.budget
            if not change.settings and change.hardware.count > 2 * hardware.count:
                fewer = replace(change.hardware, count=change.hardware.count // 2)
                assert peak(better, fewer, stage.name) > fewer.budget
    assert tried


def test_a_reward_model_that_does_not_fit_gets_a_smaller_microbatch(repository):
    """`reward.batch_size`, which was advised before, makes another result."""
    recipe, four = (
        Recipe.load(repository / "recipes" / "paper" / "mistral-7b.yaml"),
        hardware_of("4xA100-80GB"),
    )
    (stage,) = [s for s in planned_stages(recipe, four) if s.name == "reward"]
    change = smallest_change(recipe, four, stage)[0]
    assert change.settings == {"reward.microbatch_size": "8"} and change.keeps_result


def test_a_change_is_of_the_key_that_the_arm_sets_itself(repository):
    """`rl.critic` would change nothing for an arm with its own."""
    file = repository / "recipes" / "paper" / "mistral-7b.yaml"
    recipe = Recipe.load(file, ["rl.arms.salsa.critic=separate"])
    hardware = hardware_of("8xA100-40GB")
    settings = {
        stage.name: smallest_change(recipe, hardware, stage)[0].settings
        for stage in planned_stages(recipe, hardware)
        if stage.name in ("ppo", "salsa")
    }
    assert settings == {"ppo": {"rl.critic": "head"}, "salsa": {"rl.arms.salsa.critic": "head"}}


def peak(recipe: Recipe, hardware, name: str) -> float:
    return next(s.peak.total for s in planned_stages(recipe, hardware) if s.name == name)


def test_what_one_rank_does_takes_as_long_and_as_much_on_one_card_as_on_eight(repository):
    """Evaluation is not divided, nor is SFT with adapters; SFT of all weights is, and so is RL."""
    file = repository / "recipes" / "paper" / "mistral-7b.yaml"
    one, eight = hardware_of("1xA100-80GB"), hardware_of("8xA100-80GB")
    for overrides, alone in (([], {"eval"}), (["sft.lora={rank: 16}"], {"eval", "sft"})):
        recipe = Recipe.load(file, overrides)
        pairs = zip(planned_stages(recipe, one), planned_stages(recipe, eight), strict=True)
        for here, there in pairs:
            same = here.seconds(one) == there.seconds(eight) and here.peak == there.peak
            assert same == (here.name in alone), here.name
    assert "eval: by one rank while the others wait" in on_hardware(Recipe.load(file), eight)


def test_the_states_of_all_replies_are_in_memory_while_the_kl_is_measured(repository):
    """fp32: 4 bytes × replies × tokens × hidden size; 500 prompts more, 500 replies more."""
    recipe = Recipe.load(
        repository / "recipes" / "paper" / "mistral-7b.yaml", ["model.precision=fp32"]
    )
    hardware, held = hardware_of("1xA100-80GB"), {}
    for limit in (500, 1000):
        prompts = recipe.eval.prompts.model_copy(update={"limit": limit})
        evaluation = recipe.eval.model_copy(update={"prompts": prompts})
        stages = planned_stages(recipe.model_copy(update={"eval": evaluation}), hardware)
        (stage,) = [one for one in stages if one.name == "eval"]
        held[limit] = stage.phases["KL"].activations
    tokens = 500 * recipe.rl.max_new_tokens * hardware.assumed.fill
    assert held[1000] - held[500] == pytest.approx(4 * tokens * MISTRAL_7B.hidden)


def test_what_does_not_fit_is_said_in_one_line(repository):
    recipe = Recipe.load(repository / "recipes" / "paper" / "llama2-7b.yaml")
    lines = on_hardware(recipe, hardware_of("1xA100-80GB")).splitlines()
    bad = [line for line in lines if line.startswith("does not fit: ")]
    form = r"does not fit: [\w, ]+: [\d.]+ of 73.6 GiB; smallest change: .*--on [48]xA100-80GB"
    assert len(bad) >= 3 and all(re.fullmatch(form, line) for line in bad)
    assert max(map(len, lines)) <= 130


def launches(repository, name: str):
    """The overrides of each launch line in the head of a recipe, and the hardware that it is for."""
    text = (repository / "recipes" / "paper" / f"{name}.yaml").read_text()
    head = re.sub(r" \\\n#\s+", " ", text[: text.index("\nname:")])
    for line in re.findall(r"^#\s+(.*salsa run .*)$", head, flags=re.M):
        words = shlex.split(line)
        if "--scale" in words or "engine.executor" in line:
            continue
        yield (
            words[words.index("run") + 2 :],
            "8xA100-80GB" if "torchrun" in words else "1xA100-80GB",
        )


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b", "gemma-2b"])
def test_the_papers_recipes_fit_where_their_launch_lines_say(repository, name, monkeypatch):
    monkeypatch.chdir(repository)
    found = list(launches(repository, name))
    assert [on for _, on in found] == ["8xA100-80GB", "1xA100-80GB"]
    for overrides, on in found:
        recipe = Recipe.load(repository / "recipes" / "paper" / f"{name}.yaml", overrides)
        assert "sound" in plan(recipe)
        text = on_hardware(recipe, hardware_of(on))
        assert "\nfits: " in text, text
        assert ("models/reward is not here" in text) == (
            "reward.paths=[models/reward]" in overrides
        )


@pytest.mark.parametrize("name", ["llama2-7b", "mistral-7b", "gemma-2b"])
def test_every_value_of_the_papers_recipes_says_where_it_is_from(repository, name):
    lines = (repository / "recipes" / "paper" / f"{name}.yaml").read_text().splitlines()
    values = [
        line
        for line in lines
        if re.match(r"\s*[\w]+: *\S", line) and not line.startswith(("#", "name:"))
    ]
    silent = [
        v for v in values if "# not stated in the paper" not in v and "# the paper: " not in v
    ]
    headings = [v for v in silent if re.match(r"(reward|preferences):  # ", v)]
    assert [
        v
        for v in silent
        if v not in headings and not v.strip().startswith("dataset: {path: trl-lib")
    ] == []
    assert len(values) > 35
