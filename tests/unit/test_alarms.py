"""Each alarm is provoked, says what to try, and is raised once, after a resume too."""

from dataclasses import replace

import pytest

from salsa.alarms import Alarms
from tests.tiny_rl import ascii_share, run, run_killed

CALM = {
    "length": 10.0, "kl": 0.5, "kl_stderr": 0.1, "entropy": 2.0, "clip_fraction": 0.1, "score": 0.0, "gold": 0.0,
}  # fmt: skip


def rows(num=12, **changes):
    """Calm rows, changed by functions of the update (from 0)."""
    return [
        CALM | {"step": k + 1} | {name: change(k) for name, change in changes.items()}
        for k in range(num)
    ]


def messages(given, held_out=("gold",)):
    alarms = Alarms(held_out)
    return [message for row in given for message in alarms.observe(row)]


def wiggle(k):
    return 0.01 * (-1) ** k


PROVOKED = {
    "KL-Hack at update 8: responses fell from 10.0 to 4.0": {"length": lambda k: max(10 - k, 1)},
    "negative KL at update 5: -0.4 ± 0.1 nats. A KL is never negative": {
        "kl": lambda k: -0.4 if k == 4 else 0.1
    },
    "entropy collapse at update 7: from 2 to 0.3": {"entropy": lambda k: 2.0 if k < 6 else 0.3},
    "clip fraction at update 3: 45%": {"clip_fraction": lambda k: 0.45 if k == 2 else 0.1},
    "sampler mismatch at update 6: the server's distribution is 0.03 nats": {
        "sampler_kl": lambda k: 0.03 if k == 5 else 0.001, "importance_capped": lambda k: 0.1
    },
    "reward hacking (gold) at update 10": {
        "score": lambda k: 0.1 * k + wiggle(k), "gold": lambda k: -0.1 * k + wiggle(k)
    },
}  # fmt: skip


@pytest.mark.parametrize("start", PROVOKED)
def test_each_alarm(start):
    (message,) = messages(rows(**PROVOKED[start]))
    assert message.startswith(f"alarm: {start}")
    assert any(verb in message for verb in ("Lower rl.", "Raise rl.", "Check "))


def test_calm_runs_raise_none():
    assert messages(rows()) == []
    assert messages(rows(score=lambda k: 0.1 * k + wiggle(k))) == []  # gold stands still
    assert messages(rows(gold=lambda k: -0.1 * k + wiggle(k))) == []  # the proxy does
    assert messages(rows(kl=lambda k: -0.2)) == []  # within the noise of k1
    assert messages(rows(length=lambda k: 1.0 if k == 5 else 10.0)) == []  # once is chance
    assert messages(rows(length=lambda k: 10.0 + k)) == []


def test_an_alarm_that_comes_back_is_not_said_again():
    given = rows(clip_fraction=lambda k: 0.5 * (k % 2))
    assert len(messages(given)) == 1
    resumed = Alarms(("gold",), given[:4])
    assert [m for row in given[4:] for m in resumed.observe(row)] == []


def test_a_run_says_it_once_and_keeps_it(job, tmp_path, capsys):
    """Large steps clip most tokens; a kill between two checkpoints does not repeat the message."""
    options = {"learning_rate": 0.3, "num_epochs": 4, "max_grad_norm": 100.0, "kl_coef": 0.0}
    run_killed(job, tmp_path / "a", 3, **options)
    run(job, tmp_path / "a", **options)
    told = [line for line in capsys.readouterr().err.splitlines() if "alarm: clip frac" in line]
    assert len(told) == 1 and "Lower rl.learning_rate or rl.num_epochs." in told[0]
    assert told[0].split(": ", 1)[1] in (tmp_path / "a" / "alarms.log").read_text()


@pytest.mark.slow
def test_monitors_are_the_held_out_scores(job, tmp_path):
    """A monitor that is the reward's negative falls while the reward rises."""
    upside_down = lambda prompts, responses: [-s for s in ascii_share(prompts, responses)]
    options = {"num_updates": 12, "rollout_size": 16, "learning_rate": 2e-2, "kl_coef": 0.0}
    run(replace(job, monitors={"gold": upside_down}), tmp_path / "a", **options)
    assert "reward hacking (gold)" in (tmp_path / "a" / "alarms.log").read_text()
