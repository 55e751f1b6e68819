"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): FastChat's files, the judge's conversations, verdicts and their sums.

Departs from FastChat on purpose: a rating is the first `[[n]]` in 1..10 and never a bare `[n]`, which is often code; of
several pairwise labels the last counts; a game without a verdict drops its comparison and is counted; repeated rows
count once; reference answers come from a file, not from whoever judges, and single ones can be replaced by corrections.
Nothing of upstream comes with salsa: the files are FastChat's (`fastchat/llm_judge/data`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import digest_of
from salsa.config.schema import DataSource
from salsa.errors import DataError
from salsa.evaluate import judgments
from salsa.evaluate.benchmarks import Answers, Bench, JudgePrompt, Match, Question
from salsa.evaluate.bias import SWAPPED
from salsa.evaluate.judge import Message
from salsa.evaluate.judgments import Arms, Comparison, Lengths, PairsSummary, PathOrRows, Row
from salsa.evaluate.spec import MT_BENCH_SOURCE, MTBenchConfig
from salsa.evaluate.winrate import Difference, Estimate, difference_of, nested_mean

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Their judge prompts show a reference answer."""

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature of the answers by category; 0 for all others."""

_RATING = re.compile(r"\[\[([0-9]+(?:\.[0-9]*)?)\]\]")
_LABEL = re.compile(r"\[\[([ABC])\]\]")

Ratings = dict[tuple[Any, int, int], float]
"""(question, turn, seed) → rating."""


@dataclass(frozen=True)
class SingleSummary:
    """One model's ratings."""

    score: Estimate
    """Mean over (question, turn), 1 to 10, clustered by question."""
    by_category: Mapping[str, Estimate]
    by_turn: Mapping[int, Estimate]
    n: int
    dropped: int
    """Judgments without a rating in 1..10."""


@dataclass(frozen=True)
class SinglesSummary:
    """Every model of a file of ratings."""

    judge: str
    models: Mapping[str, SingleSummary]
    differences: Mapping[tuple[str, str], Difference]
    """(a, b) → mean of a − b over the (question, turn) that both were rated on."""
    counts: Mapping[str, int]


def parse_rating(text: str) -> float | None:
    """The first `[[n]]` of a judgment, if it lies in 1..10; decimals are allowed."""
    match = _RATING.search(text)
    if match is None:
        return None
    value = float(match[1])
    return value if 1 <= value <= 10 else None


def parse_pair_verdict(text: str) -> str | None:
    """`A`, `B` or `tie` by the last `[[A]]`, `[[B]]` or `[[C]]` of a judgment; None if there is none.

    Case counts, as upstream: judges quote code, and `df[[a]]` is no verdict.
    """
    labels = _LABEL.findall(text)
    return {"A": "A", "B": "B", "C": "tie"}[labels[-1]] if labels else None


def summarise_pairs(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
    lengths: Lengths | None = None,
    arms: Arms | None = None,
) -> PairsSummary:
    """Win rates from a file in the format of FastChat's `<judge>_pair.jsonl`.

    Args:
        path_or_rows: the file, a directory of such files, or its rows.
        judge: whose rows, if there are several judges'.
        categories: question → category, for rates by category (judgments do not say).
        reparse: read the verdicts from the judge's texts instead of `g1_winner` and `g2_winner`.
        lengths: model → question → characters of each turn's answer, for the length statistics.
        arms: model → (arm, training seed), to summarise arms of several checkpoints.

    Raises:
        DataError: rows of another format, of several judges, or without a single verdict.
    """
    counts: Counter[str] = Counter()
    checked = [_checked_pair(row) for row in judgments.read_rows(path_or_rows)]
    rows, judge = judgments.of_one_judge(checked, judge)
    rows = judgments.without_duplicates(rows, _pair_key, _winners, counts)
    order: dict[frozenset[str], tuple[str, str]] = {}
    comparisons = []
    for row in rows:
        question, pair = row.values["question_id"], (row.values["model_1"], row.values["model_2"])
        one = _place(row, "g1", ("model_1", "model_2"), reparse, counts)
        two = _place(row, "g2", ("model_2", "model_1"), reparse, counts)
        scores: tuple[tuple[float, float], ...] = ()
        if one is not None and two is not None:
            agreed = one == SWAPPED[two]
            scores = (({"first": 1.0, "second": 0.0, "tie": 0.5}[one] if agreed else 0.5, 1.0),)
        comparison = Comparison(
            question=question,
            turn=_turn(row),
            category=(categories or {}).get(question, ""),
            candidate=pair[0],
            baseline=pair[1],
            games=(one, two),
            scores=scores,
            missing=0 if scores else 1,
        )
        as_first_met = order.setdefault(frozenset(pair), pair) == pair
        comparisons.append(comparison if as_first_met else comparison.turned())
    return judgments.summarise(comparisons, judge, counts, lengths, arms)


