"""`salsa eval` of checkpoints: everything is answered, judged, written in upstream's formats and reported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from salsa.errors import ConfigError, DataError
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.answers import GREEDY, Writer, _batches
from salsa.evaluate.benchmarks import JudgePrompt, Match, Question, pairings
from salsa.evaluate.checkpoints import evaluate_checkpoints
from salsa.evaluate.spec import run_arms, spec_of
from salsa.runtime.engine import Engine
from tests.judge_server import JudgeServer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Say a.", "Again."]},
    {"question_id": 82, "category": "writing", "turns": ["Say {b}.", "And {0}?"]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "2 + 2?"]},
]
REFERENCE_FILE = "mt/reference_answer/gpt-4.jsonl"


def reference(question, *turns):
    return {"question_id": question, "choices": [{"index": 0, "turns": list(turns)}]}


REFERENCES = [reference(111, "2", "4")]
PROMPTS = [
    {"name": f"{kind}-{math}v{version}{turn}", "system_prompt": "judge", "prompt_template": template}
    for kind, version in (("single", "1"), ("pair", "2"))
    for math in ("", "math-")
    for turn in ("", "-multi-turn")
    for template in ["R{ref_answer_1} " * bool(math) + {
        ("single", ""): "{question}|{answer}",
        ("single", "-multi-turn"): "{question_1}|{answer_1}|{question_2}|{answer_2}",
        ("pair", ""): "{question}|{answer_a}|{answer_b}",
        ("pair", "-multi-turn"): "{question_2}|{answer_a_2}|{answer_b_2}",
    }[kind, turn]]
]  # fmt: skip
for prompt in PROMPTS:  # upstream's names: pair-v2 and pair-math-v1
    prompt["name"] = prompt["name"].replace("pair-math-v2", "pair-math-v1")


def write(file: Path, rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def bench(tmp_path):
    """MT-Bench in FastChat's layout and Arena-Hard in its own, with nobody's real questions."""
    write(tmp_path / "mt" / "question.jsonl", QUESTIONS)
    write(tmp_path / "mt" / "reference_answer" / "gpt-4.jsonl", REFERENCES)
    write(tmp_path / "judge_prompts.jsonl", PROMPTS)
    write(
        tmp_path / "arena" / "question.jsonl",
        [{"uid": u, "category": "hard_prompt", "prompt": f"Do {u}."} for u in "xyz"],
    )
    (tmp_path / "arena" / "judge_config.yaml").write_text(
        "system_prompt: judge\nprompt_template: 'arena {QUESTION}|{ANSWER_A}|{ANSWER_B}'\n"
    )
    write(tmp_path / "held.jsonl", [{"prompt": f"word {i}"} for i in range(12)])
    return tmp_path


def verdict(prompt: str) -> str:
    """A judge that goes by the prompt's length: deterministic, and different for the two games."""
    if prompt.startswith("arena"):
        return ["[[A>>B]]", "[[B>A]]", "[[A=B]]"][sum(map(ord, prompt)) % 3]
    return f"[[{sum(map(ord, prompt)) % 10 + 1}]] and so [[{'ABC'[sum(map(ord, prompt)) % 3]}]]"


def words(bench, models, url, **more):
    return dict(
        models=models, mt_bench=bench / "mt", arena_hard=bench / "arena", judge=url, judge_model="org/m",
        settings=["mt_bench.max_new_tokens=8", "arena_hard.max_new_tokens=8", "judge.concurrency=4"], **more,
    )  # fmt: skip


