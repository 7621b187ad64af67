"""The rewards that compare text, against a person's verdicts."""

import pytest

from megatron_mm.rl.rewards.text import edit_distance, soft_overlong_punishment
from support.rewards import cases, one

EXACT = [
    ("7", 1, ["7", " 7", "7\n", "\t7 \r\n", "\u00a07", "\u30007\u3000"]),
    (
        "7",
        0,
        ["", "17", "77", "7.", "7.0", "07", "+7", "seven", "7 or 8", "**7**", "$7$", "7%", "7 7"],
    ),
    (
        "7",
        0,
        [r"\boxed{7}", "<answer>7</answer>", "The answer is 7", "\uff17", "\u2166", "7\n8", "-7"],
    ),
    (7, 1, ["7", " 7 "]),
    (7, 0, ["7.0", "8"]),
    (7.0, 1, ["7"]),
    (0.5, 1, ["0.5"]),
    (0.5, 0, [".5", "1/2"]),
    (True, 1, ["true", "True"]),
    (True, 0, ["1", "false", "yes"]),
    ("Paris", 1, ["Paris"]),
    ("Paris", 0, ["paris", "PARIS", "Paris.", "Paris France", "London", "sirap"]),
    ("caf\u00e9", 1, ["caf\u00e9", "cafe\u0301"]),
    ("caf\u00e9", 0, ["cafe"]),
    ("+", 1, ["+"]),
    ("+", 0, ["", "-", "++"]),
    (["7", "seven"], 1, ["7", "seven"]),
    (["7", "seven"], 0, ["8", "7 seven", "", "['7', 'seven']"]),
]
TAGS = [
    (None, 1, ["<think>a</think><answer>7</answer>", "<think>a\nb</think>\n<answer>7</answer>"]),
    (
        None,
        1,
        [
            " <think>a</think> \n\n <answer>7</answer>\n",
            "<think>1 < 2 & 3</think><answer>\u00e9</answer>",
        ],
    ),
    (
        None,
        1,
        [
            "<think><b>x</b></think><answer>{}</answer>",
            "<think>\n.\n</think><answer>\n7\n</answer>",
        ],
    ),
    (
        None,
        0,
        ["", "7", "<think>a</think>", "<answer>7</answer>", "<think></think><answer>7</answer>"],
    ),
    (None, 0, ["<think>a</think><answer></answer>", "<think>a</think><answer> \n </answer>"]),
    (None, 0, ["<think> </think><answer>7</answer>", "<answer>7</answer><think>a</think>"]),
    (None, 0, ["x<think>a</think><answer>7</answer>", "<think>a</think><answer>7</answer>x"]),
    (None, 0, ["<think>a</think>x<answer>7</answer>", "<think>a<answer>7</answer></think>"]),
    (
        None,
        0,
        ["<think>a</think><answer>7</answer><answer>8</answer>", "<think>a</think><answer>7"],
    ),
    (
        None,
        0,
        [
            "<think>a<think>b</think><answer>7</answer>",
            "<think>a</think></think><answer>7</answer>",
        ],
    ),
    (
        None,
        0,
        ["<think>a</think><answer>7</answer></answer>", "</think>a<think><answer>7</answer>"],
    ),
    (None, 0, ["<Think>a</Think><Answer>7</Answer>", "<think>a</think><answer >7</answer>"]),
    (None, 0, ["< think>a</think><answer>7</answer>", "think a /think answer 7 /answer"]),
    (
        None,
        0,
        [
            "<think>a</think><answer>7</answer>" * 2,
            "<think>a</think>\n7",
            "a</think><answer>7</answer>",
        ],
    ),
    (
        None,
        0,
        [
            "<think><answer></think>7</answer>",
            "<think>a<answer>b</think>7</answer>",
            "<think>a</answer>",
        ],
    ),
    (
        None,
        0,
        [
            "<think>a</think><answer>7<answer>",
            "```<think>a</think><answer>7</answer>```",
            "\\boxed{7}",
        ],
    ),
    (
        None,
        0,
        ["<think>a</think> So <answer>7</answer>", "<think/><answer>7</answer>", "<think>", "<>"],
    ),
]
ANLS = [
    # By eq. 1, counted by hand.
    ("kitten", 1, ["kitten", "Kitten ", "KITTEN", "<answer>kitten</answer>", r"\boxed{kitten}"]),
    ("kitten", 1 - 3 / 7, ["sitting"]),
    ("kitten", 1 - 1 / 7, ["kittens", " kitten."]),
    ("kitten", 1 - 1 / 6, ["mitten", "kit-en"]),
    ("kitten", 1 - 2 / 6, ["kittne", "bitter"]),
    (
        "kitten",
        0,
        ["", "kit", "dog", "the little kitten", "kitten or dog", "<think>kitten", "xxxxxx"],
    ),
    ("kitten", 0, ["kitten kitten", "kitten " * 1000, "<answer></answer>kitten", "n" * 100_000]),
    ("abcd", 0, ["abxy", "ab", "cdab"]),  # NL of 0.5 is not below the threshold
    ("abcd", 0.75, ["abcx", "xbcd", "bcd", "abc"]),
    ("2010", 0.75, ["2011", "2 10", "210"]),
    (2010, 1, ["2010"]),
    (2010.0, 1, ["2010"]),
    ("caf\u00e9", 1, ["cafe\u0301", "CAF\u00c9"]),
    ("stra\u00dfe", 1, ["STRASSE"]),
    (["aaa", "b"], 1, ["aaa", "b"]),
    (["aaa", "b"], 2 / 3, ["aab", "aa"]),
    (["aaa", "b"], 0, ["c", "aaa, b"]),
    ("", 1, ["", " "]),
    ("", 0, ["x"]),
    ("<think>it is a dog</think>kitten", 0, ["kitten"]),
    ("kitten", 1, ["<think>it is a dog</think>kitten", "dog</think>\nkitten"]),
]


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(EXACT))
def test_exact(truth, verdict, text):
    assert one("exact", text, truth) == verdict


