"""Replies side by side: the same prompts for every arm, each text once, and no more than a page can carry."""

import json

import pytest

from salsa.artifacts import read_jsonl
from salsa.report.page import write_report
from salsa.report.replies import side_by_side
from tests.many_runs import many_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows of 4 arms x 3 seeds x 30 prompts, as the report reads them."""
    results, _ = many_runs(tmp_path_factory.mktemp("runs"), num_seeds=3, num_prompts=30, words=20)
    return {
        arm: [read_jsonl(one.path / "samples.jsonl") for one in seeds]
        for arm, seeds in results.samples.items()
    }


def test_every_reply_stands_beside_the_others_to_its_prompt(made):
    found = side_by_side(made, ["proxy", "gold"], [4, 5, 6])
    assert found["arms"] == list(made) and found["seeds"] == [4, 5, 6] and not found["left_out"]
    assert [place for place, _ in found["prompts"]] == list(range(30)) and found["of"] == 30
    for seed, table in enumerate(found["replies"]):
        for (place, prompt), replies in zip(found["prompts"], table, strict=True):
            for arm, (text, proxy, gold) in zip(found["arms"], replies, strict=True):
                row = made[arm][seed][place]
                assert (row["prompt"], row["response"]) == (prompt, found["texts"][text])
                assert (proxy, gold) == pytest.approx((row["proxy"], row["gold"]), rel=1e-4)
    every = [row["gold"] for seeds in made.values() for seed in seeds for row in seed]
    mean, sd = found["scale"][1]
    assert mean == pytest.approx(sum(every) / len(every), rel=1e-4)
    assert sd**2 == pytest.approx(sum((x - mean) ** 2 for x in every) / len(every), rel=1e-3)


def test_a_text_is_stored_once(made):
    same = {arm: [seeds[0]] * 3 for arm, seeds in made.items()}
    found = side_by_side(same, ["proxy"], [0, 1, 2])
    assert len(found["texts"]) == len(set(found["texts"])) <= 4 * 30
    assert found["replies"][0] == found["replies"][2]


def test_what_does_not_fit_is_left_out_and_counted(made):
    size = lambda found: len(json.dumps(found))
    whole = side_by_side(made, ["proxy", "gold"], [0, 1, 2])
    one = side_by_side(made, ["proxy", "gold"], [0, 1, 2], limit=size(whole) // 2)
    assert one["seeds"] == [0] and one["left_out"] == 2 and len(one["prompts"]) == 30
    few = side_by_side(made, ["proxy", "gold"], [0, 1, 2], limit=size(whole) // 5)
    assert len(few["prompts"]) == 15 and few["left_out"] == 2 and few["of"] == 30
    drawn = side_by_side(made, ["proxy", "gold"], [0, 1, 2], prompts=7)
    assert len(drawn["prompts"]) == 7 and drawn["prompts"] == sorted(drawn["prompts"])
    for found, limit in ((one, size(whole) // 2), (few, size(whole) // 5)):
        assert size(found["replies"]) + size(found["texts"]) + size(found["prompts"]) < limit + 300


def test_nothing_answered_nothing_shown():
    assert side_by_side({}, [], []) is None


@pytest.mark.slow
def test_a_hundred_runs_fit_a_page_of_ten_megabytes(tmp_path):
    results, run = many_runs(
        tmp_path, num_arms=10, num_seeds=10, num_prompts=400, num_updates=300, words=80
    )
    write_report(results, run)
    assert (run.path / "report.html").stat().st_size < 10e6
    pairs = json.loads((run.path / "report.json").read_text())["pairs"]
    assert len(pairs) == 2 * 55 and len(pairs[0]["by_seed"]) == 10
    assert (run.path / "report.html").read_text().count("arm-9") > 55
