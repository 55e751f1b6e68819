"""Judges against a local server that fails in every way: nothing lost, nothing bought twice, no key told."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from salsa.errors import ConfigError, DataError, WorkFailed
from salsa.evaluate.judge import EndpointJudge, JudgmentCache, Refusal, ReplayJudge, judge_all
from salsa.evaluate.spec import JudgeConfig
from tests.judge_server import FAULTS, JudgeServer

KEY = "sk-secret-0123456789"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Ask a server, keeping the cache in `tmp_path`."""
    monkeypatch.setenv("TEST_KEY", KEY)

    def run(requests, url, **config):
        options = {"timeout": 1.0, "concurrency": 4, "retries": 6} | config
        judge = EndpointJudge(JudgeConfig(url=url, model="m", key_env="TEST_KEY", **options))
        return judge_all(requests, judge, JudgmentCache(tmp_path / "cache.jsonl"))

    return run


def talk(text):
    return [{"role": "system", "content": "judge"}, {"role": "user", "content": text}]


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_fault_is_survived(ask, tmp_path):
    def faults(prompt, attempt):
        return FAULTS[int(prompt)] if attempt == 1 else None

    with JudgeServer(lambda prompt: f"judged {prompt}", faults) as server:
        replies, totals = ask([talk(str(i)) for i in range(len(FAULTS))], server.url)
    assert [reply.text for reply in replies] == [f"judged {i}" for i in range(len(FAULTS))]
    assert {fault for fault, count in server.injected.items() if count} == {*FAULTS, "none"}
    assert totals.asked == len(FAULTS) and totals.prompt_tokens == 10 * len(FAULTS)
    assert totals.cost((1.0, 5.0)) == pytest.approx(len(FAULTS) * (10 + 2 * 5) / 1e6)
    assert len(lines(tmp_path)) == len(FAULTS)


def test_retry_after_is_waited_for(ask):
    with JudgeServer() as server:
        ask([talk("first")], server.url)  # imports, a client
    started = time.monotonic()
    with JudgeServer(faults=lambda prompt, attempt: "429" if attempt <= 3 else None) as server:
        ask([talk("x")], server.url)
    assert server.attempts["x"] == 4
    assert (
        0.15 <= time.monotonic() - started < 1.5
    )  # three times 0.05 s, not the client's own half seconds


def test_equal_requests_are_asked_once_and_nothing_twice(ask, tmp_path):
    with JudgeServer() as server:
        first, totals = ask([talk("a"), talk("b"), talk("a")], server.url)
        assert totals.asked == 2 and len(first) == 3
        _, totals = ask([talk("b"), talk("c")], server.url)
        assert (totals.asked, totals.reused) == (1, 1)
        assert sum(server.attempts.values()) == 3
        ask([talk("a")], server.url, temperature=0.5)  # another question to the judge
    assert sum(server.attempts.values()) == 4 and len(lines(tmp_path)) == 4


def test_concurrency_is_bounded_and_used(ask):
    with JudgeServer(seconds=0.05) as server:
        ask([talk(str(i)) for i in range(24)], server.url, concurrency=6)
    assert server.most_at_once == 6


def test_a_refused_request_is_no_verdict_and_is_not_cached(ask, tmp_path):
    with JudgeServer(faults=lambda prompt, _: "400" if prompt == "bad" else None) as server:
        replies, totals = ask([talk("good"), talk("bad")], server.url)
    assert isinstance(replies[1], Refusal) and "HTTP 400" in replies[1].reason
    assert totals.refused == 1 and len(lines(tmp_path)) == 1


def test_a_dead_server_stops_the_work_and_keeps_what_is_done(ask, tmp_path):
    with JudgeServer(faults=lambda prompt, _: "500" if prompt != "a" else None) as server:
        ask([talk("a")], server.url)
        with pytest.raises(
            WorkFailed, match="5 of 5 judgments are missing .*HTTP 500.*run the same"
        ):
            ask([talk(str(i)) for i in range(5)], server.url, retries=0)
    assert [row["text"] for row in lines(tmp_path)] == ["[[A]]"]
    with pytest.raises(WorkFailed, match="Connection error"):
        ask([talk("z")], server.url, retries=0)


@pytest.mark.parametrize(
    ("status", "message"), [("401", r"comes from \$TEST_KEY"), ("404", "Check judge.url")]
)
def test_a_judge_that_cannot_be_asked(ask, status, message):
    with JudgeServer(faults=lambda *_: status) as server, pytest.raises(ConfigError, match=message):
        ask([talk("a")], server.url)


@pytest.mark.slow
def test_the_key_reaches_the_server_and_nothing_else(ask, tmp_path, capfd):
    """Servers echo keys, in errors and in replies: neither message, cache nor screen may hold it."""
    with JudgeServer(answer=lambda _: f"your key is {KEY} [[A]]") as server:
        replies, _ = ask([talk("a")], server.url)
        assert server.headers == [f"Bearer {KEY}"]
    assert replies[0].text == "your key is [key] [[A]]"
    told = []
    for status in ("400", "401", "404", "500"):
        with JudgeServer(faults=lambda *_, status=status: status) as server:
            address = server.url.replace("http://", f"http://user:{KEY}@") + f"?key={KEY}"
            try:
                told += [r.reason for r in ask([talk(status)], address, retries=0)[0]]
            except (ConfigError, WorkFailed) as error:
                told.append("".join([str(error), repr(error.__cause__)]))
    assert len(told) == 4 and not any(KEY in text for text in told)
    assert KEY not in (tmp_path / "cache.jsonl").read_text() and KEY not in "".join(
        capfd.readouterr()
    )


