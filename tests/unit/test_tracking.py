"""What a person sees of stages: plain lines, a table on a terminal, and what other processes publish."""

import io
import json

import pytest
from rich.console import Console

from salsa.artifacts import read_jsonl
from salsa.runtime import tracking
from salsa.runtime.tracking import Followed, Jobs, Lines, Published, Status, say, tracker

ROW = {
    "score": 0.5,
    "kl": 1.25,
    "length": 31.0,
    "tokens_per_second_rollout": 1500.0,
    "entropy": 2.0,
}
SHOWN = ("score", "kl", "length", "tokens_per_second_rollout")


@pytest.fixture
def screen(monkeypatch):
    """A console that is a terminal or not, and what was written to it."""

    def make(terminal: bool, width: int = 160, height: int = 40) -> io.StringIO:
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=terminal, width=width, height=height, highlight=False, soft_wrap=True,
            color_system=None,
        )  # fmt: skip
        monkeypatch.setattr(tracking, "console", console)
        return file

    return make


def drawn(jobs: Jobs) -> list[str]:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(jobs.__rich__())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_table_has_every_job_with_what_it_reached(screen):
    screen(True)
    jobs = Jobs()
    for label in ("sft[0]", "soup", "rl ppo seed 0", "rl salsa seed 0", "eval ppo seed 0"):
        jobs.show(Status(label, "waiting"))
    jobs.show(Status("sft[0]", "reused"))
    jobs.show(Status("soup", "done"))
    jobs.show(Status("rl salsa seed 0", "queued"))
    reached = {"score": 0.5, "kl": 1.25, "length": 31.0, "tokens_per_second_rollout": 1500.0}
    jobs.show(Status("rl ppo seed 0", "running", 3, 12, reached, 3725.0, "node-7"))
    header, *rows, caption = drawn(jobs)
    names = [
        "stage",
        "state",
        "step",
        "score",
        "loss",
        "KL",
        "length",
        "tokens/s",
        "left",
        "machine",
    ]
    assert header.split() == names
    assert rows[0].split() == [
        "rl", "ppo", "seed", "0", "running", "3/12", "0.5", "1.25", "31", "1500", "1:02:05", "node-7",
    ]  # fmt: skip
    states = [
        row
        for state in ("running", "queued", "waiting", "done", "reused")
        for row in rows
        if state in row
    ]
    assert rows == states and len(rows) == 5
    assert caption.strip() == "1 running, 1 queued, 1 waiting, 1 done, 1 reused"


def test_what_was_reached_stays_when_a_job_is_done_and_a_low_terminal_shows_what_runs(screen):
    screen(True, height=8)
    jobs = Jobs()
    for number in range(20):
        jobs.show(Status(f"job {number}", "waiting"))
    jobs.show(Status("job 19", "running", 2, 4, {"kl": 2.5}))
    rows = drawn(jobs)
    assert len(rows) == 1 + 4 + 1 and rows[1].split()[:5] == ["job", "19", "running", "2/4", "2.5"]
    jobs.show(Status("job 19", "done"))
    assert jobs._statuses["job 19"].metrics == {"kl": 2.5} and jobs._statuses["job 19"].step == 2


def test_a_terminal_gets_one_live_table_and_lines_above_it(screen, tmp_path):
    file = screen(True)
    with tracking.showing_jobs() as view:
        view.show(Status("a", "waiting"))
        with tracker(tmp_path, "b", 2, SHOWN) as log:
            log.log(1, ROW)
            say("something happened")
            log.log(2, ROW)
    text = file.getvalue()
    assert (
        "something happened" in text
        and "tokens/s" in text
        and "2/2" in text
        and "1 waiting" in text
    )
    assert tracking._view is None


def test_elsewhere_plain_lines_are_due_every_few_seconds_and_at_the_end(
    screen, tmp_path, monkeypatch
):
    file, clock = screen(False), [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    with tracking.showing_jobs(), tracker(tmp_path, "rl", 8, SHOWN) as log:
        for step in range(1, 9):
            clock[0] += 2.0
            log.log(step, ROW)
    lines = file.getvalue().splitlines()
    shown = "score 0.5  kl 1.25  length 31  tokens_per_second_rollout 1500"
    assert lines == [f"rl: {step}/8  {shown}  {2 * (8 - step)} s left" for step in (3, 6, 8)]


def test_a_last_step_that_is_looked_at_again_is_said_once(screen):
    """Who follows another process looks every second, also while the stage writes its model."""
    file, view = screen(False), Lines()
    for status in [Status("rl", "running", 7, 8, ROW), *[Status("rl", "running", 8, 8, ROW)] * 3]:
        view.show(status)
    assert file.getvalue().count("rl: 8/8") == 1


def test_another_process_publishes_and_this_one_shows(screen, tmp_path, monkeypatch):
    """Progress at any moment; every whole line that was said, once; the last ones after the directory's rename."""
    seen, partial, final = [], tmp_path / "a.partial", tmp_path / "a"
    partial.mkdir()
    (partial / "said.log").write_text("of an attempt before\n")
    file = screen(False)

    class View:
        def show(self, status):
            seen.append(status)

    followed = Followed(partial, "a", View())
    assert seen == [Status("a", "queued")]
    with monkeypatch.context() as other:
        other.setattr(tracking, "_view", Published(partial, "node-7"))
        with tracker(partial, "a", 4, SHOWN) as log:
            say("hello")
            log.log(4, ROW)
    assert file.getvalue() == ""
    followed.look()
    assert (seen[-1].state, seen[-1].step, seen[-1].total, seen[-1].machine) == (
        "running",
        4,
        4,
        "node-7",
    )
    assert seen[-1].metrics == {name: ROW[name] for name in SHOWN}
    assert file.getvalue() == "hello\n"
    with (partial / "said.log").open("a") as said:
        said.write("half a li")
    followed.look()
    assert file.getvalue() == "hello\n"
    with (partial / "said.log").open("a") as said:
        said.write("ne\nbye\n")
    partial.rename(final)
    followed.look(final)
    assert file.getvalue() == "hello\nhalf a line\nbye\n"


def test_rows_of_undone_work_and_a_half_line_are_dropped(tmp_path):
    """A full disk leaves half a line behind."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with tracker(tmp_path, "a", 4, ()) as log:
        log.resume_at(2)
        log.log(3, {"kl": 1.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "kl": 1.0}]


def test_time_left_is_judged_by_the_steps_since_the_checkpoint(screen, tmp_path, monkeypatch):
    clock, seen = [100.0], []
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    screen(False)

    class View:
        def show(self, status):
            seen.append(status)

    monkeypatch.setattr(tracking, "_view", View())
    with tracker(tmp_path, "a", 10, ()) as log:
        log.resume_at(6)
        assert seen[-1].left is None
        clock[0] += 6.0
        log.advance(8)
    assert seen[-1].left == pytest.approx(6.0)
    assert json.loads(json.dumps(seen[-1].metrics)) == {} and Lines().show(seen[-1]) is None
