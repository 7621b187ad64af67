"""The built-in rewards, on answers as models write them."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.plugins import parse_specs
from megatron_mm.rl.rewards.functions import REWARDS, RewardFunction
from megatron_mm.rl.rewards.structured import boxes_in, iou, last_number
from megatron_mm.rl.rewards.text import chosen_letter, edit_distance, soft_overlong_punishment


def one(spec, completion, truth=None, ids=(1,), **columns):
    """Returns the reward of one completion, called as a worker does."""
    function = RewardFunction(parse_specs([spec], REWARDS)[0])
    columns = {"ground_truth": [truth]} | {key: [value] for key, value in columns.items()}
    (reward,) = function(["q"], [completion], [list(ids)], columns, None, lambda *metric: None)
    return reward


def test_a_worker_imports_no_torch():
    """It would cost seconds each time that a worker is started again."""
    code = (
        "import sys, megatron_mm.rl.rewards.worker, megatron_mm.earl.spans;"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_exact():
    assert one("exact", " 7 \n", "7") == 1 and one("exact", "17", "7") == 0
    assert one("exact", "Paris", "paris") == 0
    assert one("exact(ignore_case=True)", "Paris", "paris") == 1
    conversation = [{"role": "assistant", "content": "7"}]
    assert one("exact", conversation, "7") == 1


def test_scorer_is_the_evaluations():
    assert one("scorer", "cell 1 is 3, cell 2 is 4", "3 4", scorer="per_clause") == 1
    assert one("scorer", "3 5", "3 4", scorer="per_word") == 0.5
    assert one("scorer", "3", "3", scorer=None) == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. Paris", "B"),
        ("D) because", "D"),
        ("The answer is B.", "B"),
        ("Answer: **C**", "C"),
        ("so the answer is (A), not B", "A"),
        ("I think A, no: the answer is D", "D"),
        (r"thus \boxed{C}", "C"),
        (r"the answer is A \boxed{\text{(B)}}", "B"),
        ("neither (A) nor (B) but (D)", "D"),
        ("A cat sat there", None),
        ("nothing", None),
    ],
)
def test_multiple_choice(text, letter):
    assert chosen_letter(text) == letter
    assert one("multiple_choice", text, "B") == float(letter == "B")
    assert one("multiple_choice", text, letter or "B") == float(letter is not None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("it is -3.5", -3.5),
        ("x=-2", -2),
        ("5-3", 3),
        ("1,234,567.5 people", 1234567.5),
        ("2, 3 and 40", 40),
        ("1e-3", 1e-3),
        ("\u22125", -5),
        (".5", 0.5),
        ("total 12.", 12),
        ("9" * 400, None),
        ("none", None),
    ],
)
def test_numbers_are_read_as_written(text, number):
    assert last_number(text) == number


def test_numeric():
    assert one("numeric", "so it is 3.14", "3.14") == 1
    assert one("numeric", "3.15", "3.14") == 0
    assert one("numeric(tolerance=0.02)", "3.15", "3.14") == 1
    assert one("numeric(relative_tolerance=0.1)", "105", 100) == 1
    assert one("numeric", r"\boxed{4} and 5", "4") == 1
    assert one("numeric", "no idea", "4") == 0
    with pytest.raises(ValueError, match="ground_truth 'four' holds no number"):
        one("numeric", "4", "four")


@pytest.mark.parametrize(
    ("text", "truth", "reward"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"The answer is $\frac{2}{4}$", r"\frac{1}{2}", 1),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        (r"\boxed{3}", "4", 0),
        ("no idea", "4", 0),
        ("4", "", None),
    ],
)
def test_math(text, truth, reward):
    assert one("math", text, truth) == reward


def test_boxes():
    assert boxes_in("at [1, 2, 3.5, 4] and (5,6),(7,8)") == [(1, 2, 3.5, 4), (5, 6, 7, 8)]
    assert boxes_in("[[3, 4, 1, 2], [5 6 7 8]]") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert boxes_in("[1, 2, 3] and [1, 2, 3, 4, 5]") == []
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_box_iou():
    assert one("box_iou", "[0, 0, 2, 2]", [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert one("box_iou", "[0, 0, 2, 2]", "[0, 0, 2, 2]") == 1
    assert one("box_iou", "nowhere", [1, 1, 3, 3]) == 0
    assert one("box_iou(threshold=0.1)", "[0, 0, 2, 2]", [1, 1, 3, 3]) == 1
    assert one("box_iou(threshold=0.2)", "[0, 0, 2, 2]", [1, 1, 3, 3]) == 0
    truth = [[0, 0, 2, 2], [10, 10, 12, 12]]
    assert one("box_iou", "[10, 10, 12, 12], [0, 0, 2, 2]", truth) == 1
    # A box too many, or one missing, costs its share.
    assert one("box_iou", "[10, 10, 12, 12]", truth) == 0.5
    assert one("box_iou", "[0, 0, 2, 2] [0, 0, 2, 2] [10, 10, 12, 12]", truth) == pytest.approx(
        2 / 3
    )
    with pytest.raises(ValueError, match="holds no box"):
        one("box_iou", "[0, 0, 1, 1]", "left")


def test_edit_distance():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in (("kitten", "sitting"), ("", "abc"), ("ab", "ba"), ("flaw", "lawn"), ("x", "x")):
        assert edit_distance(a, b) == slow(a, b)


def test_anls():
    assert one("anls", "Kitten ", "kitten") == 1
    assert one("anls", "sitting", "kitten") == pytest.approx(1 - 3 / 7)
    assert one("anls", "abcd", "abxy") == 0  # NL of 0.5 is not below the threshold
    assert one("anls(threshold=0.6)", "abcd", "abxy") == 0.5
    assert one("anls", "b", ["aaa", "b"]) == 1
    assert one("anls", "", "") == 1 and one("anls", "x" * 10**6, "abc") == 0


def test_tags_and_patterns():
    good = "<think>a\nb</think>\n<answer>7</answer>"
    assert one("tags", good) == 1
    for bad in (good + "x", good[::-1], "<think>a</think>", good + good, "x" + good):
        assert one("tags", bad) == 0
    assert one("tags(tags=['a'])", "<a>1</a>") == 1
    assert one("tags", "<think><think></think><answer></answer>") == 0
    assert one(r"pattern(pattern=r'\d+')", "123") == 1
    assert one(r"pattern(pattern=r'\d+')", "123 ") == 0


def test_soft_overlong_punishment():
    """DAPO eq. 13, with a maximum of 100 and a cache of 20."""
    for length in range(1, 130):
        if length <= 80:
            expected = 0.0
        elif length <= 100:
            expected = (80 - length) / 20
        else:
            expected = -1.0
        assert soft_overlong_punishment(length, 100, 20) == expected
    spec = "soft_overlong(max_completion_length=10, soft_punish_cache=4)"
    assert one(spec, "text", ids=range(8)) == -0.5
    with pytest.raises(ValueError, match="soft_punish_cache is 0; allowed: 1 to 10"):
        soft_overlong_punishment(3, 10, 0)


@pytest.mark.parametrize(
    ("text", "truth", "reward"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b": [1, 2], "a": 1.0}', 1),
        ('Here:\n```json\n{"a": 1}\n```', {"a": 1}, 1),
        ('{"a": 1, "b": [1, 3]}', {"a": 1, "b": [1, 2]}, 2 / 3),
        ('{"a": 1, "c": 2}', {"a": 1, "b": 2}, 1 / 3),
        ('{"a": true}', {"a": 1}, 0),
        ("{}", {}, 1),
        ("[]", {}, 0),
        ("{'a': 1}", {"a": 1}, 0),
        ("no", {"a": 1}, 0),
        ("[" * 100_000, {"a": 1}, 0),
    ],
)
def test_json_match(text, truth, reward):
    assert one("json_match", text, truth) == pytest.approx(reward)


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
    specs = parse_specs(["exact", "a.b.exact", "exact(ignore_case=True)", "x.y"], REWARDS)
    assert [spec.name for spec in specs] == ["exact", "exact_2", "exact_3", "y"]
    assert specs[2].options == {"ignore_case": True} and specs[1].path == "a.b.exact"
    assert set(REWARDS) >= {"exact", "numeric", "math", "box_iou", "anls", "json_match"}
    assert not math.isnan(one("exact", "a", "b"))
