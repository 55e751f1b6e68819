"""SFT and reward models through TRL: adapters that end up merged, packed rows, the loss on every reply."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salsa import data, make_soup
from salsa.artifacts import Checkpoint, write_jsonl
from salsa.config import DataSource, RewardConfig, SFTConfig
from salsa.errors import ConfigError, DataError
from salsa.models import load_classifier, load_policy, load_tokenizer
from salsa.reward import train_reward
from salsa.runtime.engine import Engine
from salsa.sft import train_sft
from salsa.stages.jobs import RewardJob, SFTJob
from tests.conftest import TEMPLATE, tiny_tokenizer

# as quiet_libraries has it: TRL and peft use names that transformers is leaving behind
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated")
FP32 = Engine.create("fp32")
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RANK = {"rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def sft(make_checkpoint, tmp_path_factory) -> SFTJob:
    """Sixteen short rows, four steps of four."""
    file = tmp_path_factory.mktemp("data") / "sft.jsonl"
    write_jsonl(
        file, [{"prompt": "ab" * (i % 3 + 1), "completion": "c" * (i % 4 + 1)} for i in range(16)]
    )
    config = SFTConfig(
        dataset=str(file),
        epochs=1,
        learning_rate=1e-2,
        batch_size=4,
        max_length=64,
        checkpoint_every=2,
    )
    return SFTJob("sft[0]", make_checkpoint("llama", 0), config, DataSource(path=str(file)), 0)


def changed(job, **config):
    return replace(job, config=type(job.config)(**job.config.model_dump() | config))


def trained(job, directory: Path) -> list[dict]:
    directory.mkdir()
    (train_sft if isinstance(job, SFTJob) else train_reward)(job, directory, FP32)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def ranks(base, model) -> dict[str, int]:
    """Rank of each weight's change, of those that changed."""
    before = dict(base.named_parameters())
    found = {}
    for name, weight in model.named_parameters():
        delta = (weight - before[name]).detach() if name in before else None
        if delta is not None and delta.abs().max() > 1e-6:
            found[name] = 1 if delta.ndim < 2 else int(torch.linalg.matrix_rank(delta, atol=1e-5))
    return found


@pytest.mark.slow
def test_sft_with_adapters_writes_an_ordinary_model_that_makes_soups(sft, tmp_path):
    base = load_policy(sft.base.path)
    for seed in (0, 1):
        trained(changed(replace(sft, seed=seed), lora=RANK), tmp_path / f"sft-{seed}")
        assert not list((tmp_path / f"sft-{seed}").glob("adapter*"))
        found = ranks(base, load_policy(tmp_path / f"sft-{seed}"))
        assert len(found) == 14 and set(found.values()) <= {1, 2}, found
        assert not any("embed" in name or "norm" in name or "lm_head" in name for name in found)
    soup = make_soup([tmp_path / "sft-0", tmp_path / "sft-1"], out=tmp_path / "soup")
    name = "model.layers.0.mlp.up_proj.weight"
    of = lambda path: dict(load_policy(path).named_parameters())[name]
    mean = (of(tmp_path / "sft-0") + of(tmp_path / "sft-1")) / 2
    assert torch.allclose(of(soup.path), mean, atol=1e-7)
    trained(changed(sft, lora=RANK), tmp_path / "again")
    assert Checkpoint.of(tmp_path / "again") == replace(
        Checkpoint.of(tmp_path / "sft-0"), path=tmp_path / "again"
    ), "the seed decides the adapters too"


@pytest.mark.slow
def test_killed_and_resumed_adapters_are_those_of_a_straight_run(sft, tmp_path, monkeypatch):
    from salsa.runtime import hf_trainer

    job = changed(sft, lora=RANK, epochs=1.5)
    trained(job, tmp_path / "straight")
    real = hf_trainer._Report.on_step_end

    def killed(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_trainer._Report, "on_step_end", killed)
        trained(job, tmp_path / "killed")
    train_sft(job, tmp_path / "killed", FP32)
    digests = [Checkpoint.of(tmp_path / name).digest for name in ("straight", "killed")]
    assert digests[0] == digests[1]


