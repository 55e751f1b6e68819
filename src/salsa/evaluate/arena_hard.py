"""Arena-Hard (Li et al. 2024, arXiv 2406.11939), v0.1 and v2.0: upstream's files, conversations, labels and sums.

Every model meets one common baseline in two games: in the first the baseline is assistant A, in the second the model
is. A label's `>>` weighs 3. With one common baseline the Bradley–Terry win rate that upstream fits equals the weighted
mean score computed here. Departs from upstream: intervals are clustered by prompt (upstream resamples battles, which
halves them), and a label written the other way round, `[[B<A]]`, is the label it means.

A game without a verdict: v0.1 drops that game and keeps the other one, v2.0 drops both; so does this module, by the
file's own version, and counts them.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa.artifacts import digest_of
from salsa.errors import DataError
from salsa.evaluate import judgments
from salsa.evaluate.benchmarks import Answers, Bench, JudgePrompt, Match, Question
from salsa.evaluate.judgments import Arms, Comparison, Lengths, PairsSummary, PathOrRows, Row
from salsa.evaluate.spec import ARENA_HARD_SOURCE, ArenaHardConfig
from salsa.untrusted import yaml_value

WEIGHT = 3.0
"""Of `>>` against `>`."""

BASELINE_V01 = "gpt-4-0314"
"""v0.1's files do not name their baseline."""

_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]", re.IGNORECASE)
_SCORES = {
    "A>>B": (1.0, WEIGHT), "A>B": (1.0, 1.0), "A=B": (0.5, 1.0), "B>A": (0.0, 1.0), "B>>A": (0.0, WEIGHT),
}  # fmt: skip
"""Label → assistant A's score and its weight."""
_MIRROR = str.maketrans("AB<>", "BA><")
_MEANINGS = {text: label for label in _SCORES for text in (label, label.translate(_MIRROR))}
_PLACE = {1.0: "first", 0.5: "tie", 0.0: "second"}


def parse_arena_verdict(text: str) -> str | None:
    """One of `A>>B`, `A>B`, `A=B`, `B>A`, `B>>A` by the last label in double brackets; None if there is none.

    As upstream's v2.0: case does not count, the last label does.
    """
    return [None, *_labels(text)][-1]


def summarise_pairs(
    path_or_rows: PathOrRows,
    *,
    judge: str | None = None,
    baseline: str | None = None,
    reparse: bool = False,
    lengths: Lengths | None = None,
    arms: Arms | None = None,
) -> PairsSummary:
    """Weighted win rates of every model against the baseline, from upstream's `model_judgment/<judge>/*.jsonl`.

    Arguments as of `mtbench.summarise_pairs`; and `baseline` is whom the models met, where the rows do not say (v0.1),
    `gpt-4-0314` if not given.

    Raises:
        DataError: rows of another format, of both versions, of several judges, or without a single verdict.
    """
    counts: Counter[str] = Counter()
    rows, judge = judgments.of_one_judge(judgments.read_rows(path_or_rows), judge)
    found = {2 if "uid" in row.values else 1: row.where for row in rows}
    if len(found) > 1:
        raise DataError(
            f"rows of Arena-Hard v0.1 ({found[1]}) and v2.0 ({found[2]}) together. Their prompts and baselines differ: "
            "summarise them apart."
        )
    version, key = (2, "uid") if 2 in found else (1, "question_id")
    for row in rows:
        judgments.need(row, f"Arena-Hard v{version} judgment", key, "model", "games")
        judgments.need_names(row, key, "model", *(["baseline"] if "baseline" in row.values else []))
        if not isinstance(games := row.values["games"], list):
            raise DataError(
                f"{row.where}: games is {type(games).__name__}, not a list of two games."
            )
    rows = judgments.without_duplicates(
        rows,
        lambda row: (row.values[key], row.values["model"], row.values.get("baseline")),
        lambda row: [
            g.get("score") if isinstance(g, Mapping) else None for g in row.values["games"]
        ],
        counts,
    )
    comparisons = []
    for row in rows:
        values, games = row.values, row.values["games"]
        labels = [_label(games[n], reparse, counts) if n < len(games) else None for n in (0, 1)]
        counts["rows without two games"] += len(games) != 2
        counts["games without a verdict"] += labels.count(None)
        read = [_SCORES[label] if label else None for label in labels]
        kept = [] if version == 2 and None in read else read
        scores = tuple((s[0] if n == 1 else 1 - s[0], s[1]) for n, s in enumerate(kept) if s)
        baseline_first, model_first = (_PLACE[s[0]] if s else None for s in read)
        comparisons.append(
            Comparison(
                question=values[key],
                turn=1,
                category=str(values.get("category") or ""),
                candidate=values["model"],
                baseline=values.get("baseline") or baseline or BASELINE_V01,
                games=(model_first, baseline_first),
                scores=scores,
                missing=2 - len(scores),
            )
        )
    return judgments.summarise(comparisons, judge, counts, lengths, arms)


