"""From answers to judged rows in upstream's formats: which conversations the judge gets, and what its replies mean.

Every pair of arms meets on every question and turn, in two games with the answers' places swapped; the k-th training
seed of one arm meets the k-th of the other. Against Arena-Hard's common baseline every arm meets the baseline only.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from salsa.evaluate import arena_hard, inputs, mtbench
from salsa.evaluate.inputs import JudgePrompt, Question
from salsa.evaluate.judge import Message, Refusal, Reply

Answers = Mapping[str, Mapping[Any, Sequence[str]]]
"""Model → question → its answers, a turn each."""

Asked = Callable[[Sequence[Sequence[Message]]], Sequence[Reply | Refusal]]
"""Ask the judge about many conversations."""


def pairings(models: Mapping[str, Sequence[str]], baseline: str) -> list[tuple[str, str]]:
    """(candidate, baseline) of all pairs of arms, the k-th model of one with the k-th of the other."""
    arms = [baseline, *(arm for arm in models if arm != baseline)]
    return [
        pair
        for earlier, later in combinations(arms, 2)
        for pair in zip(models[later], models[earlier], strict=True)
    ]


def single_rows(
    questions: Sequence[Question],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    judge: str,
    ask: Asked,
) -> list[dict[str, Any]]:
    """Rows of FastChat's `<judge>_single.jsonl`."""
    asked = [
        (model, question, turn, inputs.judge_prompt(prompts, "single", question, turn))
        for model in answers
        for question, turn in _turns(questions)
    ]
    conversations = [
        inputs.single_messages(prompt, question, answers[model][question.id], turn)
        for model, question, turn, prompt in asked
    ]
    rows = []
    for (model, question, turn, prompt), talk, reply in zip(
        asked, conversations, ask(conversations), strict=True
    ):
        text, error = _text(reply)
        rating = mtbench.parse_rating(text)
        rows.append(
            {
                "question_id": question.id,
                "model": model,
                "judge": [judge, prompt.name],
                "user_prompt": talk[-1]["content"],
                "judgment": text,
                "score": -1 if rating is None else rating,
                "turn": turn,
            }
            | error
        )
    return rows


def pair_rows(
    questions: Sequence[Question],
    prompts: Mapping[str, JudgePrompt],
    answers: Answers,
    pairs: Sequence[tuple[str, str]],
    judge: str,
    ask: Asked,
) -> list[dict[str, Any]]:
    """Rows of FastChat's `<judge>_pair.jsonl`; `model_1` is the candidate."""
    asked = [
        (pair, question, turn, inputs.judge_prompt(prompts, "pair", question, turn))
        for pair in pairs
        for question, turn in _turns(questions)
    ]
    conversations = []
    for (one, two), question, turn, prompt in asked:
        first, second = answers[one][question.id], answers[two][question.id]
        conversations.append(inputs.pair_messages(prompt, question, first, second, turn))
        conversations.append(inputs.pair_messages(prompt, question, second, first, turn))
    replies = ask(conversations)
    rows = []
    for number, ((one, two), question, turn, prompt) in enumerate(asked):
        games: dict[str, Any] = {}
        for game, (first, second) in (
            ("g1", ("model_1", "model_2")),
            ("g2", ("model_2", "model_1")),
        ):
            at = 2 * number + (game == "g2")
            text, error = _text(replies[at])
            verdict = mtbench.parse_pair_verdict(text)
            names = {"A": first, "B": second, "tie": "tie", None: "error"}
            games |= {
                f"{game}_winner": names[verdict],
                f"{game}_user_prompt": conversations[at][-1]["content"],
                f"{game}_judgment": text,
            } | {f"{game}_{name}": value for name, value in error.items()}
        rows.append(
            {"question_id": question.id, "model_1": one, "model_2": two}
            | games
            | {"judge": [judge, prompt.name], "turn": turn}
        )
    return rows


def arena_rows(
    questions: Sequence[Question],
    prompt: arena_hard.ArenaPrompt,
    answers: Answers,
    pairs: Sequence[tuple[str, str]],
    judge: str,
    ask: Asked,
) -> list[dict[str, Any]]:
    """Rows of arena-hard-auto's v2.0 judgments; in the first game the baseline is assistant A."""
    asked = [(pair, question) for pair in pairs for question in questions]
    conversations = []
    for (model, baseline), question in asked:
        own, other = answers[model][question.id][0], answers[baseline][question.id][0]
        conversations.append(arena_hard.pair_messages(prompt, question, other, own))
        conversations.append(arena_hard.pair_messages(prompt, question, own, other))
    replies = ask(conversations)
    rows = []
    for number, ((model, baseline), question) in enumerate(asked):
        games = []
        for at in (2 * number, 2 * number + 1):
            text, error = _text(replies[at])
            game: dict[str, Any] = {
                "score": arena_hard.parse_arena_verdict(text),
                "judgment": {"answer": text},
                "prompt": conversations[at],
            }
            games.append(game | error)
        rows.append(
            {
                "uid": question.id,
                "category": question.category,
                "judge": judge,
                "model": model,
                "baseline": baseline,
                "games": games,
            }
        )
    return rows


def _turns(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(q, turn) for q in questions for turn in range(1, len(q.turns) + 1)]


def _text(reply: Reply | Refusal) -> tuple[str, dict[str, str]]:
    """The judge's text, and why there is none."""
    if isinstance(reply, Refusal):
        return "", {"error": reply.reason}
    return reply.text, {}
