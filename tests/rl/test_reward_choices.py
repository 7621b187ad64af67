"""The reward `multiple_choice` against a person's verdicts."""

import pytest

from megatron_mm.rl.rewards.letters import chosen
from support.rewards import one

# What a completion chooses, whatever the truth is.
CHOSEN = [
    ("B", ["The answer is London (B).", "Answer: London (B)", r"\boxed{London (B)}", "Ans: B"]),
    ("B", ["<answer>London (B)</answer>", "So the answer is London, option B."]),
    ("B", ["The tower is in England.\nB. London", "It is in England.\n(B) London"]),
    ("B", ["B", " B\n", "(B)", "[B]", "B.", "B)", "B:", "b", "(b)", "b.", "b)", "B!", '"B"']),
    (
        "B",
        ["**B**", "**B.** Paris", "$B$", r"\(B\)", r"\text{B}", r"$\mathbf{B}$", "`B`", "\uff22"],
    ),
    (
        "B",
        [
            r"\boxed{B}",
            r"\boxed{\text{B}}",
            r"\boxed{(B)}",
            r"\boxed{\textbf{(B)}}",
            "$\\boxed{B}$",
        ],
    ),
    (
        "B",
        [r"\boxed{\text{B. Paris}}", r"\boxed{\boxed{B}}", r"\boxed{A} no: \boxed{B}", r"\fbox{B}"],
    ),
    ("B", ["<answer>B</answer>", "<answer> (B) </answer>", "<answer>**B**</answer>", "<answer>b"]),
    ("B", ["<think>A? C?</think><answer>B</answer>", "<think>\\boxed{A}</think>B", "C</think>\nB"]),
    ("B", ["<answer>The answer is B because A is small.</answer>", "<answer>Option B</answer>"]),
    ("B", ["The answer is B, because option A is too small.", "The answer is B since A is not."]),
    (
        "B",
        [
            "The answer is B.",
            "the answer is (B)",
            "Answer: B",
            "answer: b",
            "ANSWER: B",
            "Answer = B",
        ],
    ),
    ("B", ["The correct option is B", "The correct answer is option B: Paris.", "My choice is B."]),
    (
        "B",
        ["The answer is B, D is too big", "The answer is B and A is wrong", "Answer B", "Option B"],
    ),
    ("B", ["The answer would be B", "The answer must be (B).", "**Answer:** B", "Answer:\n\nB"]),
    (
        "B",
        ["The answer is clearly B", "The answer is I think B", "Final answer: Option B", "So B."],
    ),
    (
        "B",
        [
            "The answer to the question is B",
            "The answer is not A but B",
            "It must be B",
            "B because A",
        ],
    ),
    ("B", ["I choose option (B).", "I would go with B", "B is correct", "B is the right answer."]),
    ("B", ["A is wrong. B is right.", "neither (A) nor (C) but (B)", "The best one is (B)."]),
    (
        "B",
        [
            "The answer is A. Wait, no, B.",
            "The answer is A, no, B",
            "I think A, no: the answer is B",
        ],
    ),
    ("B", ["The answer is B. No other option fits.", "Some say the answer is A; the answer is B"]),
    (
        "B",
        [
            "A. Rome\nB. Paris\nC. Oslo\n\nB",
            "A. Rome\nB. Paris\n\nThe answer is B.",
            "A is big.\nB",
        ],
    ),
    (
        "B",
        [
            "B, because (A) is too small",
            "The wrong answer is A. The answer is B.",
            "B. Paris",
            "B) 7",
        ],
    ),
    (
        "B",
        [
            "The answer is A.\nActually, B.",
            "The answer is B. I know the answer is B.",
            "B \u2014 Paris",
        ],
    ),
    ("B", ["Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.", "A? No. B."]),
    ("B", ["Looking at them:\nA. 1\nB. 2\nC. 3\n\nThe right answer is B. 2", "the letter is B"]),
    (
        "B",
        [
            "A and C are wrong, so B is the answer",
            "Not A. It's B.",
            "Let's go with B.",
            "B - Paris",
        ],
    ),
    ("B", ["The answer is 'B'.", "**B**\n\nBecause A is small", "The answer is B rather than A."]),
    (
        "B",
        [
            "Between A and B, the answer is B.",
            "### Answer\nB",
            "Hmm, A... no wait, B",
            r"\boxed{B.}",
        ],
    ),
    ("A", ["A", "A.", "(A)", "The answer is A.", "A because B is wrong", "Answer: A", "answer: a"]),
    ("I", ["(I)", "The answer is I.", r"\boxed{I}"]),
    (
        "AC",
        ["AC", "A, C", "A and C", "A & C", "C and A", "(A) and (C)", "The answer is AC.", "A,C"],
    ),
    (
        "AC",
        [
            r"\boxed{A, C}",
            r"\boxed{A}, \boxed{C}",
            "<answer>A and C</answer>",
            "Both A and C are correct",
        ],
    ),
    (
        "",
        [
            "",
            " ",
            "nothing",
            "choice I",
            "The answer I can give is unclear",
            "answer I can",
            "A cat sat",
        ],
    ),
    (
        "",
        [
            "A quick look",
            "The answer is A quick look",
            "I am not sure",
            "The answer is a cat",
            "C++",
        ],
    ),
    (
        "",
        [
            "A or B",
            "The answer is A or B",
            "The answer is either A or B",
            "A/B",
            "Answer: A, B, C or D",
        ],
    ),
    (
        "",
        [
            r"\boxed{A} or \boxed{B}",
            r"\boxed{}",
            r"\boxed{B",
            r"\boxed{A or B}",
            "<answer></answer>",
        ],
    ),
    (
        "",
        ["A. Rome\nB. Paris\nC. Oslo", "(A) 1\n(B) 2\n(C) 3\n(D) 4", "The answer is X-ray", "U.S."],
    ),
    (
        "",
        ["<think>B", "<think>The answer is B</think>", "The answer is not B", "The answer isn't B"],
    ),
    (
        "",
        [
            "The answer is B's",
            "Vitamin C is healthy",
            "Plan B failed",
            "The answer could be A, or (B)",
        ],
    ),
    (
        "",
        [
            "(A) or (B)",
            "not (B)",
            "None of them",
            "The answer is none of the above",
            "I rule out (B)",
        ],
    ),
]
# Completions that choose several, so that no truth of one letter may be paid.
HEDGED = [
    *(
        "A and B",
        "ABCD",
        "A, B, C, D",
        "The answer is A. The answer is B.",
        r"\boxed{A}, \boxed{B}",
    ),
    *("A is correct. B is correct.", "<answer>A</answer><answer>B</answer>", "The answer is A, B"),
]
OPTIONS = ["Paris", "London", "Rome"]