def _labels(text: str) -> list[str]:
    """What every label of a text means."""
    return [m for label in _LABEL.findall(text) if (m := _MEANINGS.get(label.upper()))]


def _label(game: Any, reparse: bool, counts: Counter[str]) -> str | None:
    """The verdict of one game; None if there is none."""
    if not isinstance(game, Mapping):
        return None
    text = game.get("judgment")
    text = text.get("answer") if isinstance(text, Mapping) else text
    parsed = None
    if isinstance(text, str):
        parsed = parse_arena_verdict(text)
        counts["texts with several different labels"] += len(set(_labels(text))) > 1
    if reparse or "score" not in game:
        return parsed
    stored = game["score"]
    if stored is None:
        return None
    meaning = _MEANINGS.get(stored) if isinstance(stored, str) else None
    counts["unknown verdicts"] += meaning is None
    counts["verdicts that differ from their text"] += isinstance(text, str) and parsed != meaning
    return meaning


def load_questions(path: Path | str, temperature: float = 0.0) -> list[Question]:
    """Upstream's `question.jsonl`: `uid` and `prompt` (v2.0, and v0.1 since then), or `question_id` and `turns`.

    Raises:
        DataError: no such file, a row without these columns, or a question twice.
    """
    known: dict[Any, Question] = {}
    for row in _rows(path, "questions", "question.jsonl"):
        values = row.values
        if "prompt" in values:
            judgments.need(row, "Arena-Hard question", "uid", "category")
            key, text = values["uid"], values["prompt"]
        else:
            judgments.need(row, "Arena-Hard question", "question_id", "category", "turns")
            try:
                key, text = values["question_id"], values["turns"][0]["content"]
            except (LookupError, TypeError):
                raise DataError(
                    f"{row.where}: turns is no list of {{content}}. Take question.jsonl from {ARENA_HARD_SOURCE}."
                ) from None
        if key in known:
            raise DataError(f"{row.where}: question {key} is there twice. Remove one.")
        known[key] = Question(key, str(values["category"]), (text,), temperature)
    return list(known.values())


def load_answers(path: Path | str) -> dict[Any, tuple[str, ...]]:
    """Question → answer, from upstream's `model_answer/<model>.jsonl` of either version."""
    answers: dict[Any, tuple[str, ...]] = {}
    for row in _rows(path, "answers", "model_answer/*.jsonl"):
        values = row.values
        try:
            if "uid" in values:
                key, answer = values["uid"], values["messages"][-1]["content"]
                answer = answer["answer"] if isinstance(answer, dict) else answer
            else:
                answer = values["choices"][0]["turns"][0]["content"]
                key = values["question_id"]
        except (LookupError, TypeError) as error:
            raise DataError(
                f"{row.where} is no Arena-Hard answer (no {error}). Give v0.1's or v2.0's format."
            ) from error
        if answers.setdefault(key, (answer,)) != (answer,):
            raise DataError(f"{row.where}: a second, different answer to question {key}.")
    return answers