def test_a_half_written_line_is_dropped_and_asked_again(ask, tmp_path):
    with JudgeServer() as server:
        ask([talk("a"), talk("b")], server.url)
        file = tmp_path / "cache.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        _, totals = ask([talk("a"), talk("b")], server.url)
    assert (totals.asked, totals.reused) == (1, 1)
    assert len({row["key"] for row in lines(tmp_path)}) == len(lines(tmp_path)) == 2


def test_a_spoilt_cache_is_named(tmp_path):
    file = tmp_path / "cache.jsonl"
    file.write_text('{"key": "k", "text": "t"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2 is no cached judgment"):
        JudgmentCache(file)
    file.write_text("garbage\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        JudgmentCache(file)


def test_replay_reads_both_upstreams_files(tmp_path):
    rows = [
        {"user_prompt": "q1", "judgment": "[[7]]"},
        {"g1_user_prompt": "q2", "g1_judgment": "[[A]]", "g2_user_prompt": "q3", "g2_judgment": "[[B]]"},
        {"games": [
            {"user_prompt": "q4", "judgment": "[[A>B]]"}, {"prompt": talk("q5"), "judgment": {"answer": "[[A=B]]"}},
        ]},
    ]  # fmt: skip
    judge = ReplayJudge(rows, "gpt-4")
    cache = JudgmentCache(tmp_path / "cache.jsonl")
    replies, _ = judge_all([talk(f"q{i}") for i in range(1, 7)], judge, cache)
    assert [r.text for r in replies[:5]] == ["[[7]]", "[[A]]", "[[B]]", "[[A>B]]", "[[A=B]]"]
    assert isinstance(replies[5], Refusal)
    with pytest.raises(DataError, match="second, different judgment"):
        ReplayJudge([*rows, {"user_prompt": "q1", "judgment": "[[8]]"}])
    with pytest.raises(DataError, match="no row holds"):
        ReplayJudge([{"question_id": 1}])
    with pytest.raises(DataError, match="no row holds"):
        ReplayJudge([{"games": [None, "x"]}])


def test_a_replayed_file_that_was_put_right_is_read_again(tmp_path):
    cache = lambda: JudgmentCache(tmp_path / "cache.jsonl")
    for text in ("[[7]]", "[[8]]", "[[8]]"):
        judge = ReplayJudge([{"user_prompt": "q1", "judgment": text}], "gpt-4")
        (reply,), totals = judge_all([talk("q1")], judge, cache())
        assert reply.text == text
    assert totals.reused == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of url, path and replay"),
        ({"url": "http://x/v1"}, "give model"),
        ({"url": "http://x/v1", "model": "m", "replay": "y"}, "exactly one"),
        ({"path": "m", "parameters": {"top_k": 1}}, "an endpoint's request. Give url"),
    ],
)
def test_a_judge_is_one_thing(config, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**config)


def test_an_address_that_is_none():
    with pytest.raises(ConfigError, match="no http"):
        EndpointJudge(JudgeConfig(url="localhost:8000", model="m"))


@pytest.mark.slow
def test_500_prompts_3_pairs_2_games_at_concurrency_32(ask, tmp_path):
    """One request in nine fails, some of them twice; every judgment is there exactly once."""

    def faults(prompt, attempt):
        rng = random.Random(f"{prompt} {attempt}")
        return rng.choice(FAULTS) if attempt < 4 and rng.random() < 1 / 9 else None

    requests = [talk(f"{p} {a} {g}") for p in range(500) for a in range(3) for g in range(2)]
    answer = lambda prompt: f"[[{'AB'[len(prompt) % 2]}]]"
    with JudgeServer(answer, faults, seconds=0.03) as server:
        replies, totals = ask(requests, server.url, concurrency=32)
    assert len(replies) == totals.asked == 3000 and totals.refused == 0
    asked = [messages[-1]["content"] for messages in requests]
    assert [reply.text for reply in replies] == [answer(prompt) for prompt in asked]
    keys = [row["key"] for row in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 3000
    assert set(server.delivered.values()) == {1}
    assert 12 < server.most_at_once <= 34
    assert all(server.injected[fault] > 10 for fault in FAULTS)


SCRIPT = """
import sys
from pathlib import Path
from salsa.evaluate.judge import EndpointJudge, JudgmentCache, judge_all
from salsa.evaluate.spec import JudgeConfig
folder, url = Path(sys.argv[1]), sys.argv[2]
requests = [[{"role": "user", "content": str(i)}] for i in range(400)]
judge = EndpointJudge(JudgeConfig(url=url, model="m", concurrency=8))
judge_all(requests, judge, JudgmentCache(folder / "cache.jsonl"))
"""


@pytest.mark.slow
def test_kill_9_loses_no_judgment_and_buys_none_twice(tmp_path):
    """What the cache holds is never asked again; only what was under way at the kill can be."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    cache = tmp_path / "cache.jsonl"
    with JudgeServer(lambda prompt: prompt * 400, seconds=0.02) as server:
        for wanted in (40, 150, 260):
            process = subprocess.Popen([*command, server.url], env=os.environ)
            while not cache.exists() or cache.read_bytes().count(b"\n") < wanted:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run([*command, server.url], check=True)
        before = sum(server.attempts.values())
        subprocess.run([*command, server.url], check=True)
        assert sum(server.attempts.values()) == before
    keys = [row["key"] for row in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 400
    assert sum(server.attempts.values()) <= 400 + 3 * 8
