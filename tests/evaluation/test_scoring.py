"""The scorers against a person's verdicts, and what a scorer may return."""

import pytest

from megatron_mm.errors import DataError
from megatron_mm.evaluation.scoring import SCORERS, chance, score

EXACT = [
    ("7", 1, ["7", " 7\n", "\t7", "\u00a07"]),
    (
        "7",
        0,
        ["", "8", "77", "7.", "07", "7.0", "7 7", "**7**", "<answer>7</answer>", "The answer is 7"],
    ),
    (
        "7",
        0,
        [r"\boxed{7}", "$7$", "seven", "-7", "7%", "7 or 8", "\uff17", "7,", "+7", "7/1", "(7)"],
    ),
    ("+", 1, ["+", " +"]),
    ("+", 0, ["", "-", "++", "plus"]),
    ("New York", 1, ["New York"]),
    ("New York", 0, ["new york", "York", "New  York", "NewYork", "New\nYork"]),
    ("caf\u00e9", 1, ["caf\u00e9", "cafe\u0301"]),
    ("caf\u00e9", 0, ["cafe"]),
    ("\u22127", 1, ["-7", "\u22127"]),
    ("", 1, ["", " "]),
    ("", 0, ["7"]),
]
PER_WORD = [
    (
        "3 4 5",
        1,
        ["3 4 5", " 3  4\n5 ", "<answer>3 4 5</answer>", r"\boxed{3 4 5}", "9</think>3 4 5"],
    ),
    ("3 4 5", 1, ["<think>1 2</think>3 4 5", "**3 4 5** <answer>3 4 5</answer>"]),
    ("3 4 5", 2 / 3, ["3 4", "3 4 6", "4 4 5", "3 4 ", "3 9 5"]),
    ("3 4 5", 1 / 3, ["3", "3 5 4", "3 1 2", "<answer>3</answer>", "3, 4, 5"]),
    ("3 4 5", 3 / 4, ["3 4 5 6", "3 4 5 5"]),
    ("3 4 5", 0.3, ["3 4 5 " + "6 " * 7]),
    (
        "3 4 5",
        0,
        ["", "345", "5", "4 5 3", "<think>3 4 5", "<answer></answer>3 4 5", "3,4,5", "0 3 4 5"],
    ),
    ("3 4 5", 0, [r"\boxed{}3 4 5", "three four five", "-3 -4 -5", "3.0 4.0 5.0", "5 3 4 "]),
    ("a", 1, ["a", "\na"]),
    ("a", 0.5, ["a b", "a a"]),
    ("a", 0, ["A", "b a", "ab", "a."]),
    ("caf\u00e9 noir", 1, ["cafe\u0301 noir"]),
    ("", 1, ["", " "]),
    ("", 0, ["a"]),
]
LAST_WORD = [
    (
        "7",
        1,
        ["7", "cell 1 is 3, total 7", "the answer is 7.", "**7**", "(7)", "7!", "$7", '"7"', "x=7"],
    ),
    (
        "7",
        1,
        [
            "<answer>7</answer>",
            r"\boxed{7} is it",
            "<answer>so it is 7</answer> bye",
            "3\n7",
            "\u2018 7",
        ],
    ),
    (
        "7",
        1,
        ["8</think>7", "<think>8</think> 7", r"\boxed{8} no \boxed{7}", "7 </answer>", "a: 7 ..."],
    ),
    (
        "7",
        0,
        [
            "",
            "8",
            "77",
            "17",
            "7 8",
            "7a",
            "a7",
            "-7",
            "\u22127",
            "7.5",
            ".7",
            "1/7",
            "7/8",
            "7%",
            "7 %",
        ],
    ),
    (
        "7",
        0,
        ["not 7", "it isn't 7", "6 or 7", "8, or 7", "neither 6 nor 7", "1:7", "1,007", "7 apples"],
    ),
    (
        "7",
        0,
        [
            "<think>7",
            "<answer>8</answer> 7",
            r"7 \boxed{}",
            r"\boxed{6} or \boxed{8} 7",
            "7-8",
            "6-7",
        ],
    ),
    ("+", 1, ["+", "so it is +", "It is +.", 'The sign is "+"', "<answer>+</answer>"]),
    ("+", 0, ["", " ", "-", "plus", "+ -", "++", "7", "+7"]),
    ("1/2", 1, ["1/2", "it is 1/2.", r"\boxed{1/2}"]),
    ("1/2", 0, ["2", "3/2", "1", "1 2", "0.5"]),
    ("7%", 1, ["7%", "7 %", "it is 7%.", r"\boxed{7\%}"]),
    ("7%", 0, ["7", "8%", "%"]),
    ("1,234", 1, ["1,234", "total 1,234."]),
    ("1,234", 0, ["234", "5,234", "1234", "1"]),
    ("10:30", 1, ["10:30", "at 10:30"]),
    ("10:30", 0, ["30", "11:30", "10"]),
    ("-7", 1, ["-7", "\u22127", "x is -7"]),
    ("C++", 1, ["C++", "I use C++."]),
    ("C++", 0, ["C", "C#", "++"]),
    ("don't", 1, ["don't", "I don't"]),
    ("don't", 0, ["can't", "t", "won't"]),
    ("New York", 1, ["New York", "in York"]),  # the last word alone, as its name says
    ("do not", 1, ["do not"]),
    ("", 0, ["7", "a"]),
]
PER_CLAUSE = [
    (
        "3 4",
        1,
        ["cell 1 is 3, cell 2 is 4", "3, 4", "3,4", "a 3, b 4.", "**3**, **4**", "cell 3,cell 4"],
    ),
    (
        "3 4",
        1,
        ["<answer>a 3, b 4</answer>", r"\boxed{3, 4}", "9, 9</think>3, 4", "x (3), y (4)", "3,\n4"],
    ),
    ("3 4", 1 / 2, ["3", "3, 5", "5, 4", "a 3", "3, not 4", "3, 3 or 4", "3 4, 4", "3, -4"]),
    ("3 4", 2 / 3, ["3, 4, 5", "3, 4,", "a is 3, b is 4, c"]),
    ("3 4", 1 / 3, ["3, 5, 6", "3, 5, 4", "5, 4, 3"]),
    (
        "3 4",
        0,
        [
            "",
            "4",
            "3 4",
            "4, 3",
            "3 and 4",
            "5, 6",
            ",",
            "<think>3, 4",
            "34",
            "<answer></answer>3, 4",
        ],
    ),
    (
        "3 4",
        0,
        ["not 3, not 4", "6 or 3, 7 or 4", "-3, -4", "3%, 4%", "three, four", r"\boxed{}3, 4"],
    ),
    ("1,234 5", 1, ["a 1,234, b 5", "1,234, 5"]),
    ("1,234 5", 0, ["234, 6"]),
    ("3, 4", 1, ["a 3, b 4"]),
    ("3, 4", 0, ["4, 3"]),
    ("+ 7", 1, ["a is +, b is 7", "+, 7"]),
    ("+ 7", 1 / 2, [", 7"]),
]
TABLES = {
    "exact": EXACT,
    "per_word": PER_WORD,
    "last_word": LAST_WORD,
    "per_clause": PER_CLAUSE,
}


