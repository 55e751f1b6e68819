"""The gap between trained arms and the optimum: closed forms in a Gaussian world, and what must not be said."""

import numpy as np
import pytest

from salsa.analysis.forecast import Replies, forecast
from salsa.analysis.gap import agreement, gaps

SHIFT = {"sft[0]": 0.0, "soup": 0.5}


@pytest.fixture(scope="module")
def known() -> dict:
    """Rewards N(shift, 1) a reference: the optimum at β has mean shift + 1/β and KL 1/(2β²)."""
    rng = np.random.default_rng(0)
    replies = {
        name: Replies(
            {"proxy": rng.normal(shift, 1, (200, 512))},
            {"sft[0]": np.zeros((200, 512))},
            np.ones((200, 512)),
        )
        for name, shift in SHIFT.items()
    }
    return forecast(replies, [1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 50.0], 1.0)


def arm(reference: str, kl: float, reward: float, trained: bool = True) -> dict:
    mean = {"kl_reference": {"mean": kl}, "proxy": {"mean": reward}}
    return {"reference": reference, "trained": trained, "mean": mean}


@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_gap_and_share_are_those_of_the_closed_form(known, beta):
    kl, best = 1 / (2 * beta**2), 0.5 + 1 / beta
    (row,) = gaps(known, {"arms": {"salsa": arm("soup", kl, best - 0.125)}})
    assert row["optimum"] == pytest.approx(best, abs=0.02)
    assert row["gap"] == pytest.approx(0.125, abs=0.02)
    assert row["share"] == pytest.approx(1 - 0.125 * beta, abs=0.05)


def test_between_two_betas_the_frontier_is_interpolated(known):
    (row,) = gaps(known, {"arms": {"ppo": arm("sft[0]", 0.02, 0.0)}})  # √(2·0.02) = 0.2
    assert row["optimum"] == pytest.approx(0.2, abs=0.03)


def test_nothing_is_said_beyond_the_known_kl_or_of_an_unknown_reference(known):
    arms = {
        "moving": arm("ema(soup, 0.01)", 0.2, 1.0),
        "far": arm("soup", 5.0, 1.0),
        "near": arm("soup", 0.0, 1.0),
        "sft": arm("sft[0]", 0.0, 0.0, trained=False),
    }
    rows = gaps(known, {"arms": arms})
    assert [row["arm"] for row in rows] == ["far", "near"]
    assert all(row["optimum"] is row["gap"] is row["share"] is None for row in rows)


def test_agreement_counts_order_and_sign():
    made = agreement([1, 2, 3, -1], [10, 20, 30, -5])
    assert (made.tau, made.same_sign, made.count) == (1.0, 1.0, 4)
    assert made.p_value == pytest.approx(2 / 24)  # one of 4! orders, two-sided
    assert agreement([1, 2, 3, -1], [-10, -20, -30, 5]).tau == -1.0
    assert agreement([1, 2, -3], [1, -2, -3]).same_sign == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 forecasts and 3 results"):
        agreement([1, 2], [1, 2, 3])
