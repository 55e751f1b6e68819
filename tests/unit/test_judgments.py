"""Verdicts and upstream's files: hard texts, fuzz, and win rates recomputed from rows whose answer is known."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salsa.errors import DataError
from salsa.evaluate import arena_hard, mtbench
from salsa.evaluate.arena_hard import parse_arena_verdict
from salsa.evaluate.mtbench import parse_pair_verdict, parse_rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7), ("Rating: [[7.5]]", 7.5), ("[[10]]", 10), ("[[1]]", 1), ("[[9.]]", 9),
        ("[[3]] then [[9]]", 3), ("`[[rating]]`, so: [[4]]", 4), ("x = a[100]", None), ("[5]", None),
        ("[[11]]", None), ("[[0]]", None), ("[[0.5]]", None), ("[[-1]]", None), ("[[100]] or [[5]]", None),
        ("[[ 7 ]]", None), ("[[7/10]]", None), ("[[seven]]", None), ("[[٧]]", None), ("", None),
        ("[[1,2]]", None), ("matrix [[1, 2], [3, 4]]", None), ("[[1e1]]", None), ("[[[8]]]", 8),
    ],
)  # fmt: skip
def test_ratings(text, rating):
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"), ("[[B]]", "B"), ("Final: [[C]].", "tie"), ("[[A]] at first, yet [[B]]", "B"),
        ('"[[A]]" if A is better, "[[B]]" … so [[C]]', "tie"), ("df[[a]]", None), ("[[a]]", None),
        ("[A]", None), ("A is better", None), ("[[A>B]]", None), ("[[AB]]", None), ("[[D]]", None), ("", None),
        ("x[100] and [[A]]", "A"), ("[[A]\n]", None),
    ],
)  # fmt: skip
def test_pair_verdicts(text, verdict):
    assert parse_pair_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A>>B]]", "A>>B"), ("[[A>B]]", "A>B"), ("[[A=B]]", "A=B"), ("[[B>A]]", "B>A"), ("[[B>>A]]", "B>>A"),
        ("[[A<B]]", "B>A"), ("[[A<<B]]", "B>>A"), ("[[B<A]]", "A>B"), ("[[B<<A]]", "A>>B"), ("[[B=A]]", "A=B"),
        ("[[a>b]]", "A>B"), ("[[A>B]] no, [[B>>A]]", "B>>A"), ("[[A>B]] [[A>B]]", "A>B"), ("[A>B]", None),
        ("[[A]]", None), ("[[A>>>B]]", None), ("[[A>A]]", None), ("[[A=B]] [[===]]", "A=B"), ("", None),
        ("a[100] [[A>B]]", "A>B"),
    ],
)  # fmt: skip
def test_arena_verdicts(text, verdict):
    assert parse_arena_verdict(text) == verdict


PIECES = st.lists(
    st.sampled_from(["[[", "]]", "[", "]", "A", "B", "C", ">", ">>", "=", "<", "7", "100", ".", "a", " ", "\n"])
    | st.text(max_size=4)
).map("".join)  # fmt: skip


@settings(deadline=None)
@given(PIECES)
def test_parsers_survive_anything(text):
    rating = parse_rating(text)
    assert rating is None or 1 <= rating <= 10
    assert parse_pair_verdict(text) in {"A", "B", "tie", None}
    assert parse_arena_verdict(text) in {"A>>B", "A>B", "A=B", "B>A", "B>>A", None}


@settings(deadline=None)
@given(PIECES)
def test_a_label_at_the_end_is_the_verdict(text):
    assert parse_pair_verdict(text + "\n[[B]]") == "B"
    assert parse_arena_verdict(text + "\n[[A>>B]]") == "A>>B"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)  # fmt: skip
KEYS = [
    "question_id", "uid", "model", "model_1", "model_2", "g1_winner", "g2_winner", "turn", "judge", "score", "games",
    "judgment", "category", "baseline",
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON, max_size=4))
def test_readers_survive_any_json(rows):
    """A summary, or DataError: nothing else comes out of a file, whatever is in it."""
    for summarise in (
        mtbench.summarise_pairs,
        mtbench.summarise_singles,
        arena_hard.summarise_pairs,
    ):
        try:
            summarise(rows)
        except DataError as error:
            assert str(error)


@settings(deadline=None)
@given(st.sampled_from([0, 1, 2, 3]), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2))
def test_readers_survive_a_row_with_odd_values(kind, odd):
    rows = [[single(81, 5)], PAIRS, [arena_v1(1, "A=B", "A>B")], [arena_v2("u", "A=B", "A>B")]][
        kind
    ]
    read = [mtbench.summarise_singles, mtbench.summarise_pairs, *[arena_hard.summarise_pairs] * 2][
        kind
    ]
    try:
        read([*rows, {**rows[0], **odd}])
    except DataError as error:
        assert str(error)


def pair(question, g1, g2, turn=1, models=("salsa", "ppo"), **more):
    return {
        "question_id": question, "model_1": models[0], "model_2": models[1], "g1_winner": g1, "g2_winner": g2,
        "judge": ["gpt-4", "pair-v2"], "turn": turn, "tstamp": 1.0,
    } | more  # fmt: skip


PAIRS = [
    pair(81, "model_1", "model_1"),                 # win
    pair(81, "model_2", "model_2", turn=2),         # loss
    pair(82, "model_1", "model_2"),                 # the games disagree: tie
    pair(82, "tie", "tie", turn=2),                 # tie
    pair(83, "tie", "model_1"),                     # disagree: tie
    pair(83, "error", "model_1", turn=2),           # no verdict: dropped
    pair(84, "model_1", "model_1"),                 # win
]  # fmt: skip


def test_pairwise_file_by_hand(tmp_path):
    """2 wins, 1 loss, 3 ties of 6: adjusted (2 + 3/2)/6. Games: 5 of 6 decisive… by place."""
    file = tmp_path / "gpt-4_pair.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    summary = mtbench.summarise_pairs(file)
    assert summary.judge == "gpt-4"
    found = summary.pairs["salsa", "ppo"]
    rate = found.win_rate
    assert (rate.wins, rate.losses, rate.ties, rate.n, rate.dropped) == (2, 1, 3, 6, 1)
    assert rate.rate == pytest.approx(3.5 / 6) and rate.num_clusters == 4
    assert rate.bounds == pytest.approx((3.5 / 7, 4.5 / 7))
    assert summary.models["ppo"].rate == pytest.approx(2.5 / 6)
    assert summary.counts == {"comparisons without a verdict": 1}
    # places by comparison: first second | second first | first first | tie tie | tie second | – second | first second
    position = found.position
    assert (position.games, position.both, position.consistent) == (13, 6, 4)
    assert (position.first_wins, position.second_wins) == (5, 5)
    assert found.by_turn[1].rate == pytest.approx(3 / 4) and found.by_turn[2].rate == 0.25
    assert (found.sign.wins, found.sign.losses, found.sign.ties) == (1, 0, 3)


def test_arms_of_two_checkpoints_have_a_rate_in_each_training_seed():
    arms = {"s0": ("salsa", 0), "p0": ("ppo", 0), "s1": ("salsa", 1), "p1": ("ppo", 1)}
    rows = [
        pair(81, "model_1", "model_1", models=("s1", "p1")),
        pair(82, "tie", "tie", models=("s1", "p1")),
        pair(81, "model_2", "model_2", models=("s0", "p0")),
        pair(82, "tie", "tie", models=("s0", "p0")),
    ]
    found = mtbench.summarise_pairs(rows, arms=arms).pairs["salsa", "ppo"]
    assert found.win_rate.rate == 0.5
    assert [(seed, one.rate, one.n) for seed, one in found.by_seed.items()] == [
        (0, 0.25, 2),
        (1, 0.75, 2),
    ]
    assert mtbench.summarise_pairs(PAIRS).pairs["salsa", "ppo"].by_seed == {}


def test_rows_the_other_way_round_are_turned():
    turned = pair(85, "model_1", "model_1", models=("ppo", "salsa"))
    summary = mtbench.summarise_pairs([*PAIRS, turned])
    assert list(summary.pairs) == [("salsa", "ppo")]
    assert summary.pairs["salsa", "ppo"].win_rate.losses == 2


def test_duplicates_count_once_and_contradictions_are_told():
    same = pair(81, "model_2", "model_2", models=("ppo", "salsa"))  # row 1 again, models exchanged
    other = pair(84, "model_2", "model_2")
    summary = mtbench.summarise_pairs([*PAIRS, same, other])
    assert summary.pairs["salsa", "ppo"].win_rate.n == 6
    assert summary.counts["duplicate rows"] == 2
    assert summary.counts["contradicting duplicates"] == 1


def test_verdicts_from_the_texts():
    """The raw text is kept, so that verdicts can be read again; the last label counts."""
    row = pair(
        81, "model_1", "model_1",
        g1_judgment="[[A]] is what a win would look like. [[B]]", g2_judgment="[[A]]",
    )  # fmt: skip
    stored, read = mtbench.summarise_pairs([row]), mtbench.summarise_pairs([row], reparse=True)
    assert stored.models["salsa"].rate == 1 and read.models["salsa"].rate == 0
    assert stored.counts["verdicts that differ from their text"] == 2
    assert stored.counts["texts with several different labels"] == 1


def test_unknown_verdicts_and_unshared_questions_are_counted():
    rows = [*PAIRS, pair(90, "model_3", "model_1"), pair(81, "tie", "tie", models=("salsa", "sft"))]
    counts = mtbench.summarise_pairs(rows).counts
    assert counts["unknown verdicts"] == 1
    assert counts["questions that not every pair was judged on"] == 7


def single(question, score, turn=1, model="salsa", **more):
    return {
        "question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "score": score, "turn": turn,
    } | more  # fmt: skip


def test_single_file_by_hand():
    rows = [
        single(81, 8), single(81, 6.5, 2), single(82, 7), single(82, -1, 2), single(83, 100), single(84, "9"),
        single(81, 8), single(81, 4, model="ppo"), single(82, 6, model="ppo"), single(85, 1, model="ppo"),
    ]  # fmt: skip
    summary = mtbench.summarise_singles(rows, categories={81: "writing", 82: "math"})
    salsa = summary.models["salsa"]
    assert salsa.score.mean == pytest.approx(21.5 / 3) and (salsa.n, salsa.dropped) == (3, 3)
    assert salsa.by_category["writing"].mean == 7.25 and salsa.by_turn[2].mean == 6.5
    assert summary.models["ppo"].score.mean == pytest.approx(11 / 3)
    difference = summary.differences["salsa", "ppo"]
    assert difference.n == 2 and difference.mean == pytest.approx(2.5)
    assert summary.counts == {
        "duplicate rows": 1, "judgments without a rating": 1, "ratings outside 1 to 10": 1,
        "ratings that are no number": 1, "ratings that not every model has": 5,
    }  # fmt: skip


def test_ratings_are_clustered_by_question():
    """Both turns of a question alike: as sure as one turn, no surer."""
    one = mtbench.summarise_singles([single(q, 1 + q % 9) for q in range(40)])
    two = mtbench.summarise_singles([single(q, 1 + q % 9, t) for q in range(40) for t in (1, 2)])
    assert two.models["salsa"].score.stderr == pytest.approx(one.models["salsa"].score.stderr)


def arena_v1(question, one, two, model="salsa", **more):
    games = [{"user_prompt": "…", "judgment": "…", "score": score} for score in (one, two)]
    return {
        "question_id": question,
        "model": model,
        "judge": "gpt-4-1106-preview",
        "games": games,
    } | more


def arena_v2(question, one, two, model="salsa", **more):
    games = [{"score": s, "judgment": {"answer": f"[[{s}]]"}, "prompt": []} for s in (one, two)]
    return {
        "uid": question, "category": "hard_prompt", "judge": "gpt-4.1", "model": model,
        "baseline": "o3-mini-2025-01-31", "games": games,
    } | more  # fmt: skip


GAMES = [("A>>B", "A>B"), ("B>A", "B>>A"), ("A=B", "A=B"), ("B>>A", "A>>B"), ("A>B", None)]


def test_arena_hard_by_hand():
    """In game 1 the baseline is A. Scores × weights: 0×3 + 1×1 | 1×1 + 0×3 | ½ + ½ | 1×3 + 1×3 | 0×1 + (none)."""
    v1 = arena_hard.summarise_pairs([arena_v1(i, *g) for i, g in enumerate(GAMES)])
    rate = v1.pairs["salsa", "gpt-4-0314"].win_rate
    assert rate.rate == pytest.approx((1 + 1 + 1 + 6 + 0) / (4 + 4 + 2 + 6 + 1))
    assert (rate.wins, rate.losses, rate.ties, rate.n, rate.dropped) == (4, 3, 2, 9, 1)
    v2 = arena_hard.summarise_pairs([arena_v2(f"u{i}", *g) for i, g in enumerate(GAMES)])
    rate = v2.pairs["salsa", "o3-mini-2025-01-31"].win_rate
    assert rate.rate == pytest.approx(9 / 16) and (rate.n, rate.dropped) == (8, 2)
    assert rate.bounds == pytest.approx((9 / 22, 15 / 22))
    assert v2.counts == {"games without a verdict": 1, "comparisons without a verdict": 1}
    assert v2.pairs["salsa", "o3-mini-2025-01-31"].by_category["hard_prompt"].rate == rate.rate


def test_arena_hard_is_the_bradley_terry_rate():
    """Upstream fits Bradley–Terry to the repeated battles of all models against one baseline."""
    import numpy as np
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    rows = [
        arena_v1(q, *rng.choice(labels, 2, p=chances), model=model)
        for model, chances in (("m", [0.1, 0.2, 0.1, 0.3, 0.3]), ("n", [0.4, 0.2, 0.2, 0.1, 0.1]))
        for q in range(50)
    ]
    summary = arena_hard.summarise_pairs(rows)
    worth = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}

    def loss(skill):
        total = 0.0
        for row in rows:
            logit = skill[0 if row["model"] == "m" else 1]
            for game, flip in zip(row["games"], (True, False), strict=True):
                score, weight = worth[game["score"]]
                score = 1 - score if flip else score
                total += weight * (np.logaddexp(0, logit) - score * logit)
        return total

    best = minimize(loss, [0, 0], tol=1e-10).x
    for model, skill in zip("mn", best, strict=True):
        found = summary.pairs[model, "gpt-4-0314"].win_rate.rate
        assert found == pytest.approx(1 / (1 + np.exp(-skill)), abs=1e-4)


def test_arena_hard_directory_of_one_judge(tmp_path):
    for model in ("salsa", "ppo"):
        lines = [json.dumps(arena_v2(f"u{i}", "B>A", "A>B", model)) for i in range(3)]
        (tmp_path / f"{model}.jsonl").write_text("\n".join(lines))
    summary = arena_hard.summarise_pairs(tmp_path)
    assert {candidate for candidate, _ in summary.pairs} == {"salsa", "ppo"}
    assert summary.models["salsa"].rate == 1


@pytest.mark.parametrize(
    ("summarise", "rows", "message"),
    [
        (mtbench.summarise_pairs, [], "no judgments"),
        (mtbench.summarise_pairs, [1], "row 1 is int, not an object"),
        (mtbench.summarise_pairs, [single(81, 5)], "Use summarise_singles"),
        (mtbench.summarise_singles, PAIRS, "Use summarise_pairs"),
        (mtbench.summarise_pairs, [arena_v1(1, "A=B", "A=B")], "it has no model_1, model_2"),
        (mtbench.summarise_pairs, [pair(1, "tie", "tie", turn=3)], "turn is 3"),
        (mtbench.summarise_pairs, [pair(1, "tie", "tie", models=("a", "a"))], "with itself"),
        (mtbench.summarise_pairs, [*PAIRS, pair(1, "tie", "tie", judge=["claude", "x"])], "Choose one with judge="),
        (mtbench.summarise_pairs, [pair(1, "tie", "tie", judge=7)], "judge is 7"),
        (mtbench.summarise_pairs, [pair(1, "error", "error")], "none of 1 comparisons has a verdict"),
        (mtbench.summarise_singles, [single(1, -1)], "none of 1 judgments holds a rating"),
        (
            arena_hard.summarise_pairs,
            [arena_v1(1, "A=B", "A=B", judge="j"), arena_v2(1, "A=B", "A=B", judge="j")],
            "v0.1 (row 1) and v2.0 (row 2)",
        ),
        (arena_hard.summarise_pairs, [arena_v1(1, None, None, games={})], "games is dict"),
    ],
)  # fmt: skip
def test_bad_rows_say_what_is_wrong(summarise, rows, message):
    with pytest.raises(DataError) as caught:
        summarise(rows)
    assert message in str(caught.value)


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + '\n{"question_id": 8')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        mtbench.summarise_pairs(file)
    with pytest.raises(DataError, match="no such file"):
        mtbench.summarise_pairs(tmp_path / "gone.jsonl")


def test_rows_that_name_no_judge_are_one_judges():
    rows = [{k: v for k, v in row.items() if k not in ("judge", "turn")} for row in PAIRS[::2]]
    summary = mtbench.summarise_pairs(rows)
    assert summary.judge == "judge not named" and summary.pairs["salsa", "ppo"].win_rate.n == 4


def test_one_of_several_judges_can_be_chosen():
    rows = [*PAIRS, pair(81, "model_2", "model_2", judge=["claude", "pair-v2"])]
    assert mtbench.summarise_pairs(rows, judge="claude").models["salsa"].rate == 0
    with pytest.raises(DataError, match="no row of the judge 'gpt-5'"):
        mtbench.summarise_pairs(rows, judge="gpt-5")
