"""scripts/smollm2.py: what is trained on is never evaluated on, and human choices keep their direction."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"
HUMAN = [
    {"prompt": " Why? ", "completion_a": "Because.", "completion_b": "No.", "preference": "a-is-better"},
    {"prompt": "How?", "completion_a": "So.", "completion_b": "Thus.", "preference": "b-is-slightly-better"},
    {"prompt": "Who?", "completion_a": "I.", "completion_b": "You.", "preference": "tie"},
    {"prompt": "When?", "completion_a": "Now.", "completion_b": "Now.", "preference": "a-is-better"},
]  # fmt: skip


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_are_split_and_choices_are_turned_the_right_way(tmp_path, monkeypatch):
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    (out / "model").mkdir(parents=True)
    (out / "model" / "model.safetensors").touch()  # a model that is there is left alone
    prompts = [{"prompt": f"question {i}"} for i in range(2405)]
    replies = [{"messages": [{"role": "assistant", "content": str(i)}]} for i in range(603)]
    write(given / "prompts.jsonl", prompts)
    write(given / "sft.jsonl", replies)
    write(given / "preferences.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    write(given / "tulu1_human_eval_annotations.jsonl", HUMAN)
    write(given / "mt_bench_question.jsonl", [{"turns": ["first", "second"]}])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(given), str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (read(out / "rl.jsonl"), read(out / "heldout.jsonl")) == (prompts[:2400], prompts[2400:])
    assert (read(out / "sft.jsonl"), read(out / "sft-heldout.jsonl")) == (
        replies[:600],
        replies[600:],
    )
    assert read(out / "human.jsonl") == [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": "How?", "chosen": "Thus.", "rejected": "So."},
    ]
    assert read(out / "mt_bench.jsonl") == [{"prompt": "first"}]