def summarise_singles(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    categories: Mapping[Any, str] | None = None,
    reparse: bool = False,
    arms: Arms | None = None,
) -> SinglesSummary:
    """Mean ratings from a file in the format of FastChat's `<judge>_single.jsonl`; arguments as `summarise_pairs`.

    Raises:
        DataError: rows of another format, of several judges, or a model without a single rating.
    """
    counts: Counter[str] = Counter()
    checked = [_checked_single(row) for row in judgments.read_rows(path_or_rows)]
    rows, judge = judgments.of_one_judge(checked, judge)
    score = lambda row: row.values.get("score")
    rows = judgments.without_duplicates(rows, _single_key, score, counts)
    judged: dict[str, dict[tuple[Any, int, int], float | None]] = {}
    for row in rows:
        question, turn, model = _single_key(row)
        arm, seed = (arms or {}).get(model, (model, 0))
        judged.setdefault(arm, {})[question, turn, seed] = _rating(row, reparse, counts)
    unshared = judgments.num_unshared([set(own) for own in judged.values()])
    counts["ratings that not every model has"] = unshared
    ratings = {m: {k: v for k, v in own.items() if v is not None} for m, own in judged.items()}
    for model, own in ratings.items():
        if not own:
            raise judgments.NoVerdict(
                f"{model}: none of {len(judged[model])} judgments holds a rating in 1 to 10."
            )
    return SinglesSummary(
        judge=judge,
        models={
            model: SingleSummary(
                score=_mean(own),
                by_category=_means(own, lambda key: (categories or {}).get(key[0])),
                by_turn=_means(own, lambda key: key[1]),
                n=len(own),
                dropped=len(judged[model]) - len(own),
            )
            for model, own in ratings.items()
        },
        differences={
            (a, b): difference_of(_mean(shared), len(shared))
            for a, b in combinations(ratings, 2)
            if (shared := {k: x - ratings[b][k] for k, x in ratings[a].items() if k in ratings[b]})
        },
        counts=dict(+counts),
    )


def _checked_pair(row: Row) -> Row:
    if "model" in row.values and "score" in row.values:
        raise DataError(f"{row.where} rates a single answer. Use summarise_singles for such files.")
    names = ("question_id", "model_1", "model_2")
    judgments.need(row, "pairwise MT-Bench judgment", *names)
    judgments.need_names(row, *names)
    for name in ("g1", "g2"):
        if f"{name}_winner" not in row.values and f"{name}_judgment" not in row.values:
            raise DataError(f"{row.where}: has neither {name}_winner nor {name}_judgment.")
    if row.values["model_1"] == row.values["model_2"]:
        raise DataError(f"{row.where}: compares {row.values['model_1']} with itself.")
    return row


def _pair_key(row: Row) -> tuple[Any, int, frozenset[str]]:
    values = row.values
    return values["question_id"], _turn(row), frozenset((values["model_1"], values["model_2"]))


def _winners(row: Row) -> list[Any]:
    """The model that won each game by name, whichever way round the row has the models."""
    stored = [str(row.values.get(f"{game}_winner")) for game in ("g1", "g2")]
    return [row.values[w] if w in ("model_1", "model_2") else w for w in stored]


