"""The built-in rewards as a whole: names, options, columns, hostile completions."""

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mm.evaluation.scoring import SCORERS, score
from megatron_mm.rl.rewards.functions import REWARDS, parse_rewards
from megatron_mm.rl.rewards.text import text_of
from support.rewards import one


def test_a_worker_imports_no_torch():
    """It would cost seconds each time that a worker is started again."""
    code = (
        "import sys, megatron_mm.rl.rewards.worker, megatron_mm.earl.spans;"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_scorer_is_the_evaluations():
    assert one("scorer", "cell 1 is 3, cell 2 is 4", "3 4", scorer="per_clause") == 1
    assert one("scorer", "3 5", "3 4", scorer="per_word") == 0.5
    assert one("scorer", "3", "3", scorer=None) == 1


# Repeated to 100,000 characters each.
HOSTILE = [
    *("a", "7", " ", "\n", "(", "[", "{", "}", "\\boxed{", "\\boxed{7} ", "<answer>", "</answer>"),
    *("<think>", "</think>", "answer is ", "The answer is 7. ", "answer of ", "A", "A, ", "B or "),
    *("(A) ", "A. x\n", "7, ", "1,000,", "1 234 ", "1/", "1.", "-", "$", "\\frac{1}{", "\\text{"),
    *(
        "**",
        "=",
        "7 = ",
        "not ",
        "no, ",
        "wait, 7 ",
        '"',
        '{"a":',
        "[1,",
        "[1,1,1",
        "\u00b2",
        "\u00bd",
    ),
    *("10^", "3 x 10^2 ", "because ", "is correct ", "I choose B. ", "so ", "\\(", "\\", "7 cm "),
]
TRUTHS = {
    "exact": "7",
    "multiple_choice": "B",
    "numeric": "7",
    "math": "7",
    "box_iou": [1, 1, 3, 3],
}
TRUTHS |= {"anls": "kitten", "tags": None, "json_match": {"a": 1}}


class Opcodes:
    """Counts the lines of Python that run inside the package, where a loop of a reader stands."""

    def __init__(self):
        self.lines = 0

    def __call__(self, frame, event, argument):
        if event == "line" and "megatron_mm" in frame.f_code.co_filename:
            self.lines += 1
        return self


@pytest.mark.parametrize("name", TRUTHS)
def test_time_is_linear_in_hostile_completions(name):
    """Four times the text may take some six times the lines; a quadratic loop takes sixteen."""
    for unit in HOSTILE:
        lines = []
        for size in (5_000, 20_000):
            text = (unit * (size // len(unit) + 1))[:size]
            counter = Opcodes()
            sys.settrace(counter)
            try:
                assert one(name, text, TRUTHS[name]) in (0, 1)
            finally:
                sys.settrace(None)
            lines.append(counter.lines)
        assert lines[1] < 6 * lines[0] + 5_000, (unit, lines)


@pytest.mark.parametrize("name", [*TRUTHS, *SCORERS])
def test_no_hostile_completion_meets_the_time_limit(name):
    """A call may take 10 s by default; a regular expression that goes back takes minutes."""
    for unit in HOSTILE:
        text = (unit * (100_000 // len(unit) + 1))[:100_000]
        for whole in (text, f"The answer is {text}"):
            started = time.monotonic()
            if name in SCORERS:
                assert 0 <= score(name, whole, "7") <= 1
            else:
                one(name, whole, TRUTHS[name])
            assert time.monotonic() - started < 10, unit


def test_where_the_truth_is_unknown_rewards_do_not_apply():
    for name in ("exact", "multiple_choice", "numeric", "math", "box_iou", "anls", "json_match"):
        assert one(name, "7", None) is None
    assert one("scorer", "7", None, scorer="exact") is None


def test_the_readmes_example_is_a_reward():
    page = Path(__file__).parents[2] / "megatron_mm" / "rl" / "README.md"
    readme = page.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def .*?)```", readme, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["short"](["q"], ["it is 7", "8"], [[1]], ground_truth=["7", "7"]) == [1.0, 0.0]
    listed = readme.split("Built in, against")[1].split("Rewards run in")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {*REWARDS, "ground_truth"}


def test_names_and_options():
    specs = parse_rewards(["exact", "a.b.exact", "exact(ignore_case=True)", "x.y", "mine.kl"])
    # The KL's own metrics are those of a reward named kl.
    assert [spec.name for spec in specs] == ["exact", "exact_2", "exact_3", "y", "kl_2"]
    assert specs[2].options == {"ignore_case": True} and specs[1].path == "a.b.exact"
    assert set(REWARDS) >= {"exact", "numeric", "math", "box_iou", "anls", "json_match"}
    assert not math.isnan(one("exact", "a", "b"))


@pytest.mark.parametrize(
    ("spec", "completion", "column"),
    [
        ("tags", "<think>a</think> <answer>b</answer>", {"tags": "arithmetic"}),
        ("tags", "<think>a</think> <answer>b</answer>", {"tags": None}),
        ("exact(ignore_case=True)", "PARIS", {"ignore_case": False}),
        ("exact", "Paris", {"ignore_case": True}),
        ("numeric", "7", {"tolerance": "low"}),
        ("pattern(pattern='P.*')", "Paris", {"pattern": "x"}),
    ],
)
def test_a_column_is_no_option(spec, completion, column):
    """Though it has an option's name: many sets of rows have tags."""
    truth = "7" if spec == "numeric" else "Paris"
    assert one(spec, completion, truth, **column) == 1
    assert one(spec, "x", "7" if spec == "numeric" else "y", **column) == 0


PARTS = [{"type": "image"}, {"type": "text", "text": "Which city?\nA. Paris\nB. Rome"}]


@pytest.mark.parametrize(
    ("truth", "completion", "reward"),
    [("B", "Rome", 1), ("B", "Paris", 0), ("Rome", "B", 1), ("Rome", "A", 0)],
)
def test_prompts_of_parts_are_read_as_texts(truth, completion, reward):
    prompt = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": []},  # without a text
        {"role": "assistant", "content": None},
        {"role": "user", "content": PARTS},
    ]
    assert one("multiple_choice", completion, truth, prompt=prompt) == reward
    assert text_of(prompt) == "hi\n\n\n<image>Which city?\nA. Paris\nB. Rome"