@pytest.mark.parametrize(
    ("scorer", "truth", "verdict", "text"),
    [
        (scorer, truth, verdict, text)
        for scorer, table in TABLES.items()
        for truth, verdict, texts in table
        for text in texts
    ],
)
def test_verdicts(scorer, truth, verdict, text):
    assert score(scorer, text, truth) == pytest.approx(verdict)


def test_every_scorer_has_its_table():
    assert TABLES.keys() == SCORERS.keys()
    assert all(sum(len(texts) for *_, texts in table) >= 40 for table in TABLES.values())


def test_the_best_constant_of_a_sign_is_that_sign():
    answers = [("signs", "last_word", sign) for sign in "++-"]
    assert chance(answers) == {"signs": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "returned nan; allowed: 0 to 1"),
        (float("inf"), "returned inf; allowed: 0 to 1"),
        (2, "returned 2.0; allowed: 0 to 1"),
        (-1, "returned -1.0; allowed: 0 to 1"),
        (None, "failed: TypeError: "),
        ("high", "failed: ValueError: "),
        (ZeroDivisionError("by\nzero"), "failed: ZeroDivisionError: by zero"),
    ],
)
def test_a_scorer_that_returns_no_score_is_one_line(monkeypatch, returned, message):
    def mine(prediction, truth):
        if isinstance(returned, Exception):
            raise returned
        return returned

    monkeypatch.setitem(SCORERS, "mine", mine)
    with pytest.raises(DataError, match=f"scorer 'mine' {message}") as caught:
        score("mine", "7", "7")
    assert "\n" not in str(caught.value)