def _turn(row: Row) -> int:
    turn = row.values.get("turn", 1)  # FastChat's first files had one turn and did not say so
    if isinstance(turn, bool) or turn not in (1, 2):
        raise DataError(f"{row.where}: turn is {turn!r}; MT-Bench has turns 1 and 2.")
    return int(turn)


def _place(
    row: Row, game: str, shown: tuple[str, str], reparse: bool, counts: Counter[str]
) -> str | None:
    """Which place won one game, in which `shown` were the first and the second."""
    stored: Any = row.values.get(f"{game}_winner")
    text = row.values.get(f"{game}_judgment")
    parsed = None
    if isinstance(text, str):
        parsed = {"A": "first", "B": "second", "tie": "tie"}.get(parse_pair_verdict(text) or "")
        counts["texts with several different labels"] += len(set(_LABEL.findall(text))) > 1
    if reparse or stored is None:
        return parsed
    known = {shown[0]: "first", shown[1]: "second", "tie": "tie", "error": None}
    if not isinstance(stored, str) or stored not in known:
        counts["unknown verdicts"] += 1
        return None
    if isinstance(text, str) and parsed != known[stored]:
        counts["verdicts that differ from their text"] += 1
    return known[stored]


def _checked_single(row: Row) -> Row:
    if "model_1" in row.values:
        raise DataError(f"{row.where} compares two answers. Use summarise_pairs for such files.")
    judgments.need(row, "MT-Bench rating", "question_id", "model")
    judgments.need_names(row, "question_id", "model")
    if "score" not in row.values and "judgment" not in row.values:
        raise DataError(f"{row.where}: has neither score nor judgment.")
    return row


def _single_key(row: Row) -> tuple[Any, int, str]:
    return row.values["question_id"], _turn(row), row.values["model"]


def _rating(row: Row, reparse: bool, counts: Counter[str]) -> float | None:
    score, text = row.values.get("score"), row.values.get("judgment")
    parsed = parse_rating(text) if isinstance(text, str) else None
    if reparse or "score" not in row.values:
        counts["judgments without a rating"] += parsed is None
        return parsed
    if score is None or score == -1:
        counts["judgments without a rating"] += 1
    elif isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        counts["ratings that are no number"] += 1
    elif not 1 <= score <= 10:
        counts["ratings outside 1 to 10"] += 1
    else:
        if isinstance(text, str) and parsed != score:
            counts["ratings that differ from their text"] += 1
        return float(score)
    return None


def _mean(ratings: Ratings) -> Estimate:
    """The mean over (question, turn) and training seeds, clustered by question."""
    questions, _, seeds = zip(*ratings, strict=True)
    return nested_mean(np.array(list(ratings.values())), questions, seeds=seeds)


def _means(ratings: Ratings, group: Callable[[tuple[Any, int, int]], Any]) -> dict[Any, Estimate]:
    """The mean of every group of ratings, in the groups' order; what is in group None is in no mean."""
    groups = judgments.grouped((group(item[0]), item) for item in ratings.items())
    return {name: _mean(dict(groups[name])) for name in sorted(groups.keys() - {None})}