@pytest.mark.parametrize(
    ("letters", "text"), [(letters, text) for letters, texts in CHOSEN for text in texts]
)
def test_what_a_completion_chooses(letters, text):
    assert "".join(sorted(chosen(text).letters)) == letters
    for truth in ("A", "B", "C", "I", "AC"):
        assert one("multiple_choice", text, truth) == float(letters == truth)


@pytest.mark.parametrize("text", HEDGED)
def test_several_letters_are_not_one(text):
    assert [one("multiple_choice", text, truth) for truth in "ABCD"] == [0] * 4


@pytest.mark.parametrize(
    "truth",
    ["B", "(b)", "b.", "B)", "b", "[B]", "B. London", "(B) London", "**B**", "$B$", "Option B"],
)
@pytest.mark.parametrize("options", [None, OPTIONS])
def test_a_truth_is_a_letter_in_many_spellings(truth, options):
    for text in ("B", "The answer is B.", "(B) London", "b"):
        assert one("multiple_choice", text, truth, options=options) == 1
    for text in ("A", "The answer is C", "", "B or C", "AB"):
        assert one("multiple_choice", text, truth, options=options) == 0


QUESTION = "Which is the capital?\nA. Paris\nB. London\nC. Rome"
TEXT_TRUTHS = [
    # truth, completion, options, verdict
    *[
        ("London", text, OPTIONS, 1)
        for text in ("B", "London", "The answer is London.", "(B) London")
    ],
    *[
        ("London", text, OPTIONS, 1)
        for text in ("london", "It is London", "<answer>London</answer>")
    ],
    *[("London", text, OPTIONS, 0) for text in ("A", "Paris", "B. Paris", "London or Paris", "")],
    *[("London", text, OPTIONS, 0) for text in ("Paris, London, Rome", "It is not London", "D")],
    *[
        ("London", text, None, 1)
        for text in ("London", "B. London", "The answer is London because")
    ],
    *[("London", text, None, 0) for text in ("Paris", "", "London and Paris", "Londonderry")],
    *[("yes", "Yes.", None, 1), ("yes", "no", None, 0), (True, "true", None, 1)],
    *[("A cat", "a cat", None, 1), ("B", "y", {"A": "x", "B": "y"}, 1), ("b", "B", ["x", "y"], 1)],
    # numbers
    *[("2", text, None, 1) for text in ("2", "(2)", "B", "option 2", "The answer is 2.", "2.")],
    *[("2", text, None, 0) for text in ("A", "1", "12", "C", "The answer is 1 or 2")],
    *[
        (2, "B", OPTIONS, 1),
        (2, "London", OPTIONS, 1),
        (2, "A", OPTIONS, 0),
        (2.0, "B", OPTIONS, 1),
    ],
    *[("2", "A", ["2", "3"], 1), ("2", "B", ["2", "3"], 0), ("B", "Option 2", None, 1)],
    *[("B", "2", ["1", "2", "3"], 1), ("B", "2", None, 0)],
    # several
    *[(truth, "A and C", OPTIONS, 1) for truth in ("AC", "A, C", "A and C", ["A", "C"])],
    *[(["Paris", "Rome"], "A, C", OPTIONS, 1), (["Paris", "Rome"], "A", OPTIONS, 0)],
]