def answer_row(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    """A row of v2.0's `model_answer/<model>.jsonl`, without a time stamp."""
    return {
        "uid": question.id,
        "ans_id": digest_of([question.id, model, *answers])[:22],
        "model": model,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answers[0]}},
        ],
    }


def load_judge_prompt(path: Path | str) -> JudgePrompt:
    """`system_prompt` and `prompt_template` of upstream's YAML (`config/judge_config.yaml`).

    v2.0 keeps the system prompt in `utils/judge_utils.py`; copy it into the YAML.
    """
    try:
        values = yaml_value(Path(path).read_text(encoding="utf-8"))
        template = values["prompt_template"]
        template = template[0] if isinstance(template, list) else template
        return JudgePrompt("Arena-Hard", values["system_prompt"], template)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: no Arena-Hard judge prompt ({' '.join(str(error).split())}). Give a YAML file with system_prompt "
            f"and prompt_template, such as config/judge_config.yaml of {ARENA_HARD_SOURCE}; v2.0 keeps its system "
            "prompt in utils/judge_utils.py."
        ) from error


class ArenaHard:
    """arena-hard-auto's questions and judge prompt (`salsa.evaluate.benchmarks.Benchmark`)."""

    folder = "arena_hard"
    load_answers = staticmethod(load_answers)

    def __init__(self, config: ArenaHardConfig) -> None:
        """Read all files; DataError if one is missing or malformed, or the baseline did not answer a question."""
        self.questions: Sequence[Question] = load_questions(config.questions, config.temperature)
        self.max_new_tokens = config.max_new_tokens
        self._prompt = load_judge_prompt(config.judge_prompt)
        self._baseline: dict[str, dict[Any, tuple[str, ...]]] = {}
        if config.baseline is not None:
            answers = load_answers(config.baseline)
            if missing := [q.id for q in self.questions if q.id not in answers]:
                raise DataError(
                    f"{config.baseline}: no answer to {len(missing)} of {len(self.questions)} questions, e.g. "
                    f"{missing[0]}. Give the baseline's answers to these questions."
                )
            self._baseline = {Path(config.baseline).stem: answers}

    def judged(self, answers: Answers, match: Match) -> Bench:
        """Rows of v2.0's `model_judgment/<judge>/<model>.jsonl`; in the first game the baseline is assistant A."""
        pairs = [pair for pair in match.pairs if pair[1] in match.baseline]
        if clash := sorted(self._baseline.keys() & answers.keys()):
            raise DataError(
                f"Arena-Hard: {clash[0]!r} names a model and, by its file, the baseline. Rename the file or the model."
            )
        if self._baseline:
            pairs = [(model, name) for model in answers for name in self._baseline]
            answers = {**answers, **self._baseline}
        asked = [(pair, question) for pair in pairs for question in self.questions]
        conversations = []
        for pair, question in asked:
            for first, second in (pair[::-1], pair):
                a, b = answers[first][question.id][0], answers[second][question.id][0]
                values = {"question_1": question.turns[0], "answer_1": a, "answer_2": b}
                values |= {"QUESTION": question.turns[0], "ANSWER_A": a, "ANSWER_B": b}  # v2.0
                conversations.append(self._prompt.messages(question, values))
        games = match.judged(conversations)
        rows: list[dict[str, Any]] = [
            {
                "uid": question.id,
                "category": question.category,
                "judge": match.judge,
                "model": model,
                "baseline": baseline,
                "games": [
                    {
                        "score": parse_arena_verdict(text),
                        "judgment": {"answer": text},
                        "prompt": talk,
                    }
                    | error
                    for talk, text, error in (next(games), next(games))
                ],
            }
            for (model, baseline), question in asked
        ]
        for label in {model for model, _ in pairs}:
            own = [row for row in rows if row["model"] == label]
            match.write(f"{self.folder}/model_judgment/{match.judge_slug}", label, own)
        return Bench("Arena-Hard", self.questions, answers, rows, [])


def _rows(path: Path | str, what: str, file: str) -> list[Row]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no {what} there. Take {file} from {ARENA_HARD_SOURCE}.")
    return judgments.read_rows(path)
