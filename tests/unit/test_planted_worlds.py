"""Whole studies of worlds whose truth is known, judged by the functions that `salsa sweep` uses."""

from types import ModuleType

import pytest

SAME = {"practically equal", "not resolved"}


@pytest.fixture
def planted(monkeypatch, repository) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import planted_worlds

    return planted_worlds


def share(found: dict, words: set[str]) -> float:
    return sum(found["verdicts"].get(word, 0) for word in words) / found["studies"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "allowed"),
    [
        ("a better reference", {"holds"}),
        ("a worse reference", {"does not hold"}),
        ("no difference", SAME),
        ("another yardstick only", SAME),
        ("better, and nearer", {"holds"}),
    ],
)
def test_two_hundred_studies_are_judged_rightly(planted, world, allowed):
    made = planted.simulate(planted.WORLDS[world], 200, bootstraps=20)
    at_equal_kl = {name: one for name, one in made.items() if name.startswith("equal KL")}
    assert {"equal KL, β 1", "equal KL, β 0.3", "equal KL, average"} <= set(at_equal_kl)
    for name, found in at_equal_kl.items():
        assert found["studies"] < 200 or share(found, allowed) >= 0.95, name
        assert abs(found["error"]) < 0.01, "a sixth of the margin; 0.15 is planted"
        assert found["ours"] >= 0.93, name


def test_at_equal_beta_another_yardstick_looks_like_a_better_reference(planted):
    """Why arms are compared at equal KL, and why not along a chord: it would be off by most of the margin."""
    made = planted.simulate(planted.WORLDS["another yardstick only"], 20, bootstraps=20)
    assert share(made["equal β 0.3"], {"holds"}) == 1.0
    assert share(made["equal KL, β 0.3"], {"holds"}) == 0.0
    assert share(made["equal KL, β 0.3"], SAME) >= 0.9
    assert abs(made["equal KL, β 0.3"]["error"]) < 0.02
    assert made["equal KL, β 0.3"]["chord"] < -0.03