@pytest.mark.parametrize(("truth", "text", "options", "verdict"), TEXT_TRUTHS)
def test_a_truth_is_a_text_a_number_or_several(truth, text, options, verdict):
    assert one("multiple_choice", text, truth, options=options) == verdict
    assert one("multiple_choice", text, truth, choices=options) == verdict


def test_options_may_stand_in_the_question():
    prompt = [{"role": "user", "content": QUESTION}]
    for text, verdict in (("B", 1), ("London", 1), ("A", 0), ("B. Rome", 0)):
        assert one("multiple_choice", text, "London", prompt=prompt) == verdict


def test_options_may_count_from_zero():
    assert one("multiple_choice(first=0)", "C", 2, options=OPTIONS) == 1
    assert one("multiple_choice(first=0)", "A", 0, options=OPTIONS) == 1
    with pytest.raises(ValueError, match="0 is no option: 3 options count from 1; set multiple_ch"):
        one("multiple_choice", "A", 0, options=OPTIONS)


@pytest.mark.parametrize(
    ("truth", "options"),
    [("", None), ("Z", OPTIONS), ("Berlin", OPTIONS), ("4", OPTIONS), ({"x": 1}, None), ([], None)],
)
def test_a_truth_that_names_no_option_is_one_line(truth, options):
    for text in ("A", "Berlin", ""):
        with pytest.raises(ValueError, match="ground_truth .* (names no option|is no option)"):
            one("multiple_choice", text, truth, options=options)


def test_a_letter_that_means_nothing_is_not_silently_wrong():
    with pytest.raises(
        ValueError, match="'London' is a text and the completion chooses B, but the"
    ):
        one("multiple_choice", "B", "London")
