"""Rewards that attack: what they write, start and hold costs their own samples, and ends with the
call."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_mm.rl.rewards import family
from megatron_mm.rl.rewards.messages import Answer, Begun, Failed, Lost, Ready, answer_of
from megatron_mm.rl.rewards.process import RewardProcess
from megatron_mm.rl.rewards.runner import RewardRunner

pytestmark = pytest.mark.kills

TESTS = Path(__file__).parents[1]
SLEEP_SECONDS = str(2 * 10**6 + os.getpid())  # tells our processes from those of another test run
HOSTILE = "support.hostile_rewards"


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEEP_SECONDS", SLEEP_SECONDS)
        patch.setenv("HOSTILE_FILE", str(tmp_path_factory.mktemp("hostile") / "ran"))
        with RewardRunner([f"{HOSTILE}.by_word"], num_workers=1, timeout=2.0) as made:
            yield made


def sleepers() -> list[int]:
    command = ["sleep", SLEEP_SECONDS]
    found = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == command]
    return [p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE]


def score(runner, completions):
    n = len(completions)
    return runner.score(["q"] * n, completions, [[1]] * n)


def values(rewards) -> list[float | None]:
    return [None if math.isnan(row[0]) else row[0] for row in rewards.values]


FORGED = {
    "pickled": "the worker sent an answer",
    "partial": "took longer than 2 s",
    "half a body": "took longer than 2 s",
    "a huge length": "the worker sent an answer of 1152921504606846976 bytes",
    "brackets": "the worker sent an answer that is no JSON",
    "no json": "the worker sent an answer that is no JSON",
    "not a number": "the worker sent an answer",
    "infinite": "the worker sent an answer",
    "many digits": "the worker sent an answer that is no JSON",
    "two scores": "the worker sent an answer",
    "ready": "the worker sent an answer",
    "begun for ever": "the worker sent ",
    "close": "the worker closed its pipe",
    "stop": "took longer than 2 s",
    "kill the group": "the worker ended with signal 9",
    "abort": "the worker ended with signal 6",
    "endless": "the worker sent an answer that is no JSON",
}


@pytest.mark.parametrize("word", FORGED)
def test_what_a_function_writes_costs_one_sample(runner, word):
    """Each with one worker: the sample behind it comes to a new one."""
    began = time.monotonic()
    found = score(runner, [word, "fine"])
    assert values(found) == [None, 1.0]
    assert found.failures[0].reason.startswith(FORGED[word]), found.failures[0].reason
    assert not Path(os.environ["HOSTILE_FILE"]).exists()  # nothing was unpickled
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("word", ["thread", "noise later", "die later"])
def test_a_call_answers_for_itself_alone(runner, word):
    """A thread that is left behind holds the interpreter, writes or ends the worker: that does not
    even read the next call, and its sample is not why."""
    found = score(runner, [word])
    assert values(found) == [1.0]
    time.sleep(0.6)
    large = ["x" * (1 << 24)]  # more than the pipe holds
    assert values(score(runner, large)) == [1.0]


def test_a_fork_does_not_answer_twice(runner):
    assert values(score(runner, ["fork", "fine", "fork", "fine"])) == [1.0] * 4


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("child", 1.0),
        ("child elsewhere", 1.0),
        ("grandchild", 1.0),
        ("child elsewhere, then hang", None),
        ("child elsewhere, then die", None),
    ],
)
def test_what_a_call_starts_ends_with_it(runner, word, expected):
    assert values(score(runner, [word])) == [expected]
    until = time.monotonic() + 5
    while sleepers() and time.monotonic() < until:
        time.sleep(0.05)
    assert not sleepers()
    assert values(score(runner, ["fine"])) == [1.0]


@pytest.mark.parametrize("word", ["allocate", "share", "children allocate"])
def test_memory_ends_with_the_call(runner, word, monkeypatch):
    monkeypatch.setattr(runner, "_timeout", 30.0)
    found = score(runner, [word, "fine"])
    assert values(found) == [None, 1.0]
    reason = found.failures[0].reason
    assert "MemoryError" in reason or reason.endswith("GB, 2 GB are allowed"), reason
    assert sum(worker.held() for worker in runner._workers) < 3e8


def test_memory_that_calls_keep_costs_no_later_one(runner, monkeypatch):
    monkeypatch.setattr(runner, "_timeout", 30.0)
    assert values(score(runner, ["hoard"] * 5)) == [1.0] * 5
    assert sum(worker.held() for worker in runner._workers) < 1e9


@pytest.mark.parametrize(
    ("first", "now", "full"), [(1.2e9, 1.3e9, False), (1.2e9, 1.7e9, True), (0, 1.1e9, True)]
)
def test_what_a_module_holds_itself_is_no_leak(monkeypatch, first, now, full):
    """A worker that loads a model when it starts would else be replaced after every call."""
    worker = object.__new__(RewardProcess)
    worker._memory, worker._held_first = 2_000_000_000, int(first)
    monkeypatch.setattr(RewardProcess, "held", lambda self: int(now))
    assert worker.is_full == full


def test_reasons_obey_no_terminal(runner):
    found = score(runner, ["escape", "unprintable error", "fine"])
    assert values(found) == [None, None, 1.0]
    assert found.failures[0].reason == r"ValueError: \x1b[2J\x1b]0;owned\x07\u202e"
    assert found.failures[1].reason == "Unprintable"


def test_rewards_without_end_and_floods_of_metrics():
    with RewardRunner([f"{HOSTILE}.unending", f"{HOSTILE}.logs_much"], num_workers=1) as runner:
        found = score(runner, ["a"])
    assert found.failures[0].reason == "returned 2 rewards for 1 completions"
    assert found.values[0][1] == 1.0
    assert len(found.logged) == 10_000 and len(found.logged[0][0]) == 200


PARENT = f"""
from megatron_mm.rl.rewards.runner import RewardRunner

