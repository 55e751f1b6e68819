"""Files that mean harm: each is refused in one line, runs nothing and takes no time to speak of (SECURITY.md)."""

import gzip
import json
import pickle
import shutil
import struct
import time

import pytest
import torch
import yaml

from salsa.artifacts import Checkpoint
from salsa.config import DataSource, Recipe
from salsa.data import load_rows, render, sft_rows
from salsa.errors import CheckpointError, ConfigError, DataError, SalsaError
from salsa.evaluate.arena_hard import load_judge_prompt, parse_arena_verdict
from salsa.evaluate.benchmarks import JudgePrompt, Question
from salsa.evaluate.mtbench import parse_pair_verdict, parse_rating
from salsa.evaluate.spec import EvalSpec
from salsa.models import load_classifier, load_policy, load_tokenizer
from salsa.soup import make_soup
from salsa.stages.directory import stage_path
from salsa.untrusted import parameter_count
from tests.conftest import tiny_tokenizer

SECONDS = 8.0
"""Processor time. None of these may take longer; most take milliseconds."""


@pytest.fixture(autouse=True)
def in_time():
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


@pytest.fixture
def model(make_checkpoint, tmp_path):
    """A sound model directory, to be spoiled."""
    return shutil.copytree(make_checkpoint("llama", 0).path, tmp_path / "model")


def one_line(caught) -> str:
    text = str(caught.value)
    assert isinstance(caught.value, SalsaError) and "\n" not in text and len(text) < 700
    return text


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


# ---- checkpoints


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.pth"])
@pytest.mark.parametrize(
    "load", [load_policy, lambda p: load_classifier(p, pad_id=0, new_head_seed=0)]
)
def test_pickled_weights_are_not_opened(model, tmp_path, name, load):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    with pytest.raises(CheckpointError) as caught:
        load(model)
    assert "a pickle can run any code" in one_line(caught)
    assert not (tmp_path / "owned").exists()


def test_a_sound_pickle_is_refused_too_and_one_beside_safetensors_is_not_read(model, tmp_path):
    state = {k: v.clone() for k, v in load_policy(model).state_dict().items()}
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    assert load_policy(model).state_dict().keys() == state.keys()
    torch.save(state, model / "pytorch_model.bin")
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(CheckpointError):
        load_policy(model)
    assert not (tmp_path / "owned").exists()


def test_code_beside_a_model_is_not_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass C: pass\n")
    mapped = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    edit(model / "config.json", auto_map=mapped)
    load_policy(model)  # transformers has an implementation of its own, and takes that
    edit(model / "config.json", model_type="unheard-of")
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.C", "evil.C"]},
        tokenizer_class="C",
    )
    for load in (load_policy, load_tokenizer):
        with pytest.raises(CheckpointError) as caught:
            load(model)
        assert "custom code" in one_line(caught)
    assert not (tmp_path / "owned").exists()


def test_an_adapter_does_not_bring_another_base(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(CheckpointError) as caught:
        load_policy(model)
    assert "adapter_config.json" in one_line(caught)


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 99_000_000])
def test_a_header_that_lies_about_its_size(model, make_checkpoint, tmp_path, length):
    other = make_checkpoint("llama", 1).path
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    for read in (
        load_policy,
        parameter_count,
        lambda p: make_soup([p, other], out=tmp_path / "soup"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read(model)
        assert f"a header of {length} bytes" in one_line(caught)


def test_a_tensor_that_lies_about_its_size(model):
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
    ).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError) as caught:
        load_policy(model)
    one_line(caught)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; its weights are"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
        ({"hidden_size": 10**12}, "no model can be loaded"),
        ({"hidden_size": "wide"}, "no model can be loaded"),
        ({"num_key_value_heads": 0}, "no model can be loaded"),
        ({"num_hidden_layers": 5}, "weights that config.json speaks of are not in the files"),
    ],
)
def test_a_config_that_its_weights_do_not_bear_out(model, values, said):
    edit(model / "config.json", **values)
    with pytest.raises(CheckpointError) as caught:
        load_policy(model)
    assert said in one_line(caught)


