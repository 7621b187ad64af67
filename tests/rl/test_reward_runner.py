"""Misbehaving reward functions: each costs its own samples a recorded failure, never the run."""

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_mm.errors import RLError
from megatron_mm.rl.rewards import process
from megatron_mm.rl.rewards.runner import RewardRunner

pytestmark = pytest.mark.kills

TESTS = Path(__file__).parents[1]
SLEEP_SECONDS = str(10**6 + os.getpid())  # tells our processes from those of another test run


@pytest.fixture(scope="module", autouse=True)
def sleep_seconds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEEP_SECONDS", SLEEP_SECONDS)
        yield


def gone(pids, seconds=10):
    """Returns whether none of these runs any more; a zombie that nobody has reaped yet has
    ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [p for p in pids if psutil.pid_exists(p)]
        if all(psutil.Process(p).status() == psutil.STATUS_ZOMBIE for p in alive):
            return True
        time.sleep(0.05)
    return False


def sleepers():
    """Returns the processes that the reward "child" started, whoever their parent is now."""
    command = ["sleep", SLEEP_SECONDS]
    found = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == command]
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def score(runner, completions, routed_experts=None, **columns):
    n = len(completions)
    return runner.score(["q"] * n, completions, [[1]] * n, columns, routed_experts)


def flat(rewards):
    """Returns the values of the only reward; None for NaN."""
    return [None if math.isnan(v[0]) else v[0] for v in rewards.values]


def test_several_rewards_of_several_kinds():
    specs = [
        "support.misbehaving.good",
        "support.misbehaving.patient",
        "exact",
        "support.misbehaving.tensor_like",
    ]
    with RewardRunner(specs, num_workers=2, batch_size=2) as runner:
        found = score(runner, ["aa", "b", "ccc"], length=[2, 9, 3], ground_truth=["aa", None, "x"])
        assert runner.names == ["good", "patient", "exact", "tensor_like"] == found.names
        nan = math.nan
        expected = [[1.0, 2.0, 1.0, 0.5], [0.0, 1.0, nan, 0.5], [1.0, 3.0, 0.0, 0.5]]
        np.testing.assert_equal(found.values, expected)
        assert not found.failures and not any(map(any, found.failed))
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert score(runner, []).values == []


@pytest.fixture(scope="module")
def by_word():
    with RewardRunner(["support.misbehaving.by_word"], num_workers=2, timeout=2.0) as runner:
        yield runner


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "ValueError: no way xxx"),
        ("exit", "SystemExit: 3"),
        ("die", "the worker ended with exit code 7"),
        ("segfault", "the worker ended with signal 11"),
        ("sleep", "took longer than 2 s"),
        ("regex", "took longer than 2 s"),
        ("child", "took longer than 2 s"),
    ],
)
def test_what_goes_wrong_costs_one_sample_its_reward(by_word, word, reason):
    started = time.monotonic()
    found = score(by_word, ["a", word, "b", "c", "d"])
    assert flat(found) == [1.0, None, 1.0, 1.0, 1.0]
    assert [row[0] for row in found.failed] == [False, True, False, False, False]
    (failure,) = found.failures
    assert (failure.sample, failure.name) == (1, "by_word")
    assert failure.reason.startswith(reason) and "\n" not in failure.reason
    assert len(failure.reason) <= 300
    assert time.monotonic() - started < 60  # it does not hang
    assert flat(score(by_word, ["a"] * 4)) == [1.0] * 4  # and nothing stays behind


def test_all_samples_may_fail(by_word):
    found = score(by_word, ["die"] * 5)
    assert flat(found) == [None] * 5 and len(found.failures) == 5


TOWER = r"\boxed{9^{9^{9^{9}}}}"  # no computer writes this number down


def test_a_completion_that_is_too_much_for_a_built_in_reward_is_wrong():
    """It is no failure: it would be left out, and be spared its negative advantage."""
    with RewardRunner(["math"], num_workers=2, timeout=3.0) as runner:
        found = score(runner, [r"\boxed{4}", TOWER, r"\boxed{5}"], ground_truth=["4"] * 3)
    assert found.values == [[1.0], [0.0], [0.0]] and not any(map(any, found.failed))
    assert [row[0] for row in found.lost] == [False, True, False]
    assert [(f.sample, f.reason) for f in found.failures] == [(1, "took longer than 3 s")]
    assert found.logged == [("rewards/math/frac_lost", share) for share in (0.0, 1.0, 0.0)]


def test_others_of_its_call_are_judged_by_themselves():
    """One completion or truth costs nobody else a built-in reward."""
    truths = ["4", "4", {"no": "text"}, "4"]
    said = [r"\boxed{4}", TOWER, r"\boxed{4}", r"\boxed{5}"]
    with RewardRunner(["math"], num_workers=1, timeout=3.0, batch_size=4) as runner:
        found = score(runner, said, ground_truth=truths)
    assert flat(found) == [1.0, 0.0, None, 0.0]
    assert [row[0] for row in found.failed] == [False, False, True, False]


def test_a_lost_value_may_be_set_for_all(by_word):
    spec = ["support.misbehaving.by_word"]
    with RewardRunner(spec, 1, timeout=2.0, batch_size=2, lost_value=-1.0) as runner:
        found = score(runner, ["a", "die", "sleep", "b", "raise"])
    assert flat(found) == [1.0, -1.0, -1.0, 1.0, None]  # an exception is a failure all the same
    assert [row[0] for row in found.lost] == [False, True, True, False, False]
    assert flat(score(by_word, ["a", "die"])) == [1.0, None]


def test_a_reward_that_always_hangs_does_not_hold_up_the_step():
    with RewardRunner(
        ["support.misbehaving.by_word", "exact"], num_workers=2, timeout=1.0
    ) as runner:
        found = score(runner, ["sleep"] * 40, ground_truth=["sleep"] * 40)
    reasons = [f.reason for f in found.failures]
    late = reasons.count("took longer than 1 s")
    assert 10 <= late <= 11 and len(reasons) == 40  # two workers may be at it together
    assert reasons.count("given up after 10 calls that took longer than 1 s") == 40 - late
    assert [row[1] for row in found.values] == [1.0] * 40


def test_printing_megabytes_costs_nothing_and_shows_nothing(by_word, capfd):
    assert flat(score(by_word, ["print", "print"])) == [1.0, 1.0]
    shown = capfd.readouterr()
    assert not shown.out and not shown.err


def test_workers_that_die_between_calls_are_replaced(by_word):
    assert flat(score(by_word, ["a", "b", "c"])) == [1.0] * 3
    for pid in by_word.pids:
        os.kill(pid, signal.SIGKILL)
    assert gone(by_word.pids)
    assert flat(score(by_word, ["a", "b", "c"])) == [1.0] * 3


def test_what_a_function_started_ends_with_its_worker(by_word):
    score(by_word, ["child"])
    assert not sleepers()


def test_values_that_cannot_be_sent_cost_their_samples_only(by_word):
    lock = __import__("threading").Lock()
    found = score(by_word, ["a", "b"], column=["fine", lock])
    assert flat(found) == [1.0, None]
    assert found.failures[0].reason.startswith("cannot be sent to a worker: TypeError")


def test_single_values_are_judged_one_by_one():
    with RewardRunner(["support.misbehaving.maybe"], num_workers=1, batch_size=9) as runner:
        found = score(runner, ["x", "none", "nan", "text", "y"])
    assert flat(found) == [2.0, None, None, None, 2.0]
    assert [row[0] for row in found.failed] == [False, False, True, True, False]
    assert [(f.sample, f.reason) for f in found.failures] == [
        (2, "returned nan"),
        (3, "returned a str, not a number"),
    ]


def test_a_wrong_count_costs_the_call():
    specs = [
        "support.misbehaving.wrong_count",
        "support.misbehaving.nothing",
        "support.misbehaving.batch_of",
    ]
    with RewardRunner(specs, num_workers=1, batch_size=2) as runner:
        found = score(runner, ["a", "b", "c"])
    assert [row[2] for row in found.values] == [2.0, 2.0, 1.0]
    assert [(f.sample, f.name, f.reason) for f in found.failures[:2]] == [
        (0, "wrong_count", "returned 3 rewards for 2 completions"),
        (0, "nothing", "TypeError: 'NoneType' object is not iterable"),
    ]
    assert len(found.failures) == 6


def test_routes_go_only_to_functions_that_name_them():
    routes = [np.full((3, 2, 2), n, dtype=np.int16) for n in (1, 2)]
    with RewardRunner(
        ["support.misbehaving.routes", "support.misbehaving.no_routes"], num_workers=1
    ) as runner:
        found = score(runner, ["a", "b"], routed_experts=routes)
    assert found.values == [[12.0, 0.0], [24.0, 0.0]]


def test_columns_go_only_to_functions_that_can_take_them():
    """Built-in rewards name the columns they need, so no image is sent to them."""
    column = [lambda: "cannot be sent"]
    with RewardRunner(["exact", "support.misbehaving.batch_of"], num_workers=1) as runner:
        found = score(runner, ["a"], ground_truth=["a"], images=column)
    assert found.values[0][0] == 1.0 and found.failed == [[False, True]]


def test_an_interrupted_call_leaves_nothing_behind(by_word, monkeypatch):
    from megatron_mm.rl.rewards import runner

    def interrupted(workers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(by_word, ["die", "a"])
    assert flat(score(by_word, ["a", "b"])) == [1.0, 1.0]


def test_verls_compute_score():
    with RewardRunner(["support.misbehaving.compute_score"], num_workers=1) as runner:
        found = score(
            runner,
            ["7", "7", "8"],
            data_source=["digits", "other", "digits"],
            ground_truth=["7", "7", "8"],
            extra_info=[None, None, {"bonus": 0.5}],
        )
        assert flat(found) == [1.0, 0.0, 1.5]


def test_a_missing_column_is_a_recorded_failure():
    with RewardRunner(["exact"], num_workers=1) as runner:
        found = score(runner, ["a"])
    assert "missing 1 required positional argument: 'ground_truth'" in found.failures[0].reason


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("support.misbehaving.none", "cannot be imported: AttributeError"),
        ("no.such.module", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("support.misbehaving.not_a_function", "is a int; give a function"),
        ("exactly", "reward 'exactly' is not built in; use one of exact, scorer"),
        ("exact(", "cannot be read; write name"),
        ("exact(1)", "cannot be read"),
        ("exact(ignore_case=f())", "cannot be read"),
        ("exact(**{})", "cannot be read"),
        ("exact(ignorecase=True)", "takes no argument 'ignorecase'; it takes completions"),
        (
            "support.misbehaving.routes(key=1)",
            "takes no argument 'key'; it takes completions, routed",
        ),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line_at_once(spec, message):
    with pytest.raises(RLError) as caught:
        RewardRunner([spec], num_workers=1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_when_no_worker_can_be_started_again_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAL", str(tmp_path / "seal"))
    with RewardRunner(["support.unstartable.last_time"], num_workers=1) as runner:
        found = score(runner, ["a", "b", "c"])
        assert [f.reason for f in found.failures] == [
            "the worker ended with exit code 5",
            *["no reward worker can be started (3 tries)"] * 2,
        ]
        (tmp_path / "seal").unlink()
        assert score(runner, ["a"]).failures[0].reason == "the worker ended with exit code 5"


def test_a_module_that_takes_for_ever_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAL", str(tmp_path / "slow"))
    monkeypatch.setattr(process, "START_SECONDS", 1.0)
    with pytest.raises(RLError, match="a reward worker cannot start: took longer than 1 s"):
        RewardRunner(["support.unstartable.last_time"], num_workers=2)


def test_columns_of_another_length_are_refused():
    runner = RewardRunner([])
    with pytest.raises(RLError, match="truth has 1 values, completions 2; give one for each"):
        score(runner, ["a", "b"], truth=["x"])
    assert score(runner, ["a", "b"]).values == [[], []]


PARENT = """
import sys, time
from megatron_mm.rl.rewards.runner import RewardRunner

