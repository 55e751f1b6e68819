"""The evaluation's page: text is text, the figures are the summary's, every verdict is there once."""

import json
import re

import pytest

from salsa.report.page import headline, packed, render
from salsa.report.pairs import matrix
from tests.evaluation_page import ATTACK, evaluation


@pytest.fixture(scope="module")
def made():
    return evaluation(24)


@pytest.fixture(scope="module")
def page(made):
    return render(*made)


def test_model_and_judge_text_is_escaped(page):
    assert ATTACK not in page and "<img src=x" not in page
    assert len(re.findall(r"<script[ >]", page)) == page.count("</script>") == 4


def test_every_table_agrees_with_the_summary(made, page):
    summary, *_, verdicts = made
    bench = summary["benchmarks"]["MT-Bench"]
    assert len(verdicts) == 3 * 24 * 2
    for pair in bench["pairs"]:
        own = [
            r
            for r in verdicts
            if (r["candidate"], r["baseline"]) == (pair["candidate"], pair["baseline"])
        ]
        judged = [r["outcome"] for r in own if r["outcome"] is not None]
        assert pair["n"] == len(judged) and pair["rate"] == pytest.approx(sum(judged) / len(judged))
        assert f"{100 * pair['rate']:.1f} %" in page
        assert pair["length"]["longer_rate"] > 0.5 < pair["position"]["first_rate"]
    assert headline(summary)[0].startswith("sft ")
    assert summary["judge"]["cost"] == 0


def test_matrix_has_both_ways_round(made):
    cells = matrix(made[0]["benchmarks"]["MT-Bench"]["pairs"])
    assert cells["ppo", "salsa"]["rate"] == pytest.approx(1 - cells["salsa", "ppo"]["rate"])
    assert cells["ppo", "salsa"]["low"] == pytest.approx(1 - cells["salsa", "ppo"]["high"])


def test_texts_are_stored_once(made, page):
    found = packed(made[-1])
    assert len(found["texts"]) == len(set(found["texts"])) < 2 * len(found["rows"]) + 24 * 8
    start = page.index("const { texts, rows } = ") + len("const { texts, rows } = ")
    assert json.loads(page[start : page.index(";\n", start)]) == json.loads(json.dumps(found))


def test_page_loads_nothing_from_a_network(page):
    own = page[: page.index("<script>")]
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", own)
