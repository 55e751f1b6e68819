"""`salsa chat`: token by token, the same tokens as the sampler's distribution, several models and samples."""

import io
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from salsa.chat import Speaker, chat, show, talk
from salsa.errors import CheckpointError, ConfigError, DataError

USER = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def speaker(make_checkpoint):
    return Speaker(make_checkpoint("llama", 5).path)


def test_greedy_replies_are_those_of_transformers(speaker):
    *_, reply = speaker.stream(USER, temperature=0, max_new_tokens=12)
    ids = speaker.tokenizer.apply_chat_template(
        USER, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = speaker.model.generate(**ids, do_sample=False, max_new_tokens=12)
    theirs = speaker.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply.strip() == theirs.strip().rstrip("\ufffd")


def test_what_is_shown_only_grows(speaker):
    texts = list(speaker.stream(USER, temperature=1.0, max_new_tokens=20, seed=2))
    assert texts[0] == "" and len(texts) <= 21
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature, speaker):
    """The share of the likeliest first text in many samples against softmax(logits / T) of one forward pass."""
    ids = speaker.tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]
    logits = speaker.model(torch.tensor([ids])).logits[0, -1].detach()
    chances: dict[str, float] = {}
    for token, chance in enumerate((logits / temperature).softmax(-1).tolist()):
        text = speaker.tokenizer.decode([token], skip_special_tokens=True).strip("\ufffd ")
        chances[text] = chances.get(text, 0) + chance
    likeliest = max(chances, key=chances.__getitem__)
    options = {"temperature": temperature, "max_new_tokens": 1}
    firsts = [[*speaker.stream(USER, **options, seed=seed)][-1] for seed in range(400)]
    share = sum(text == likeliest for text in firsts) / 400
    chance = chances[likeliest]
    assert abs(share - chance) < 4 * (chance * (1 - chance) / 400) ** 0.5


def test_a_full_context_is_told(speaker):
    long = [{"role": "user", "content": "a" * 300}]
    with pytest.raises(DataError, match="fills the model's 256 positions"):
        next(speaker.stream(long, temperature=0, max_new_tokens=5))


def test_a_model_without_a_template_goes_on_from_the_text(make_checkpoint):
    plain = Speaker(make_checkpoint("llama", 5, template=None).path)
    *_, reply = plain.stream(USER, temperature=0, max_new_tokens=6)
    ids = torch.tensor([plain.tokenizer("abc")["input_ids"]])
    out = plain.model.generate(
        ids, do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(ids)
    )
    theirs = plain.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply.strip() == theirs.strip().rstrip("\ufffd")


class Echo:
    """Says how many messages it was shown, and the last one."""

    def stream(self, conversation, **how):
        yield ""
        yield f"{len(conversation)}"
        yield f"{len(conversation)} {conversation[-1]['content']} {how['seed']}"


def said(capsys, text, names=("a",), **options):
    options = {"samples": 1, "temperature": 1.0, "max_new_tokens": 5} | options
    talk({name: Echo() for name in names}, source=io.StringIO(text), **options)
    return capsys.readouterr().out.splitlines()


def test_a_conversation_goes_on_until_it_is_forgotten(capsys):
    assert said(capsys, "x\n\ny\n/new\nz\n/quit\nnever\n") == ["1 x 0", "3 y 1", "1 z 3"]


def test_a_system_message_stands_first(capsys):
    assert said(capsys, "x\ny\n/new\nz\n", system="be kind") == ["2 x 0", "4 y 1", "2 z 3"]


def test_samples_stand_alone_and_differ(capsys):
    assert said(capsys, "x\ny\n", names=("a", "b"), samples=2) == [
        "a 1: 1 x 0", "a 2: 1 x 1", "b 1: 1 x 0", "b 2: 1 x 1",
        "a 1: 1 y 2", "a 2: 1 y 3", "b 1: 1 y 2", "b 2: 1 y 3",
    ]  # fmt: skip


def test_side_by_side_at_a_terminal():
    """Replies of different length; the shorter one stays as it is."""
    out = Console(file=io.StringIO(), force_terminal=True, width=60)
    streams = {("ppo", 0): iter(["", "one", "one two [b]"]), ("salsa", 0): iter(["", "three"])}
    texts = show(streams, ["ppo", "salsa"], 1, out)
    assert texts == {("ppo", 0): "one two [b]", ("salsa", 0): "three"}
    shown = out.file.getvalue()
    assert "ppo" in shown and "one two [b]" in shown and "three" in shown


def test_arms_of_what_is_no_run(make_checkpoint, tmp_path):
    with pytest.raises(
        ConfigError, match="is no run directory, which --arm and --seed choose from"
    ):
        chat(str(make_checkpoint("llama", 5).path), arms=["ppo"])
    with pytest.raises(CheckpointError, match="no such directory"):
        chat(str(tmp_path / "nowhere"))
