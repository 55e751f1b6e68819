"""One job in several processes: who does what, who is missed, and why it failed. Whole jobs: tests/invariance."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from salsa import pipeline
from salsa.config import Recipe
from salsa.errors import ConfigError, DataError, WorkFailed
from salsa.runtime import launch
from salsa.runtime.launch import Lost, Member, leading, led
from tests.tiny_rl import FP32

RANKS = {
    size: [replace(FP32, rank=rank, world_size=size) for rank in range(size)] for size in (1, 2, 3)
}


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_pack_counts_once_and_all_make_the_same_number_of_passes(size, count):
    shares = [engine.share(list(range(count))) for engine in RANKS[size]]
    assert {len(share) for share in shares} == {-(-count // size)}
    assert sorted(pack for share in shares for pack, counts in share if counts) == list(
        range(count)
    )


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_each_row_is_one_process_own(size, count):
    rows = [engine.own_rows(count) for engine in RANKS[size]]
    assert torch.cat(rows).tolist() == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_one_process_alone_leads_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with leading() as leads:
        assert leads and led() == 1
    assert os.environ["RANK"] == "0"  # not taken out: there is nobody to hide
    done = []
    launch.spread(lambda *call: done.append(call), 1, 2, FP32, processes=1, timeout=1.0)
    assert done == [(1, 2, FP32)]


class Store:
    """A store in which the ranks `here` have answered."""

    def __init__(self, here):
        self.keys = {f"here {rank}" for rank in here}

    def set(self, key, value):
        self.keys.add(key)

    def check(self, keys):
        return self.keys.issuperset(keys)


@pytest.mark.parametrize(
    ("here", "error", "says"),
    [
        ([2], "gloo: Connection closed by peer", "rank 1, 3 of 4 was lost (said by rank 0)"),
        (
            [1, 2],
            "Timed out waiting",
            "rank 3 of 4 did not come to a meeting within 9 s (said by rank 0)",
        ),
        ([1, 2, 3], "gloo: Connection closed by peer", "the network was lost (said by rank 0)"),
    ],
)
def test_who_does_not_answer_the_roll_call_is_named(here, error, says, monkeypatch):
    monkeypatch.setattr(launch, "_GRACE", 0.1)
    lost = launch._lost(Member(0, 4, 0, 4, Store(here)), 9.0, error)
    assert str(lost).startswith(says) and "run again to go on" in str(lost)
    assert lost.ranks == tuple(rank for rank in (1, 2, 3) if rank not in here)


def failure(exitcode, message="", name="<N/A>"):
    return SimpleNamespace(exitcode=exitcode, message=message, signal_name=lambda: name)


def failed(failures):
    first = min(failures)
    return SimpleNamespace(failures=failures, get_first_failure=lambda: (first, failures[first]))


def test_a_signal_is_the_reason_whatever_the_others_say():
    ended = failure(-signal.SIGKILL, name="SIGKILL")
    said = failure(1, {"message": "Lost: rank 2 of 3 was lost"})
    stopped = failure(-signal.SIGTERM, name="SIGTERM")  # by the agent, because of the others
    reason = launch._reason(failed({0: said, 1: stopped, 2: ended}), 3)
    assert str(reason).startswith(
        "rank 2 of 3 was ended by SIGKILL (out of memory?). What was written is intact"
    )


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        ("DataError: prompts.jsonl: no rows.", DataError, "prompts.jsonl: no rows."),
        ("Lost: rank 1 of 2 was lost", WorkFailed, "rank 1 of 2 was lost"),
        (
            "OSError: disk: full",
            WorkFailed,
            "rank 0 of 2 failed with exit code 1: OSError: disk: full. What was",
        ),
    ],
)
def test_what_a_process_raised_is_raised_again(message, kind, says):
    reason = launch._reason(failed({0: failure(1, {"message": message})}), 2)
    assert type(reason) is kind and str(reason).startswith(says)


def test_several_stages_at_once_are_refused_under_torchrun(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_member", Member(0, 2, 0, 2, Store([])))
    recipe = Recipe.load(repository / "recipes" / "quickstart.yaml")
    with pytest.raises(
        ConfigError, match="engine: jobs and executor under torchrun: its 2 processes do one stage"
    ):
        pipeline.run_recipe(recipe, out=tmp_path / "run", jobs=2)


def test_a_lost_rank_is_failed_work():
    assert issubclass(Lost, WorkFailed)