if __name__ == "__main__":
    runner = RewardRunner(["support.misbehaving.by_word"], num_workers=2, timeout=600)
    print(*runner.pids, flush=True)
    words = sys.argv[1].split(",")
    if words != [""]:
        runner.score(["q"] * len(words), words, [[1]] * len(words))
"""


@pytest.mark.parametrize("words", ["regex,child", "sleep,sleep"])
def test_nothing_outlives_a_killed_trainer(tmp_path, words):
    """Not even a function that holds Python's lock, or a process that one started."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    parent = subprocess.Popen(
        [sys.executable, str(script), words], stdout=subprocess.PIPE, env=environment
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        until = time.monotonic() + (60 if "child" in words else 1)  # for the calls to begin
        while time.monotonic() < until and not sleepers():
            time.sleep(0.1)
        family = {p.pid for p in psutil.Process(parent.pid).children(recursive=True)}
        assert set(pids) <= family and bool(sleepers()) == ("child" in words)
    finally:  # a trainer that outlived this would be at its regular expression for ten minutes
        parent.kill()
        parent.wait()
    assert gone(family) and not sleepers()


def test_a_trainer_that_just_ends_takes_its_workers_along(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [sys.executable, str(script), ""], capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
    assert gone([int(pid) for pid in done.stdout.split()], seconds=5)


def test_the_rewards_room_brings_no_heavy_library():
    """A worker starts in a fraction of a second, and holds little memory."""
    code = (
        "import sys, megatron_mm.rl.rewards.worker as w; "
        "assert not {'torch', 'numpy', 'sympy', 'megatron.core'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_can_be_pickled(by_word):
    found = score(by_word, ["a", "raise"])
    assert pickle.loads(pickle.dumps(found)).failures == found.failures