def test_missing_weights_are_not_drawn_at_random(model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    gone = next(name for name in weights if "q_proj" in name)
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for load in (load_policy, lambda p: load_classifier(p, pad_id=0, new_head_seed=0)):
        with pytest.raises(CheckpointError) as caught:
            load(model)
        assert "1 weights" in one_line(caught) and gone in str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_json_that_is_nested_a_hundred_thousand_times(model, name):
    from salsa.models import sampling_for

    tokenizer = load_tokenizer(model)
    (model / name).write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError) as caught:
        load_policy(model)
        load_tokenizer(model)
        sampling_for(model, tokenizer, max_new_tokens=1, temperature=1.0)
    one_line(caught)


def test_an_enormous_tokenizer_is_not_read(model):
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(600_000_000)  # sparse
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(model)
    assert "far too large" in one_line(caught)


# ---- chat templates

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
HUGE = "{{ 'a' * 99999999999 }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [(LOOPS, "takes longer than 0.3 s"), (DOUBLING, "wants more"), (HUGE, "wants more")],
)
@pytest.mark.slow
def test_a_template_is_bounded_in_time_and_memory(template, said, monkeypatch):
    monkeypatch.setattr("salsa.untrusted.MAX_TEMPLATE_SECONDS", 0.3)
    monkeypatch.setattr("salsa.untrusted.MAX_TEMPLATE_BYTES", 1 << 28)
    tokenizer = tiny_tokenizer(template=template)
    rows = [{"prompt": "hello", "completion": "you"}]
    for use in (
        lambda: render([{"role": "user", "content": "hi"}], tokenizer, "here"),
        lambda: sft_rows(rows, tokenizer, "here"),  # TRL renders those
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert said in one_line(caught)
    assert sft_rows(rows, tiny_tokenizer(), "here"), "and the next one is not disturbed"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_stays_in_its_sandbox(template):
    tokenizer = tiny_tokenizer(template=template)
    with pytest.raises(DataError) as caught:
        render([{"role": "user", "content": "hi"}], tokenizer, "here")
    assert "chat template refuses" in one_line(caught)


# ---- recipes


@pytest.fixture
def load_text(tmp_path, repository):
    def load(text: str, overrides=()):
        (tmp_path / "recipe.yaml").write_text(text)
        return Recipe.load(tmp_path / "recipe.yaml", overrides)

    return load


BILLION = "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch owned']\n",
        "name: !!python/name:os.system\n",
        "name: !!python/object/new:os.system ['true']\n",
        BILLION + "name: *a11\n",
        "name: &a [*a]\n",
        "name: " + "[" * 2000 + "]" * 2000,
        "name: " + "9" * 5000,
        "name: 2024-99-99\n",
        "name: " + "x" * 2_000_000,
        "? [a]\n: b\n",
    ],
    ids=["apply", "name", "new", "aliases", "itself", "deep", "digits", "date", "large", "key"],
)
def test_a_recipe_is_plain_values(load_text, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert "not YAML" in one_line(caught)
    assert not (tmp_path / "owned").exists()


def test_aliases_that_help_are_welcome(load_text, repository):
    text = (repository / "recipes" / "quickstart.yaml").read_text()
    values = yaml.safe_load(text)
    arm = {"init": "sft[0]", "reference": "soup"}
    values["rl"]["arms"] |= {"one": arm, "two": arm}
    dumped = yaml.dump(values)
    assert "&id001" in dumped
    assert load_text(dumped).rl.arms["two"].reference == "soup"


@pytest.mark.parametrize("value", ["!!python/name:os.system", "&a [*a]", "[" * 2000, "2024-99-99"])
def test_an_override_is_a_plain_value(load_text, repository, value):
    text = (repository / "recipes" / "quickstart.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        load_text(text, [f"rl.kl_coef={value}"])
    assert "is not YAML" in one_line(caught)


@pytest.mark.parametrize(
    "expression",
    [
        "soup(" * 40_000,
        "shrink(" * 40_000 + ")" * 40_000,
        "sft[" + "9" * 5000 + "]",
        "0.5*" * 50_000,
    ],
)
def test_expressions_are_bounded(load_text, repository, expression):
    values = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text())
    values["rl"]["arms"]["salsa"]["reference"] = expression
    with pytest.raises(ConfigError):
        load_text(yaml.safe_dump(values))


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", "..", ".hidden", "a\nb", "a\0b", ""])
def test_names_do_not_lead_out_of_the_run_directory(load_text, repository, name, tmp_path):
    values = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text())
    for change in (
        {"name": name},
        {"rl": values["rl"] | {"arms": {"ppo": values["rl"]["arms"]["ppo"], name: {}}}},
    ):
        with pytest.raises(ConfigError) as caught:
            load_text(yaml.safe_dump(values | change))
        one_line(caught)
    models = {"ppo": ["a"], name: ["b"]}
    with pytest.raises(ConfigError) as caught:
        EvalSpec.read(
            {"models": models, "prompts": {"source": "x.jsonl"}, "rewards": {"r": {"path": "c"}}},
            "here",
        )
    assert "would name files" in one_line(caught)
    assert stage_path(tmp_path, f"rl {name} seed 0", "0" * 64).parent == tmp_path / "stages"