def test_exact_in_any_case_and_of_a_conversation():
    assert one("exact(ignore_case=True)", "Paris", "paris") == 1
    assert one("exact", [{"role": "assistant", "content": "7"}], "7") == 1


@pytest.mark.parametrize("name", ["exact", "anls"])
@pytest.mark.parametrize("truth", [{"a": 1}, [], [None], [["7"]]])
def test_a_truth_that_is_no_text_is_one_line(name, truth):
    with pytest.raises(ValueError, match="ground_truth is a") as caught:
        one(name, "7", truth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(ANLS))
def test_anls(truth, verdict, text):
    assert one("anls", text, truth) == pytest.approx(verdict)


def test_anls_has_a_threshold():
    assert one("anls(threshold=0.6)", "abcd", "abxy") == 0.5
    assert one("anls(threshold=0.2)", "abcd", "abcx") == 0


def test_edit_distance():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ("kitten", "sitting", "", "abc", "ab", "ba", "flaw", "lawn", "x", "aaaa", "bbb")
    for a in words:
        for b in words:
            right = slow(a, b)
            assert edit_distance(a, b) == right
            for limit in range(1, 9):
                found = edit_distance(a, b, limit)
                assert found == right if right < limit else found >= limit


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(TAGS))
def test_tags(truth, verdict, text):
    assert one("tags", text) == verdict


def test_tags_have_names():
    assert one("tags(tags=['a'])", "<a>1</a>") == 1 and one("tags(tags=['a.'])", "<ab>1</ab>") == 0
    for wrong in ("tags(tags='think')", "tags(tags=[])"):
        with pytest.raises(ValueError, match="give a list of names, such as"):
            one(wrong, "<think>1</think>")


PATTERN = [
    (r"\d+", 1, ["1", "123", "0", "9" * 1000, "\u0663"]),
    (
        r"\d+",
        0,
        ["", " ", "123 ", " 123", "a1", "1a", "1\n", "1.5", "-1", "1,2", "one", "<1>", "\u00b2"],
    ),
    (r"<a>.*</a>", 1, ["<a></a>", "<a>x</a>", "<a>x\ny</a>", "<a><a></a></a>", "<a>\n</a>"]),
    (r"<a>.*</a>", 0, ["", "<a>", "</a>", "x<a>x</a>", "<a>x</a>x", "<A>x</A>", "a", "<a>x</a>\n"]),
    (r"yes|no", 1, ["yes", "no"]),
    (r"yes|no", 0, ["yesno", "yes or no", "Yes", "no.", "", "maybe", "y", "noyes"]),
]


@pytest.mark.parametrize(("regex", "verdict", "text"), cases(PATTERN))
def test_pattern(regex, verdict, text):
    assert one(f"pattern(pattern={regex!r})", text) == verdict


@pytest.mark.parametrize("length", range(1, 130, 3))
def test_soft_overlong(length):
    """DAPO eq. 13, with a maximum of 100 and a cache of 20."""
    if length <= 80:
        expected = 0.0
    elif length <= 100:
        expected = (80 - length) / 20
    else:
        expected = -1.0
    spec = "soft_overlong(max_completion_length=100, soft_punish_cache=20)"
    assert one(spec, "text", ids=range(length)) == expected


def test_soft_overlong_has_bounds():
    with pytest.raises(ValueError, match="soft_punish_cache is 0; allowed: 1 to 10"):
        soft_overlong_punishment(3, 10, 0)
    with pytest.raises(ValueError, match="soft_punish_cache is 11; allowed: 1 to 10"):
        soft_overlong_punishment(3, 10, 11)
