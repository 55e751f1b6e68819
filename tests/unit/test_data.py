"""TRL's formats in, prompts out; and a clear word about everything else."""

import gzip
import json
import random

import pytest

from salsa import data
from salsa.config import DataSource
from salsa.errors import ConfigError, DataError
from tests.conftest import tiny_tokenizer

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def test_local_files_of_every_kind_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    write(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write((tmp_path / "x.jsonl").read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"):
        assert data.load_rows(DataSource(path=str(tmp_path / name)), [("prompt",)]) == rows


def test_limit_takes_a_seeded_sample(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(50)])
    take = lambda seed: data.load_rows(
        source.model_copy(update={"limit": 5, "shuffle_seed": seed}), [("prompt",)]
    )
    assert take(0) == take(0) != take(1)
    assert len({row["prompt"] for row in take(0)}) == 5


def test_prompt_forms(tokenizer):
    conversation = data.as_prompt({"prompt": [USER, REPLY, USER]}, tokenizer)
    assert (
        tokenizer.decode(conversation.ids)
        == "<|bos|><|user|>hi<|end|><|assistant|>hello<|end|><|user|>hi<|end|><|assistant|>"
    )
    assert conversation.text == "user: hi\nassistant: hello\nuser: hi"
    string = data.as_prompt({"prompt": "hi"}, tokenizer)
    assert (
        string
        == data.as_prompt({"prompt": [USER]}, tokenizer)
        == data.as_prompt({"messages": [USER, REPLY]}, tokenizer)
    )
    assert string.text == "hi"
    bare = data.as_prompt({"prompt": "hi"}, tiny_tokenizer(template=None))
    assert (bare.messages, bare.text, len(bare.ids)) == (None, "hi", 2)


def test_sft_rows_one_per_reply(tokenizer):
    rows = data.sft_rows(
        [{"messages": [USER, REPLY, USER, REPLY]}, {"prompt": "hi", "completion": "hello"}],
        tokenizer,
        "x",
    )
    assert rows == [
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
        {"prompt": [USER], "completion": [REPLY]},
    ]


def test_preference_rows(tokenizer):
    other = {"role": "assistant", "content": "go away"}
    expected = [{"prompt": [USER], "chosen": [REPLY], "rejected": [other]}]
    assert (
        data.preference_rows(
            [{"prompt": "hi", "chosen": "hello", "rejected": "go away"}], tokenizer, "x"
        )
        == expected
    )
    assert (
        data.preference_rows([{"chosen": [USER, REPLY], "rejected": [USER, other]}], tokenizer, "x")
        == expected
    )
    beside_their_prompt = {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, other]}
    assert data.preference_rows([beside_their_prompt], tokenizer, "x") == expected
    in_full = beside_their_prompt | {"prompt": [USER]}
    assert data.preference_rows([in_full], tokenizer, "x") == expected


def test_pairs_are_kept_back_by_pair_or_by_whole_prompt():
    prompts = [[{"role": "user", "content": "abcd"[i % 4]}] for i in range(12)]
    back, rest = data.kept_back(prompts, 0.1, 0, whole_prompts=False)
    assert len(back) == 2 and sorted(back + rest) == list(range(12))
    shown = list(range(12))
    random.Random(0).shuffle(shown)
    assert back + rest == shown
    back, rest = data.kept_back(prompts, 0.1, 0, whole_prompts=True)
    assert back == [i for i in shown if i % 4 == shown[0] % 4]  # three: a tenth and more
    assert rest == [i for i in shown if i not in back]
    assert len(data.kept_back(prompts, 0.3, 0, whole_prompts=True)[0]) == 6
    assert data.kept_back(prompts, 0, 0, whole_prompts=True) == ([], shown)


def test_conversations_that_are_no_pair_are_dropped_and_counted(tokenizer, capsys):
    """Equal ones, and one that is the other's beginning; equal strings are the doctor's to find."""
    other = {"role": "assistant", "content": "go away"}
    pair = {"chosen": [USER, REPLY], "rejected": [USER, other]}
    equal = {"chosen": [USER, REPLY], "rejected": [USER, REPLY]}
    beginning = {"chosen": [USER, REPLY], "rejected": [USER]}
    made = data.preference_rows([equal, pair, beginning], tokenizer, "x")
    assert made == [{"prompt": [USER], "chosen": [REPLY], "rejected": [other]}]
    assert "x: 2 of 3 pairs dropped" in capsys.readouterr().err
    with pytest.raises(DataError, match="x: none of 2 rows is a pair: .* Give two replies"):
        data.preference_rows([equal, beginning], tokenizer, "x")
    strings = {"prompt": "hi", "chosen": "hello", "rejected": "hello"}
    assert len(data.preference_rows([strings], tokenizer, "x")) == 1


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    """pyarrow raises its own errors, the system's and those of text, as the damage lies."""
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}] * 3), file)
    sound, refused = file.read_bytes(), set()
    for place in range(4, len(sound), 3):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 255]) + sound[place + 1 :])
        try:
            data.load_rows(DataSource(path=str(file)), [("prompt",)])
        except DataError as error:
            refused.add(type(error.__cause__).__name__)
    assert {"ArrowInvalid", "OSError"} <= refused


