"""An evaluation with a thousand made-up verdicts: three arms, a judge with a taste for the first place and length."""

import random
from pathlib import Path

from salsa.evaluate.benchmarks import Bench, JudgePrompt, Match, Question
from salsa.evaluate.checkpoints import judge_record
from salsa.evaluate.judge import Reply, Totals
from salsa.evaluate.mtbench import MTBench
from salsa.evaluate.results import Arm, Results, summarise, verdict_rows
from salsa.evaluate.spec import EvalSpec

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")  # fmt: skip
ARMS = {"ppo": ("a",), "sft": ("b",), "salsa": ("c",)}
ATTACK = "<script>alert('owned')</script></script><img src=x onerror=alert(1)>"


def evaluation(num_questions: int = 170) -> tuple[dict, dict, dict, str, list[dict]]:
    """What `salsa.report.page.render` takes: `report.json`, no samples, no curves, the recipe and verdict rows."""
    rng = random.Random(0)
    questions = [
        Question(81 + i, CATEGORIES[i % 8], (f"Question {i}: {ATTACK}", "Again, shorter."))
        for i in range(num_questions)
    ]
    skill = {"sft": 4.5, "ppo": 5.5, "salsa": 5.8}
    answers = {
        arm: {q.id: [f"{arm} says " + "word " * rng.randint(1, 90) for _ in q.turns] for q in questions}
        for arm in skill
    }  # fmt: skip
    prompts = {
        f"{kind}{math}-{version}{turn}": JudgePrompt("p", None, "{question_1}" + "".join(fields))
        for kind, version, names in (("single", "v1", ["answer"]), ("pair", "v2", ["answer_a", "answer_b"]))
        for math in ("", "-math")
        for turn, number in (("", 1), ("-multi-turn", 2))
        for fields in [["#{" + f"{name}_{number}" + "}" for name in names]]
    }  # fmt: skip
    prompts |= {f"pair-math-v1{t}": prompts[f"pair-v2{t}"] for t in ("", "-multi-turn")}

    def ask(conversations):
        replies = []
        for (message,) in conversations:
            _, *shown = message["content"].split("#")
            worth = [skill[a.split()[0]] + len(a) / 300 + rng.gauss(0, 1) for a in shown]
            if len(shown) == 1:
                text = f"[[{min(10, max(1, round(worth[0], 1)))}]]"
            else:
                lead = worth[0] - worth[1] + 0.4
                text = "[[A]]" if lead > 0.3 else "[[B]]" if lead < -0.3 else "[[C]]"
            replies.append(Reply(f"{ATTACK} {text}" if rng.random() > 0.02 else "I cannot say."))
        return replies, Totals()

    pairs = [("sft", "ppo"), ("salsa", "ppo"), ("salsa", "sft")]
    match, played = Match(["ppo"], pairs, "judge", ask, Path()), MTBench(questions, prompts)
    bench = Bench(
        "MT-Bench", questions, answers,
        played.pair_rows(answers, match), played.single_rows(answers, match),
    )  # fmt: skip
    spec = EvalSpec.read(
        {
            "models": ARMS, "judge": {"url": "http://x/v1", "model": "judge", "price": [1.0, 2.0]},
            "mt_bench": {"questions": "q", "judge_prompts": "p", "references": "r"},
        },
        "test",
    )  # fmt: skip
    results = Results(
        "test", "ppo", {arm: Arm([arm], [0], ["0" * 64]) for arm in ARMS}, spec.model_dump(mode="json"),
        benches=[bench], judge=judge_record(spec.judge, match),
    )  # fmt: skip
    return summarise(results), {}, {}, spec.to_yaml(), verdict_rows(bench)