def test_a_layer_that_is_not_there_is_one_line(sft, make_checkpoint, tmp_path):
    lora = {"target_modules": ("nothing",)}
    with pytest.raises(ConfigError, match=r"sft.lora.target_modules=\['nothing'\]: .* Name linear"):
        trained(changed(sft, lora=lora), tmp_path / "sft")
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    config = RewardConfig(epochs=1, max_length=64, lora=lora)
    init = make_checkpoint("llama", 0)
    job = RewardJob("reward", init, Checkpoint(tmp_path, "0" * 64), config, 3)
    with pytest.raises(ConfigError, match=r"reward.lora.target_modules=\['nothing'\]: .* Name"):
        trained(job, tmp_path / "reward")


@pytest.mark.slow
def test_a_reward_model_with_adapters_learns_its_whole_head(make_checkpoint, tmp_path):
    init, pairs = make_checkpoint("llama", 0), tmp_path / "pairs"
    pairs.mkdir()
    rows = [
        {"prompt": "ab", "chosen": "a" * (i % 3 + 1), "rejected": "c" * (i % 3 + 1)}
        for i in range(24)
    ]
    write_jsonl(pairs / "pairs.jsonl", rows)
    config = RewardConfig(
        epochs=4, learning_rate=1e-2, batch_size=4, max_length=64, lora=RANK, checkpoint_every=5
    )
    job = RewardJob("reward", init, Checkpoint(pairs, "0" * 64), config, 3)
    logged = trained(job, tmp_path / "reward")
    assert logged[-1]["accuracy"] > 0.9
    made = load_classifier(tmp_path / "reward", pad_id=0)
    start = load_classifier(init.path, pad_id=0, new_head_seed=3)
    found = ranks(start, made)
    assert found.pop("score.weight") == 1
    assert len(found) == 14 and set(found.values()) <= {1, 2}
    assert not list((tmp_path / "reward").glob("adapter*"))


@pytest.mark.slow
def test_packed_rows_do_not_see_each_other(sft, tmp_path):
    """Four rows in one packed sequence give the loss of the same four in a padded batch."""
    write_jsonl(
        tmp_path / "four.jsonl", [{"prompt": "ab" * n, "completion": "c" * n} for n in (1, 2, 3, 4)]
    )
    four = replace(sft, dataset=DataSource(path=str(tmp_path / "four.jsonl")))
    plain = trained(changed(four, batch_size=4), tmp_path / "plain")
    packed = trained(changed(four, batch_size=1, packing=True), tmp_path / "packed")
    assert len(plain) == len(packed) == 1
    for name in ("loss", "grad_norm", "num_tokens"):
        assert packed[0][name] == pytest.approx(plain[0][name], rel=1e-4), name


CONVERSATION = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"}, {"role": "assistant", "content": "efg"},
]  # fmt: skip


@pytest.mark.slow
def test_the_loss_is_on_every_reply_and_nothing_else(make_checkpoint, tmp_path):
    """Oracle: mean of −log p over the tokens of both replies, <|end|> included, of one unpadded forward pass."""
    base = make_checkpoint("llama", 0, template=MARKED)
    file = tmp_path / "talk.jsonl"
    write_jsonl(file, [{"messages": CONVERSATION}])
    config = SFTConfig(
        dataset=str(file),
        epochs=1,
        learning_rate=1e-9,
        batch_size=1,
        max_length=64,
        assistant_only_loss=True,
        checkpoint_every=1,
    )
    job = SFTJob("sft[0]", base, config, DataSource(path=str(file)), 0)
    (row,) = trained(job, tmp_path / "out")
    tokenizer, model = load_tokenizer(base.path), load_policy(base.path)
    text = "<|bos|><|user|>a<|end|><|assistant|>bc<|end|><|user|>d<|end|><|assistant|>efg<|end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    replies, talking, losses = (
        tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"]),
        False,
        [],
    )
    for at, token in enumerate(ids):
        if talking:
            losses.append(-logprobs[at - 1, token].item())
        talking = token == replies[0] or (talking and token != replies[1])
    assert len(losses) == 7
    assert row["loss"] == pytest.approx(sum(losses) / 7, rel=1e-4)


def test_a_template_without_marks_is_one_error():
    rows = [{"messages": CONVERSATION}]
    with pytest.raises(DataError) as raised:
        data.sft_rows(rows, tiny_tokenizer(template=TEMPLATE), "talk.jsonl", whole=True)
    assert "needs a chat template that marks replies with {% generation %}" in str(raised.value)
    marked = tiny_tokenizer(template=MARKED)
    assert data.sft_rows(rows, marked, "x", whole=True) == rows
    short = [{"prompt": "a", "completion": "b"}, {"messages": CONVERSATION[:1]}]
    assert data.sft_rows(short, marked, "x", whole=True) == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