def test_a_template_is_tried_on_whole_conversations_too():
    """With assistant_only_loss, one that the template refuses would fail inside TRL, after the checks."""
    marks = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    refuses = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + marks
    tokenizer = tiny_tokenizer(template=refuses)
    rows = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY, USER, REPLY]}]
    with pytest.raises(DataError, match="x: the model's chat template refuses .* too long"):
        data.sft_rows(rows, tokenizer, "x", whole=True)
    assert len(data.sft_rows(rows[:1], tokenizer, "x", whole=True)) == 1


def load(path_or_rows, tmp_path, columns=(("prompt",),)):
    source = path_or_rows
    if isinstance(source, list):
        source = write(tmp_path / "x.jsonl", source)
    return data.load_rows(source, columns)


def test_messages(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(DataError, match="x.jsonl: no rows"):
        load([], tmp_path)
    with pytest.raises(DataError, match="row 2 has columns text; wanted prompt. Rename"):
        load([{"prompt": "a"}, {"text": "b"}], tmp_path)
    with pytest.raises(DataError, match=r"wanted messages or prompt \+ completion"):
        load([{"prompt": "a"}], tmp_path, [("messages",), ("prompt", "completion")])
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        load(DataSource(path="gone.jsonl"), tmp_path)
    with pytest.raises(DataError, match="is a directory"):
        load(DataSource(path=str(tmp_path)), tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{oops\n')
    with pytest.raises(DataError, match="bad.jsonl: line 2 is not JSON"):
        load(DataSource(path=str(tmp_path / "bad.jsonl")), tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="bad.parquet: cannot be read as parquet .* Copy or save"):
        load(DataSource(path=str(tmp_path / "bad.parquet")), tmp_path)
    for text, kind in (('{"prompt": "a"}', "an object"), ("5", "5"), ("null", "None")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=f"bad.json: holds {kind}, not a list of rows. Put"):
            load(DataSource(path=str(tmp_path / "bad.json")), tmp_path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"x.csv: unknown kind of file. Use one of .jsonl"):
        load(DataSource(path=str(tmp_path / "x.csv")), tmp_path)
    with pytest.raises(DataError, match="nobody/nothing: neither a file here nor a data set"):
        load(DataSource(path="nobody/nothing"), tmp_path)
    with pytest.raises(ConfigError, match="no_such_module cannot be imported"):
        load(DataSource(call="no_such_module:rows"), tmp_path)
    with pytest.raises(ConfigError, match="salsa.demo has no function 'rows'. Check the name"):
        load(DataSource(call="salsa.demo:rows"), tmp_path)
    with pytest.raises(DataError, match="the model has no chat template. Set model.chat_template"):
        data.as_prompt({"prompt": [USER]}, tiny_tokenizer(template=None))
    with pytest.raises(DataError, match="none of 1 prompts has at most 2 tokens"):
        data.load_prompts(
            write(tmp_path / "x.jsonl", [{"prompt": "long"}]), tokenizer, max_tokens=2
        )
    for row in (
        {"prompt": [{"text": "x"}]},
        {"messages": USER},
        {"messages": ["hello"]},
        {"messages": 5},
    ):
        with pytest.raises(DataError, match="a conversation is a list of"):
            data.as_prompt(row, tokenizer)
    assert data.as_prompt({"messages": "hi"}, tokenizer) == data.as_prompt(
        {"prompt": "hi"}, tokenizer
    )
    with pytest.raises(DataError, match="no row has an assistant's reply to learn from. Give"):
        data.sft_rows([{"messages": [USER]}], tokenizer, "x")
    refusing = tiny_tokenizer(template="{{ raise_exception('only users') }}")
    with pytest.raises(DataError, match="template refuses a conversation: only users"):
        data.as_prompt({"prompt": "hi"}, refusing)


def test_hub_names_go_to_the_hub_clients(monkeypatch, tmp_path):
    """No network here: what the clients are asked for is checked, what they answer is made up."""
    import datasets
    import huggingface_hub

    from salsa.artifacts import resolve

    asked = {}

    def load_dataset(path, name, split):
        asked["data"] = (path, name, split)
        return datasets.Dataset.from_list([{"prompt": "a"}])

    def snapshot_download(path, revision, ignore_patterns):
        asked["model"] = (path, revision, "*.bin" in ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    rows = data.load_rows(DataSource(path="org/data", name="main", split="test"), [("prompt",)])
    assert rows == [{"prompt": "a"}]
    assert resolve("org/model", revision="abc") == tmp_path
    assert asked == {"data": ("org/data", "main", "test"), "model": ("org/model", "abc", True)}


def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    source = write(tmp_path / "x.jsonl", [{"prompt": "hi"}, {"prompt": "x" * 50}])
    assert len(data.load_prompts(source, tokenizer, max_tokens=20)) == 1
    assert "1 of 2 prompts dropped, over 20 tokens" in capsys.readouterr().err
