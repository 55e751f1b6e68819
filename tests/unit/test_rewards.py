"""Callables that are weighted, async, batched, slow, or fail."""

import asyncio
import sys
import threading
import time
import types

import pytest

from salsa import rewards
from salsa.config import RewardFunction
from salsa.data import Prompt
from salsa.errors import WorkFailed
from salsa.rewards import FunctionScorer, function_digest, function_scorers

PROMPTS = [Prompt((1,), None, text) for text in ("a", "b")]
FUNCTIONS = {
    "lengths": lambda prompts, responses: [len(r) for r in responses],
    "prompts": lambda prompts, responses: [{"a": 10.0, "b": 20.0}[p] for p in prompts],
    "numpy": lambda prompts, responses: __import__("numpy").ones(len(responses), dtype="float32"),
    "raises": lambda prompts, responses: 1 / 0,
    "short": lambda prompts, responses: [1.0],
    "nan": lambda prompts, responses: [1.0, float("nan")],
    "text": lambda prompts, responses: ["good", "bad"],
    "none": lambda prompts, responses: None,
    "sleeps": lambda prompts, responses: time.sleep(0.4),
}


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """An importable module of rewards; retries do not wait."""
    found = types.SimpleNamespace(**FUNCTIONS)
    monkeypatch.setitem(sys.modules, "my_rewards", found)
    monkeypatch.setattr(rewards, "PAUSE_SECONDS", 0.0)
    return found


def scorer(*names_and_weights, **options):
    return FunctionScorer(
        [RewardFunction(call=f"my_rewards:{n}", weight=w, **options) for n, w in names_and_weights]
    )


def test_weighted_sum():
    assert scorer(("lengths", 1.0), ("prompts", 0.5))(PROMPTS, ["xx", "yyy"]) == [7.0, 13.0]
    assert scorer(("numpy", 2.0))(PROMPTS, ["x", "y"]) == [2.0, 2.0]


def test_several_wait_at_the_same_time(module):
    """Each waits for the other: one after the other, they would time out."""
    meet = threading.Barrier(2, timeout=5)
    module.one = module.other = lambda prompts, responses: [float(meet.wait() >= 0)] * 2
    assert scorer(("one", 1.0), ("other", 2.0))(PROMPTS, ["x", "y"]) == [3.0, 3.0]


def test_each_of_several_by_name():
    functions = [
        RewardFunction(call=f"my_rewards:{name}", weight=weight)
        for name, weight in (("lengths", 0.5), ("prompts", 2.0), ("lengths", 3.0))
    ]
    scorers = function_scorers(functions)
    assert list(scorers) == ["my_rewards:lengths", "my_rewards:prompts", "my_rewards:lengths (2)"]
    columns = [scorer(PROMPTS, ["xx", "yyy"]) for scorer in scorers.values()]
    assert columns == [[1.0, 1.5], [20.0, 40.0], [6.0, 9.0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            "reward my_rewards:raises: raised ZeroDivisionError: division by zero. Finished work is kept",
        ),
        ("short", "reward my_rewards:short: returned 1 scores for 2 responses. Return one each."),
        ("nan", "reward my_rewards:nan: score 1 is nan for response 'yyy'. Return finite numbers."),
        ("text", "reward my_rewards:text: score 0 is 'good'"),
        ("none", "reward my_rewards:none: returned None, not a list of scores. Return one number"),
    ],
)
def test_failing_callables_stop_the_work_and_say_why(name, message):
    with pytest.raises(WorkFailed) as caught:
        scorer((name, 1.0))(PROMPTS, ["xx", "yyy"])
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_callable_that_exits_fails_instead_of_hanging(kind, error, module):
    """Raised in the event loop's thread it would end the loop, and this call would never return; nor would the next."""

    def score(prompts, responses):
        raise error("no key")

    async def later(prompts, responses):
        await asyncio.sleep(0)
        raise error("no key")

    module.exits = score if kind == "sync" else later
    waiting = scorer(("exits", 1.0)).begin(PROMPTS, ["x", "y"])
    caught = []
    thread = threading.Thread(target=lambda: caught.append(_error_of(waiting)), daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert isinstance(caught[0], WorkFailed)
    assert f"reward my_rewards:exits: raised RuntimeError: {error.__name__}: no key" in str(
        caught[0]
    )
    assert scorer(("lengths", 1.0))(PROMPTS, ["x", "y"]) == [1.0, 1.0]


def _error_of(work):
    try:
        return work()
    except BaseException as error:
        return error


def test_async_callables_share_one_event_loop(module):
    loops = []

    async def score(prompts, responses):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(r)) for r in responses]

    class Client:
        async def __call__(self, prompts, responses):
            return await score(prompts, responses)

    module.later, module.client = score, Client()
    for name in ("later", "client", "later"):
        assert scorer((name, 2.0))(PROMPTS, ["x", "yy"]) == [2.0, 4.0]
    assert len(set(loops)) == 1