if __name__ == "__main__":
    runner = RewardRunner(["{HOSTILE}.by_word"], num_workers=1, timeout=600)
    print(*runner.pids, flush=True)
    runner.score(["q"], ["child elsewhere, then hang"], [[1]])
"""


def test_a_child_elsewhere_does_not_outlive_a_killed_trainer(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "SLEEP_SECONDS": SLEEP_SECONDS,
    }
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | variables
    )
    try:
        parent.stdout.readline()
        until = time.monotonic() + 60
        while not sleepers() and time.monotonic() < until:
            time.sleep(0.1)
        assert sleepers()
        below = family.descendants(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while any(map(psutil.pid_exists, below)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not sleepers() and not any(map(psutil.pid_exists, below))


# ---- messages, without a process ----


def body(**parts) -> bytes:
    return json.dumps(parts).encode()


def test_answers_are_plain_values():
    scores = [[1.5, None], [None, None], [None, "no\x1b"]]
    found = answer_of(body(call=3, scores=scores, logged=[["a", 2]]), 3, 3)
    assert isinstance(found, Answer)
    assert [tuple(score) for score in found.scores] == [
        (1.5, None),
        (None, None),
        (None, r"no\x1b"),
    ]
    assert found.logged == [("a", 2.0)]
    assert answer_of(body(call=3, begun=True), 3, 1) == Begun()
    assert answer_of(body(call=3, failed="x" * 999), 3, 1) == Failed("x" * 297 + "...")
    assert answer_of(body(call=3, lost=["m", True]), 3, 1) == Lost("m", out_of_memory=True)
    ready = answer_of(body(call=0, ready=[[None, ["a"]], [False, True], [True, False]]), 0, 2)
    assert ready == Ready([None, frozenset({"a"})], [False, True], [True, False])


@pytest.mark.parametrize(
    "parts",
    [
        {"call": 2, "scores": [[1.0, None]], "logged": []},  # another call's
        {"call": True, "scores": [[1.0, None]], "logged": []},
        {"scores": [[1.0, None]], "logged": []},
        {"call": 1, "scores": [], "logged": []},
        {"call": 1, "scores": [[1.0]], "logged": []},
        {"call": 1, "scores": [[True, None]], "logged": []},
        {"call": 1, "scores": [["1", None]], "logged": []},
        {"call": 1, "scores": [[float("nan"), None]], "logged": []},
        {"call": 1, "scores": [[2e30, None]], "logged": []},
        {"call": 1, "scores": [[10**400, None]], "logged": []},
        {"call": 1, "scores": [[1.0, 3]], "logged": []},
        {"call": 1, "scores": [[1.0, None]], "logged": [["a", "b"]]},
        {"call": 1, "scores": [[1.0, None]], "logged": [["a", 10**400]]},
        {"call": 1, "scores": [[1.0, None]], "logged": {"a": 1}},
        {"call": 1, "scores": [[1.0, None]]},
        {"call": 1, "ready": [[None], [True], [True]]},
        {"call": 1, "failed": ["x"]},
        {"call": 1, "lost": "x"},
        {"call": 1, "begun": 1},
        {"call": 1},
    ],
    ids=lambda parts: json.dumps(parts)[:40],
)
def test_anything_else_is_refused(parts):
    with pytest.raises(ValueError):
        answer_of(body(**parts), 1, 1)


@pytest.mark.parametrize("raw", [b"", b"null", b"[1]", b"\xff", b"[" * 10**5, b"9" * 5000])
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(ValueError):
        answer_of(raw, 1, 1)