@pytest.mark.slow
def test_everything_of_three_arms_and_nothing_twice(bench, make_checkpoint, tmp_path):
    models = [
        f"{name}={make_checkpoint('llama', seed).path}"
        for seed, name in enumerate(("sft", "ppo", "salsa"))
    ]
    out = tmp_path / "out"
    with JudgeServer(verdict) as server:
        spec = spec_of(
            **words(
                bench, models, server.url, prompts=str(bench / "held.jsonl"), rewards=["gold=tests.rewards:letters"],
                kl_to=models[0].partition("=")[2], baseline="ppo",
            )
        )  # fmt: skip
        evaluate_checkpoints(spec, out)
        asked = sum(server.attempts.values())
        page = (out / "report.html").read_bytes()
        evaluate_checkpoints(spec, out)
        bought = (out / "judgments.jsonl").read_text().splitlines()
        assert sum(server.attempts.values()) == asked == len(bought)
    assert (out / "report.html").read_bytes() == page
    report = json.loads((out / "report.json").read_text())
    mt, arena = report["benchmarks"]["MT-Bench"], report["benchmarks"]["Arena-Hard"]
    against_ppo = {("sft", "ppo"), ("salsa", "ppo")}
    assert {pair_of(p) for p in mt["pairs"]} == against_ppo | {("salsa", "sft")}
    assert {pair_of(p) for p in arena["pairs"]} == against_ppo
    assert all(p["n"] == 6 and p["num_clusters"] == 3 for p in mt["pairs"])
    assert set(mt["singles"]["arms"]["ppo"]["by_category"]) == {"writing", "math"}
    kl = "kl_to_" + models[0].partition("=")[2]
    means = {name: arm["mean"] for name, arm in report["arms"].items()}
    assert means["sft"][kl]["mean"] == 0 < means["ppo"][kl]["mean"]
    assert {p["score"] for p in report["pairs"]} == {"gold"} and len(report["pairs"]) == 3
    assert report["num_prompts"] == 12 and len(report["ended"]) == 2
    check_files(out, mt, arena)


def pair_of(pair):
    return pair["candidate"], pair["baseline"]


def check_files(out: Path, mt, arena):
    """What was written is upstream's format: reading it back gives the report's figures."""
    pairs = mtbench.summarise_pairs(out / "mt_bench" / "model_judgment" / "org-m_pair.jsonl")
    assert pairs.judge == "org/m"
    for pair in mt["pairs"]:
        again = pairs.pairs[pair["candidate"], pair["baseline"]].win_rate
        assert pair["rate"] == pytest.approx(again.rate) and pair["low"] == pytest.approx(again.low)
    singles = mtbench.summarise_singles(out / "mt_bench" / "model_judgment" / "org-m_single.jsonl")
    assert singles.models["salsa"].score.mean == pytest.approx(
        mt["singles"]["arms"]["salsa"]["score"]["mean"]
    )
    found = arena_hard.summarise_pairs(out / "arena_hard" / "model_judgment" / "org-m")
    for pair in arena["pairs"]:
        again = found.pairs[pair["candidate"], pair["baseline"]].win_rate
        assert pair["rate"] == pytest.approx(again.rate)
    answers = mtbench.load_answers(out / "mt_bench" / "model_answer" / "salsa.jsonl")
    assert set(answers) == {81, 82, 111} and all(len(turns) == 2 for turns in answers.values())
    assert set(arena_hard.load_answers(out / "arena_hard" / "model_answer" / "ppo.jsonl")) == set(
        "xyz"
    )


