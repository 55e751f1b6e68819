"""What RL maximises: functions, or a reward model. Functions may be sync or async; they are called in batches, several
at once, with a time limit and retries.

`async def` functions run in one event loop that lives as long as the process, so a client that they keep open stays
usable. Other functions run in a thread of their own, so that one that hangs can be given up: the thread is a daemon and
does not keep the process alive.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from salsa.artifacts import Checkpoint
from salsa.config import DataSource, RewardFunction
from salsa.data import Prompt, fingerprint, import_callable
from salsa.errors import WorkFailed

if TYPE_CHECKING:
    from salsa.runtime.engine import Engine

Scorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]

PAUSE_SECONDS = 1.0
"""Before the first retry; each further one waits twice as long."""


@dataclass(frozen=True)
class RewardSource:
    """What is maximised, as data: functions or a reward model's checkpoint, one of the two."""

    functions: tuple[RewardFunction, ...] = ()
    checkpoint: Checkpoint | None = None

    @property
    def digest(self) -> str:
        """Digest of all that decides the scores."""
        if self.checkpoint is not None:
            return self.checkpoint.digest
        return " ".join(function_digest(function) for function in self.functions)

    def load(self, engine: "Engine") -> dict[str, Scorer]:
        """Name → scorer; the reward is their sum."""
        if self.checkpoint is None:
            return function_scorers(self.functions)
        from salsa.models import RewardModel

        return {"model": RewardModel.load(self.checkpoint.path, engine)}

    def load_one(self, engine: "Engine") -> Scorer:
        """The scorer of a source that has one; `sum_of` would hide from `begin` that several processes compute it."""
        (scorer,) = self.load(engine).values()
        return scorer


def sum_of(scorers: Mapping[str, Scorer]) -> Scorer:
    """One scorer that returns the sum of several."""
    return lambda prompts, responses: _total([s(prompts, responses) for s in scorers.values()])


def _total(columns: Iterable[Sequence[float]]) -> list[float]:
    return [sum(row) for row in zip(*columns, strict=True)]


class FunctionScorer:
    """Weighted sum of callables `score(prompts, responses) -> scores`, which see lists of strings.

    Raises WorkFailed when a callable fails once more than it has retries, or returns the wrong number of scores, or one
    that is no finite number.
    """

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self._loaded = [(function, import_callable(function.call)) for function in functions]

    def begin(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Callable[[], list[float]]:
        """Start all callables; what is returned waits for them."""
        texts = [prompt.text for prompt in prompts]
        begun = [(f.weight, _begun(f, call, texts, list(responses))) for f, call in self._loaded]
        return lambda: _total([[w * s for s in scores.result()] for w, scores in begun])

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Scores, once all are there."""
        return self.begin(prompts, responses)()


def begin(
    scorer: Scorer, prompts: Sequence[Prompt], responses: Sequence[str], engine: "Engine"
) -> Callable[[], list[float]]:
    """Start what may wait for something outside; a scorer that computes here and now starts when it is waited for.

    In several processes a model's scores are computed by all of them; functions are called in the main process only, so
    that they see the same calls as ever, and all get their scores.
    """
    if getattr(scorer, "is_divided", False):
        return lambda: scorer(prompts, responses)
    if isinstance(scorer, FunctionScorer) and engine.is_main:
        return partial(engine.from_main, scorer.begin(prompts, responses))
    return lambda: engine.from_main(lambda: scorer(prompts, responses))


def function_scorers(functions: Sequence[RewardFunction]) -> dict[str, Scorer]:
    """A scorer per callable, its weight included; a callable that is named twice gets a number."""
    scorers: dict[str, Scorer] = {}
    for number, function in enumerate(functions):
        name = function.call if function.call not in scorers else f"{function.call} ({number})"
        scorers[name] = FunctionScorer([function])
    return scorers


def function_digest(function: RewardFunction) -> str:
    """Digest of a callable and its weight: all that decides what its scorer returns."""
    return fingerprint(DataSource(call=function.call)) + str(function.weight)


def _begun(
    function: RewardFunction, call: Callable[..., Any], prompts: list[str], responses: list[str]
) -> Future[list[float]]:
    """All batches of one callable, checked, under way in the event loop."""
    size = function.batch_size or max(len(responses), 1)

    async def all_batches() -> list[float]:
        slots = asyncio.Semaphore(function.concurrency)

        async def one(start: int) -> list[float]:
            batch = prompts[start : start + size], responses[start : start + size]
            async with slots:
                return _checked(function.call, await _tried(function, call, *batch), batch[1])

        scored = await asyncio.gather(*map(one, range(0, len(responses), size)))
        return [score for scores in scored for score in scores]

    return asyncio.run_coroutine_threadsafe(all_batches(), _loop())


async def _tried(
    function: RewardFunction, call: Callable[..., Any], prompts: list[str], responses: list[str]
) -> Any:
    """What `call` returns, at the first attempt that neither raises nor takes too long."""
    for attempt in range(function.retries + 1):
        if attempt:
            await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            work = _started(call, prompts, responses)
            return await asyncio.wait_for(work, function.timeout)
        except TimeoutError as error:
            failure: Exception = error
            reason = f"took longer than {function.timeout:g} s" if function.timeout else "timed out"
        except Exception as error:
            failure, reason = error, f"raised {type(error).__name__}: {error}"
    times = f" {function.retries + 1} times in a row" if function.retries else ""
    raise WorkFailed(
        f"reward {function.call}: {reason}{times}. Finished work is kept; mend it and run again."
    ) from failure


def _started(call: Callable[..., Any], *arguments: list[str]) -> Awaitable[Any]:
    """The call under way: in the event loop if it is async, else in a thread.

    What is no Exception becomes a RuntimeError: `sys.exit()` would end the event loop, and no score would ever come.
    """
    if any(map(inspect.iscoroutinefunction, (call, type(call).__call__))):
        return _as_exceptions(call(*arguments))
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it: its result is at most ignored

    def work() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(_as_exception(error))

    threading.Thread(target=work, name="salsa-reward", daemon=True).start()
    return asyncio.wrap_future(future)


async def _as_exceptions(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except (asyncio.CancelledError, GeneratorExit):  # it took too long, or the process ends
        raise
    except BaseException as error:
        raise _as_exception(error) from error


def _as_exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _checked(name: str, result: Any, responses: Sequence[str]) -> list[float]:
    try:
        scores = list(result)
    except TypeError as error:
        raise WorkFailed(
            f"reward {name}: returned {result!r}, not a list of scores. Return one number each."
        ) from error
    if len(scores) != len(responses):
        raise WorkFailed(
            f"reward {name}: returned {len(scores)} scores for {len(responses)} responses. Return one each."
        )
    for number, score in enumerate(scores):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise WorkFailed(
                f"reward {name}: score {number} is {score!r} for response {responses[number][:40]!r}. "
                "Return finite numbers."
            )
    return [float(score) for score in scores]


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async rewards, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="salsa-rewards", daemon=True).start()
    return loop