# ---- data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"}\n"),
        ("rows.json", b"[" * 100_000),
        ("rows.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": ' + b"[" * 100_000, mtime=0)),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 100, mtime=0)[:40]),
        ("rows.jsonl", pickle.dumps({"prompt": "a"})),
        ("rows.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"),
    ],
)
def test_data_that_cannot_be_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(DataSource(path=str(tmp_path / name)), [("prompt",)])
    one_line(caught)


def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr("salsa.data.MAX_UNPACKED_BYTES", 1_000_000)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(DataError) as caught:
        load_rows(DataSource(path=str(tmp_path / "rows.jsonl.gz")), [("prompt",)])
    assert "unpacks to more than" in one_line(caught)


# ---- judges


@pytest.mark.parametrize(
    "text",
    [
        "[[" + "1" * 1_000_000,
        "[[" * 500_000,
        "[[A" * 300_000,
        "[[A" + "=" * 1_000_000,
        "[[1." * 250_000,
        "A" * 1_000_000,
    ],
)
def test_verdicts_are_read_in_linear_time(text):
    assert parse_rating(text) is None
    assert parse_pair_verdict(text) is None
    assert parse_arena_verdict(text) is None
    assert parse_rating(text + "[[7.5]]") in (7.5, None)
    assert parse_pair_verdict(text + "[[B]]") == "B"


def test_ratings_are_still_read():
    assert [parse_rating(f"so: [[{n}]]") for n in ("5", "5.5", "5.", "05", "11", "1.2.3", ".5")] == [
        5.0, 5.5, 5.0, 5.0, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["{q.__class__.__mro__}", "{q[0]}", "{q:>99999999999}", "{q!r}"])
def test_a_judge_prompt_reads_names_only(field):
    prompt = JudgePrompt("strange", None, f"please judge {field}")
    with pytest.raises(DataError) as caught:
        prompt.messages(Question(1, "math", ("x",)), {"q": "what"})
    assert "asks for" in one_line(caught)


def test_a_judge_prompt_file_is_plain_values(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "prompt_template: !!python/object/apply:os.system ['true']\nsystem_prompt: x\n"
    )
    with pytest.raises(DataError) as caught:
        load_judge_prompt(tmp_path / "p.yaml")
    one_line(caught)


# ---- stages


def test_a_resume_state_is_no_pickle(tmp_path):
    from salsa.runtime import checkpoint

    file = tmp_path / "state.pt"
    torch.save({"x": Bomb(tmp_path / "owned")}, file)
    with pytest.raises(SalsaError):
        checkpoint.load_state(file)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_digest_does_not_follow_into_directories(model):
    before = Checkpoint.of(model).digest
    (model / "sub.json").mkdir()
    assert Checkpoint.of(model).digest == before