def load_questions(
    questions: Path | str,
    references: Path | str | None = None,
    corrections: Path | str | None = None,
) -> list[Question]:
    """Questions, with the reference answers of those whose category needs one.

    Args:
        questions: upstream's `question.jsonl`, or a hub data set such as `HuggingFaceH4/mt_bench_prompts` (columns
            `prompt_id`, `category`, `prompt`, `reference`).
        references: upstream's `reference_answer/gpt-4.jsonl`, or any file of answers.
        corrections: a file of answers that replace wrong references (13 of upstream's 30 are).

    Raises:
        DataError: a file that is missing or malformed, a repeated question, or a reference that is missing.
    """
    given = load_answers(references) if references is not None else {}
    if corrections is not None:
        given |= load_answers(corrections)
    known: dict[Any, Question] = {}
    for row in _rows(questions, "questions"):
        question = _question(row, given, references)
        if known.setdefault(question.id, question) is not question:
            raise DataError(f"{row.where}: question {question.id} is there twice. Remove one.")
    return list(known.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → a model's answers, a turn each, from upstream's `model_answer/<model>.jsonl`.

    DataError for a row of another shape, or for two different answers to one question.
    """
    answers: dict[Any, tuple[str, ...]] = {}
    for row in _rows(path, "answers"):
        judgments.need(row, "MT-Bench answer", "question_id", "choices")
        question = row.values["question_id"]
        try:
            turns = tuple(row.values["choices"][0]["turns"])
        except (LookupError, TypeError):
            turns = (None,)
        if not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{row.where}: choices[0].turns is no list of strings.")
        if answers.setdefault(question, turns) != turns:
            raise DataError(f"{row.where}: a second, different answer to question {question}.")
    return answers


def answer_row(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    """A row of `model_answer/<model>.jsonl`, without a time stamp: equal runs write equal files."""
    return {
        "question_id": question.id,
        "answer_id": digest_of([question.id, model, *answers])[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answers)}],
    }


def load_judge_prompts(path: Path | str) -> dict[str, JudgePrompt]:
    """Name → judge prompt, from upstream's `judge_prompts.jsonl`."""
    prompts = {}
    for row in _rows(path, "judge prompts"):
        judgments.need(row, "judge prompt", "name", "system_prompt", "prompt_template")
        name, system = row.values["name"], row.values["system_prompt"]
        prompts[name] = JudgePrompt(name, system or None, row.values["prompt_template"])
    return prompts


def judge_prompt(
    prompts: Mapping[str, JudgePrompt], kind: str, question: Question, turn: int
) -> JudgePrompt:
    """The prompt of `kind` (`single` or `pair`) for a question, whose category may need the reference, and a turn."""
    needs_reference = question.category in REFERENCE_CATEGORIES
    base = "math-v1" if needs_reference else "v1" if kind == "single" else "v2"
    name = f"{kind}-{base}" + ("-multi-turn" if turn == 2 else "")
    if name not in prompts:
        raise DataError(
            f"the judge prompts have no {name!r} (they have {', '.join(prompts)}). Take judge_prompts.jsonl "
            f"from {MT_BENCH_SOURCE}."
        )
    return prompts[name]


def messages(
    prompt: JudgePrompt, question: Question, turn: int, **answers: Sequence[str]
) -> list[Message]:
    """What the judge is shown; `answers` by the template's names: `answer`, or `answer_a` and `answer_b`."""
    shown = {"question": question.turns, **answers}
    values = {name: texts[0] for name, texts in shown.items()}
    shown = {name: texts[:turn] for name, texts in shown.items()}
    for name, texts in {**shown, "ref_answer": question.reference or ()}.items():
        values |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
    return prompt.messages(question, values)


@dataclass
class MTBench:
    """FastChat's questions and judge prompts (`salsa.evaluate.benchmarks.Benchmark`)."""

    questions: Sequence[Question]
    prompts: Mapping[str, JudgePrompt]
    max_new_tokens: int = 1024
    folder: str = "mt_bench"
    load_answers = staticmethod(load_answers)

    @classmethod
    def load(cls, config: MTBenchConfig) -> "MTBench":
        """Read all files; DataError if one is missing or malformed, or lacks a prompt that will be needed."""
        questions = load_questions(config.questions, config.references, config.corrections)
        bench = cls(questions, load_judge_prompts(config.judge_prompts), config.max_new_tokens)
        for question, turn in bench._turns():
            for kind in ("single", "pair"):
                judge_prompt(bench.prompts, kind, question, turn)
        return bench

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of `<judge>_single.jsonl` and `<judge>_pair.jsonl`."""
        singles = self.single_rows(answers, match)
        match.write(f"{self.folder}/model_judgment", f"{match.judge_slug}_single", singles)
        pairs = self.pair_rows(answers, match)
        match.write(f"{self.folder}/model_judgment", f"{match.judge_slug}_pair", pairs)
        return Bench("MT-Bench", self.questions, answers, pairs, singles)

    def single_rows(self, answers: Answers, match: Match) -> list[dict[str, Any]]:
        """Rows of FastChat's `<judge>_single.jsonl`."""
        asked = [
            (model, q, turn, judge_prompt(self.prompts, "single", q, turn))
            for model in answers
            for q, turn in self._turns()
        ]
        games = match.judged(
            messages(prompt, q, turn, answer=answers[model][q.id])
            for model, q, turn, prompt in asked
        )
        return [
            {
                "question_id": q.id,
                "model": model,
                "judge": [match.judge, prompt.name],
                "user_prompt": talk[-1]["content"],
                "judgment": text,
                "score": parse_rating(text) or -1,
                "turn": turn,
            }
            | error
            for (model, q, turn, prompt), (talk, text, error) in zip(asked, games, strict=True)
        ]

    def pair_rows(self, answers: Answers, match: Match) -> list[dict[str, Any]]:
        """Rows of FastChat's `<judge>_pair.jsonl`; `model_1` is the candidate."""
        asked = [
            (pair, q, turn, judge_prompt(self.prompts, "pair", q, turn))
            for pair in match.pairs
            for q, turn in self._turns()
        ]
        games = match.judged(
            messages(prompt, q, turn, answer_a=answers[a][q.id], answer_b=answers[b][q.id])
            for pair, q, turn, prompt in asked
            for a, b in (pair, pair[::-1])
        )
        rows = []
        for (one, two), q, turn, prompt in asked:
            row: dict[str, Any] = {"question_id": q.id, "model_1": one, "model_2": two}
            for game, a, b in (("g1", "model_1", "model_2"), ("g2", "model_2", "model_1")):
                talk, text, error = next(games)
                winner = {"A": a, "B": b, "tie": "tie", None: "error"}[parse_pair_verdict(text)]
                own = {"winner": winner, "user_prompt": talk[-1]["content"], "judgment": text}
                row |= {f"{game}_{name}": value for name, value in (own | error).items()}
            rows.append(row | {"judge": [match.judge, prompt.name], "turn": turn})
        return rows

    def _turns(self) -> list[tuple[Question, int]]:
        return [(q, turn) for q in self.questions for turn in range(1, len(q.turns) + 1)]


def _rows(source: Path | str, what: str) -> list[Row]:
    """Rows of a file, or of a hub data set."""
    name = str(source)
    if Path(name).is_file():
        return judgments.read_rows(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".jsonl"):
        raise DataError(f"{name}: no {what} there. Give a file in the format of {MT_BENCH_SOURCE}.")
    from salsa.data import load_rows

    rows = load_rows(DataSource(path=name), [()])
    return [Row(f"{name}: row {number}", row) for number, row in enumerate(rows, start=1)]


def _question(
    row: Row, given: Mapping[Any, tuple[str, ...]], references: Path | str | None
) -> Question:
    """A question in FastChat's format, or in that of the hub's `mt_bench_prompts`."""
    values = row.values
    if "prompt_id" in values:
        values = {**values, "question_id": values["prompt_id"], "turns": values.get("prompt")}
    judgments.need(Row(row.where, values), "MT-Bench question", "question_id", "category", "turns")
    key, category, turns = values["question_id"], str(values["category"]), values["turns"]
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not texts or not 1 <= len(turns) <= 2:
        raise DataError(f"{row.where}: turns is a list of one or two strings, got {turns!r}.")
    reference = given.get(key, tuple(values.get("reference") or ()))
    needed = category in REFERENCE_CATEGORIES and references is not None
    if needed and len(reference) < len(turns):
        raise DataError(
            f"{row.where}: question {key} ({category}) needs a reference answer to every turn and {references} has "
            f"none. Take reference_answer/gpt-4.jsonl from {MT_BENCH_SOURCE}."
        )
    temperature = values.get("required_temperature")
    if temperature is None:
        temperature = TEMPERATURES.get(category, 0.0)
    return Question(key, category, tuple(turns), temperature, reference or None)