@pytest.mark.slow
def test_two_checkpoints_an_arm_and_an_outside_baseline(bench, make_checkpoint, tmp_path):
    paths = [make_checkpoint("llama", seed).path for seed in range(4)]
    models = [f"ppo={paths[0]}", f"salsa={paths[1]}", f"ppo={paths[2]}", f"salsa={paths[3]}"]
    outside = [
        {"uid": u, "messages": [{"role": "assistant", "content": {"answer": "no"}}]} for u in "xyz"
    ]
    write(bench / "gpt.jsonl", outside)
    asked = words(bench, models, "http://127.0.0.1:9/v1")
    asked["settings"].append(f"arena_hard.baseline={bench / 'gpt.jsonl'}")
    with JudgeServer(verdict) as server:
        spec = spec_of(**asked | {"judge": server.url})
        out = evaluate_checkpoints(spec, tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    (pair,) = report["benchmarks"]["MT-Bench"]["pairs"]
    assert (pair["candidate"], pair["baseline"], pair["n"]) == ("salsa", "ppo", 12)
    assert [one["seed"] for one in pair["by_seed"]] == [0, 1]
    assert sum(one["rate"] for one in pair["by_seed"]) / 2 == pytest.approx(pair["rate"], abs=1e-6)
    assert "<br>seed 1: " in (out / "report.html").read_text()
    arena = report["benchmarks"]["Arena-Hard"]["pairs"]
    assert {(p["candidate"], p["baseline"], p["n"]) for p in arena} == {
        ("ppo", "gpt", 12),
        ("salsa", "gpt", 12),
    }
    assert (out / "mt_bench" / "model_answer" / "ppo-seed-1.jsonl").exists()
    assert "2 training seeds per arm" in report["notes"][0]
    bench.joinpath("gpt.jsonl").rename(bench / "ppo.jsonl")
    asked["settings"][-1] = f"arena_hard.baseline={bench / 'ppo.jsonl'}"
    with pytest.raises(DataError, match="'ppo' names a model and, by its file, the baseline"):
        arena = arena_hard.ArenaHard(spec_of(**asked).arena_hard)
        arena.judged(
            {"ppo": {}, "salsa": {}}, Match([], [], "judge", lambda talks: ([], None), tmp_path)
        )


def test_questions_of_another_benchmark_are_one_line(tmp_path):
    for turns in (["MT-Bench's are text"], []):
        write(tmp_path / "q.jsonl", [{"question_id": 1, "category": "c", "turns": turns}])
        with pytest.raises(
            DataError, match=r"q.jsonl.*turns is no list of \{content\}. Take question.jsonl"
        ):
            arena_hard.load_questions(tmp_path / "q.jsonl")


@pytest.mark.slow
def test_a_judge_without_verdicts_still_gives_a_report(bench, make_checkpoint, tmp_path):
    models = [f"a={make_checkpoint('llama', 0).path}", f"b={make_checkpoint('llama', 1).path}"]
    with JudgeServer(lambda prompt: "I cannot say.") as server:
        out = evaluate_checkpoints(spec_of(**words(bench, models, server.url)), tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    assert report["benchmarks"]["MT-Bench"]["pairs"] == []
    assert any("no verdict at all" in note for note in report["notes"])


@pytest.mark.slow
def test_a_judge_that_rates_everything_alike_is_told(bench, make_checkpoint, tmp_path):
    models = [f"a={make_checkpoint('llama', 0).path}", f"b={make_checkpoint('llama', 1).path}"]
    with JudgeServer(lambda prompt: "[[3]] [[A]] [[A=B]]") as server:
        out = evaluate_checkpoints(spec_of(**words(bench, models, server.url)), tmp_path / "out")
    notes = json.loads((out / "report.json").read_text())["notes"]
    assert any("every rating of a is 3." in note for note in notes)
    assert any("only 0% of the verdicts survive" in note for note in notes)


def test_a_model_in_this_process_judges(bench, make_checkpoint, tmp_path):
    a, b = make_checkpoint("llama", 0).path, make_checkpoint("llama", 1).path
    spec = spec_of(
        [f"a={a}", f"b={b}"], prompts=str(bench / "held.jsonl"), judge=str(a),
        settings=[
            f"prompts.judge_prompts={bench / 'judge_prompts.jsonl'}",
            "judge.max_tokens=4", "prompts.max_new_tokens=4",
        ],
    )  # fmt: skip
    out = evaluate_checkpoints(spec, tmp_path / "out")
    rows = [json.loads(line) for line in (out / "judgments.jsonl").read_text().splitlines()]
    assert len(rows) > 20 and all(0 < row["prompt_tokens"] < 250 for row in rows)


def test_greedy_answers_are_the_argmax_and_need_no_batch(make_checkpoint, tmp_path):
    """Temperature 0 equals step-by-step argmax, whatever else is in the batch."""
    path = make_checkpoint("llama", 3).path
    writer = Writer(path, 6, 2, Engine.create("fp32"))
    talks = [[{"role": "user", "content": text}] for text in ("a", "something longer", "bc")]
    replies = writer.replies(talks, [0.0] * 3, seed=0, label="x", directory=tmp_path)
    for talk, reply in zip(talks, replies, strict=True):
        ids = writer.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        for _ in range(6):
            token = int(writer.sampler.model.backbone(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token == writer.tokenizer.eos_token_id:
                break
        expected = writer.tokenizer.decode(ids, skip_special_tokens=True)
        assert expected.strip().endswith(reply)
    assert GREEDY < 1e-6


def test_interrupted_answers_go_on(make_checkpoint, tmp_path):
    """What a kill left, half a line included, is kept; the rest comes out as it would have."""
    writer = Writer(make_checkpoint("llama", 4).path, 6, 2, Engine.create("fp32"))
    talks = [[{"role": "user", "content": f"{i}"}] for i in range(7)]
    arguments = {"temperatures": [0.7] * 7, "seed": 3, "label": "x"}
    whole = writer.replies(talks, directory=tmp_path / "whole", **arguments)
    file = tmp_path / "whole" / "replies.jsonl"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "replies.jsonl").write_bytes(file.read_bytes()[:130])
    assert writer.replies(talks, directory=tmp_path / "cut", **arguments) == whole
    assert len((tmp_path / "cut" / "replies.jsonl").read_text().splitlines()) == 7


def test_batches_keep_temperatures_apart():
    assert _batches([0, 1, 2, 3, 4], [0, 0, 0, 0.7, 0.7], 2) == [[0, 1], [2], [3, 4]]


def test_pairings_put_the_baseline_first():
    models = {"sft": ["sft"], "ppo": ["ppo"], "salsa": ["salsa"]}
    assert pairings(models, "ppo") == [("sft", "ppo"), ("salsa", "ppo"), ("salsa", "sft")]


def test_templates_are_filled_once():
    """Answers may hold braces and even the template's own fields."""
    prompts = {p["name"]: JudgePrompt(p["name"], None, p["prompt_template"]) for p in PROMPTS}
    question = Question(1, "writing", ("{answer_b} {x}",))
    prompt = mtbench.judge_prompt(prompts, "pair", question, 1)
    (message,) = mtbench.messages(prompt, question, 1, answer_a=["{question}"], answer_b=["{{}}"])
    assert message["content"] == "{answer_b} {x}|{question}|{{}}"


def test_questions_in_the_hubs_format_and_corrected_references(tmp_path):
    rows = [
        {"prompt_id": 7, "category": "math", "prompt": ["1 + 1?", "2 + 2?"], "reference": ["3", "5"]},
        {"prompt_id": 8, "category": "stem", "prompt": ["Why?", "And?"], "reference": []},
    ]  # fmt: skip
    file = write(tmp_path / "q.jsonl", rows)
    first, second = mtbench.load_questions(file)
    assert (
        first.reference == ("3", "5")
        and second.reference is None
        and second.turns == ("Why?", "And?")
    )
    corrections = write(tmp_path / "c.jsonl", [reference(7, "2", "4")])
    assert mtbench.load_questions(file, None, corrections)[0].reference == ("2", "4")
    with pytest.raises(DataError, match="no questions there. Give a file"):
        mtbench.load_questions(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("mt/question.jsonl", [*QUESTIONS, QUESTIONS[0]], "question 81 is there twice"),
        ("mt/question.jsonl", [{"question_id": 1, "category": "x", "turns": "one"}], "list of one or two strings"),
        ("mt/question.jsonl", [{"uid": 1, "prompt": "x"}], "no question_id, category, turns"),
        (REFERENCE_FILE, [reference(7, "a")], "needs a reference answer"),
        (REFERENCE_FILE, [{"question_id": 111, "choices": []}], "no list of strings"),
        (REFERENCE_FILE, [*REFERENCES, reference(111, "2", "5")], "second, different answer"),
        ("judge_prompts.jsonl", PROMPTS[:3], "no 'pair-v2' (they have single-v1,"),
        ("judge_prompts.jsonl", [{**p, "prompt_template": "{nothing}"} for p in PROMPTS], "asks for 'nothing'"),
        ("arena/question.jsonl", [{"uid": "x"}], "no question_id, category, turns (it has uid)"),
        ("arena/judge_config.yaml", [{"system_prompt": "x"}], "no Arena-Hard judge prompt"),
    ],
)  # fmt: skip
def test_bad_files_say_where_to_get_good_ones(
    bench, make_checkpoint, tmp_path, file, rows, message
):
    write(bench / file, rows)
    spec = spec_of(
        **words(bench, [f"{m}={make_checkpoint('llama', 0).path}" for m in "ab"], "http://127.0.0.1:9/v1")
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        evaluate_checkpoints(spec, tmp_path / "out")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": []}, "models is missing"),
        ({"models": ["a=x"]}, "nothing to answer"),
        ({"models": ["a=x"], "prompts": "p.jsonl"}, "prompts need a reward"),
        ({"models": ["a=x", "b=y", "a=z"], "prompts": "p.jsonl", "rewards": ["r=m:f"]}, "equally many checkpoints"),
        ({"models": ["=x"]}, "write NAME=DIRECTORY"),
        ({"models": ["a=x"], "rewards": ["m:f"]}, "write NAME=DIRECTORY or NAME=module:function"),
        ({"models": ["a=x"], "mt_bench": Path("nowhere")}, "Take it from github.com/lm-sys/FastChat"),
        ({"models": ["a=x"], "arena_hard": Path("nowhere")}, "Take it from github.com/lmarena"),
        ({"models": ["a=x"], "settings": ["judge.ulr=x"]}, "unknown key 'judge.ulr'. Did you mean 'url'?"),
        ({"models": ["a=x"], "judge": "http://x/v1"}, "give model"),
        (
            {"models": ["a=x"], "prompts": "p", "rewards": ["r=m:f"], "judge": "http://x/v1", "judge_model": "m"},
            "nothing to judge",
        ),
        ({"models": ["a=x"], "baseline": "b", "prompts": "p", "rewards": ["r=m:f"]}, "baseline='b' is none of"),
        ({"models": ["a=x"], "spec": Path("gone.yaml")}, "gone.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_meant(given, message):
    with pytest.raises(ConfigError) as caught:
        spec_of(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("asked", ["mt_bench", "arena_hard", "prompts.judge_prompts"])
def test_one_model_meets_nobody_and_no_judge_is_paid(bench, make_checkpoint, tmp_path, asked):
    settings = ["mt_bench.max_new_tokens=4", "arena_hard.max_new_tokens=4"]
    what = {
        "mt_bench": {"mt_bench": bench / "mt", "settings": settings[:1]},
        "arena_hard": {"arena_hard": bench / "arena", "settings": settings[1:]},
        "prompts.judge_prompts": {
            "prompts": str(bench / "held.jsonl"),
            "settings": [f"{asked}={bench / 'judge_prompts.jsonl'}", "prompts.max_new_tokens=4"],
        },
    }[asked]
    models = [f"a={make_checkpoint('llama', 0).path}"]
    with JudgeServer(verdict) as server:
        with pytest.raises(ConfigError) as caught:
            spec = spec_of(models, judge=server.url, judge_model="m", **what)
            evaluate_checkpoints(spec, tmp_path / "out")
        assert not server.attempts
    assert f"{asked} compares models in pairs, and there is only 'a'; give a second" in str(
        caught.value
    )


def test_one_model_may_meet_an_outside_baseline(bench):
    spec = spec_of(
        ["a=x"], arena_hard=bench / "arena", judge="http://x/v1", judge_model="m",
        settings=["arena_hard.baseline=gpt.jsonl"],
    )  # fmt: skip
    assert spec.against == "a" and spec.arena_hard.baseline == "gpt.jsonl"


def test_a_spec_file_and_its_overrides(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("models: {a: [x]}\nprompts: {source: p.jsonl}\nrewards: {r: {call: 'm:f'}}\n")
    spec = spec_of((), spec=file, settings=["prompts.temperature=0.5"])
    assert spec.models == {"a": ("x",)} and spec.prompts.temperature == 0.5 and spec.against == "a"


def test_arms_of_a_run(tmp_path):
    write(tmp_path / "stages" / "rl-1" / "stage.json", [{"output": "d1"}])
    report = {"arms": {
        "sft": {"trained": False, "seeds": [{"policy": "elsewhere"}]},
        "ppo": {"trained": True, "seeds": [{"policy": "d1"}]},
    }}  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert run_arms(tmp_path) == {"ppo": [str(tmp_path / "stages" / "rl-1")]}
    report["arms"]["ppo"]["seeds"][0]["policy"] = "d2"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="policy of ppo .d2. is gone"):
        run_arms(tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        run_arms(tmp_path)


def test_models_with_other_vocabularies_have_no_kl(bench, make_checkpoint, tmp_path):
    other = make_checkpoint("llama", 5)
    changed = tmp_path / "changed"
    shutil.copytree(other.path, changed)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    spec = spec_of(
        [f"a={other.path}"], prompts=str(bench / "held.jsonl"), rewards=["gold=tests.rewards:letters"],
        kl_to=str(changed),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="differ in vocabulary"):
        evaluate_checkpoints(spec, tmp_path / "out")


def test_options_of_checkpoints_do_not_fit_a_recipe(repository):
    recipe = str(repository / "recipes" / "quickstart.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "salsa", "eval", recipe, "--judge", "http://x/v1"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and "is a recipe, and these options are for checkpoints" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