def test_an_async_callable_works_inside_a_running_loop(module):
    async def score(prompts, responses):
        return [1.0] * len(responses)

    module.later = score

    async def notebook():
        return scorer(("later", 1.0))(PROMPTS, ["x", "y"])

    assert asyncio.run(notebook()) == [1.0, 1.0]


def test_batches_keep_their_order_and_their_size(module):
    seen = []

    def score(prompts, responses):
        seen.append(len(responses))
        return [float(r) for r in responses]

    module.numbers = score
    responses = [str(k) for k in range(7)]
    scored = scorer(("numbers", 1.0), batch_size=3)([PROMPTS[0]] * 7, responses)
    assert scored == [float(k) for k in range(7)] and seen == [3, 3, 1]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_calls_at_once_as_allowed(concurrency, module):
    lock, state = threading.Lock(), {"now": 0, "most": 0}

    def score(prompts, responses):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.05)
        with lock:
            state["now"] -= 1
        return [1.0] * len(responses)

    module.counted = score
    scorer(("counted", 1.0), batch_size=1, concurrency=concurrency)([PROMPTS[0]] * 6, ["x"] * 6)
    assert state["most"] == concurrency


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_takes_too_long_is_given_up(kind, module):
    async def later(prompts, responses):
        await asyncio.sleep(5)

    module.later = later
    started = time.monotonic()
    with pytest.raises(WorkFailed, match="took longer than 0.1 s 2 times in a row. Finished work"):
        name = "sleeps" if kind == "sync" else "later"
        scorer((name, 1.0), timeout=0.1, retries=1)(PROMPTS, ["x", "y"])
    assert time.monotonic() - started < 3
    time.sleep(
        0.5
    )  # a thread that was given up ends without a complaint, which pytest would report


def test_retries(module):
    calls = []

    def flaky(prompts, responses):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset by peer")
        return [1.0] * len(responses)

    module.flaky = flaky
    assert scorer(("flaky", 1.0), retries=2)(PROMPTS, ["x", "y"]) == [1.0, 1.0]
    calls.clear()
    with pytest.raises(WorkFailed, match="raised ConnectionError: reset by peer 2 times in a row"):
        scorer(("flaky", 1.0), retries=1)(PROMPTS, ["x", "y"])


def test_wrong_answers_are_not_asked_for_again(module):
    calls = []

    def short(prompts, responses):
        calls.append(1)
        return []

    module.short = short
    with pytest.raises(WorkFailed, match="returned 0 scores"):
        scorer(("short", 1.0), retries=5)(PROMPTS, ["x", "y"])
    assert len(calls) == 1


def test_digest_of_a_function_covers_its_weight():
    """Else a stage made with another weight would be reused."""
    one, two = (RewardFunction(call="my_rewards:lengths", weight=w) for w in (1.0, 2.0))
    assert function_digest(one) == function_digest(one) != function_digest(two)
