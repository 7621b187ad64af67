"""The reward `numeric` against a person's verdicts."""

import math

import pytest

from megatron_mm.rl.rewards.numbers import parse_value
from megatron_mm.rl.rewards.numeric import answered_value
from support.rewards import cases, one

TRUTHS = [
    # Each is one number as a whole; a person reads it so.
    *[("7", 7), ("-7", -7), ("+7", 7), ("\u22127", -7), ("7.", 7), (".5", 0.5), ("3.14", 3.14)],
    *[("1/2", 0.5), ("-1/2", -0.5), ("1 1/2", 1.5), (r"\frac{1}{2}", 0.5), (r"\frac12", 0.5)],
    *[(r"$\dfrac{3}{4}$", 0.75), (r"-\frac{1}{2}", -0.5), (r"1\frac{1}{2}", 1.5)],
    *[("\u00bd", 0.5), ("3\u00bd", 3.5), ("1\u20442", 0.5)],
    *[("1,234", 1234), ("1,234.5", 1234.5), ("1 234", 1234), ("12 345 678", 12345678)],
    *[("1_000", 1000), ("1'234", 1234), (r"1{,}234", 1234), ("1\u202f234", 1234)],
    *[("3 x 10^2", 300), (r"3 \times 10^{2}", 300), ("3\u00d710\u00b2", 300), ("3e2", 300)],
    *[("3*10^2", 300), (r"3 \cdot 10^{-2}", 0.03), ("1e-3", 0.001), ("10^2", 100), ("10**3", 1000)],
    *[("2^10", 1024), ("7%", 0.07), (r"50\%", 0.5), ("7 percent", 0.07), ("12.5 %", 0.125)],
    *[("\uff17", 7), ("\u0663", 3), ("three", 3), ("twenty-one", 21), ("3 million", 3e6)],
    *[
        ("$5", 5),
        (r"\$1,200", 1200),
        ("\u20ac5", 5),
        ("5 \u20ac", 5),
        ("7 cm", 7),
        ("90\u00b0", 90),
    ],
    *[("7 apples", 7), ("x = 7", 7), ("about 7", 7), ("(7)", 7), ("5 km/h", 5), (7, 7), (0.5, 0.5)],
]
NOT_NUMBERS = [
    *("3,5", "1,23", "1.234,5", "1,2,3", "10:30", "2024-05-01", "12/25/2024", "1 Jan", "1.2.3"),
    *("7 March 2020", "May 2020", "7 or 8", "5-7", "5 to 7", "7th", "2x", "0x10", "8 = 7", "1/0"),
    *("", "two thirds", "nan", "inf", "9" * 400, "1e400", "none", "3 + 4"),
    *(True, float("nan"), {"a": 1}, [["7"]], "7, 8"),
]
SENTENCES = [
    "I count the cubes in the picture\n7",
    "### Final Answer\n7",
    "Adding them gives\n7",
    "Answer: There are 7 apples.",
    "Answer: The number of apples is 7.",
    "The answer is the sum of 3 and 4, which is 7.",
    "**Solution:** We count 3 red and 4 blue. Total 7.",
    "The answer is:\n- 7",
    "The answer is 7, because there are actually 2 dogs and 5 cats.",
    "Answer: 7 (there are actually 2 on each side)",
    "The answer is 7. I mean 3 rows of 4 and less 5.",
    "The answer is 8, or rather 7.",
    "The answer is 8. Actually, it is 7.",
    "The answer is 8... actually 7",
]
AREAS = [r"\boxed{24\text{ cm}^{2}}", r"\boxed{24 \mathrm{~cm}^{2}}", r"24 cm^{2}", r"$24\,cm^2$"]
TABLE = [
    ("7", 1, SENTENCES),
    ("7", 0, ["The answer is x + 7", "The answer is 3 less than 7", "Answer: it is 5 or 7"]),
    ("7", 0, ["The answer is the product of 3 and 7.", "Answer: it depends on whether x > 7"]),
    (
        "7",
        0,
        ["The answer is sqrt(7)", r"The answer is \sqrt{7}", "Answer: \u221a7", "Answer: f(7)"],
    ),
    ("7", 0, ["The answer is log 7", "The answer is 7x", "The answer is x^7", "Answer: |7|"]),
    ("-3", 1, ["Five less than two is what is asked for in row 5\n-3"]),
    ("24 cm^2", 1, AREAS),
    ("24 m^3", 0, AREAS),
    ("9.8", 1, [r"\boxed{9.8\ \text{m/s}^{2}}"]),
    ("7", 1, ["7", " 7\n", "7.0", "7.", "+7", "07", "7!", "**7**", "$7$", "$$7$$", r"\(7\)"]),
    ("7", 1, [r"\boxed{7}", r"\boxed{7.00}", r"\boxed{ 7 }", r"\boxed{\text{7}}", r"\fbox{7}"]),
    (
        "7",
        1,
        [r"\boxed{\boxed{7}}", r"\boxed{x=7}", r"\boxed{7 \text{ cm}}", r"\boxed{\mathbf{7}}"],
    ),
    ("7", 1, [r"\boxed{3} no, \boxed{7}", r"\boxed{7} and 5", r"\boxed{7}, so \boxed{7}"]),
    ("7", 1, [r"$$\boxed{7}$$", r"\boxed{\frac{14}{2}}", r"\boxed{7,}", r"\boxed{3+4=7}"]),
    ("7", 1, ["<answer>7</answer>", "<answer> 7 cm </answer>", "<answer>**7**</answer>"]),
    ("7", 1, ["<think>8 or 9</think>7", "<think>3</think><answer>7</answer>", "8</think> 7"]),
    ("7", 1, ["The answer is 7, because 3 + 4 = 7 and 2 is left.", "Answer: 7", "answer = 7"]),
    ("7", 1, ["The answer is seven.", "Seven", "It is 7", "so x = 7", "3 + 4 = 7", "(3+4)=7"]),
    ("7", 1, ["The answer is $7$.", r"The answer is \(7\)", "**Answer:** 7", "Answer:\n\n7"]),
    ("7", 1, ["The answer is approximately 7", "The final answer is: **7**", "\uff17", "\u0667"]),
    ("7", 1, ["The answer is 8. Wait, no, 7.", "7 (seven)", "In 2020, 7 people", "total:7"]),
    ("7", 1, ["Step 1: 3\nStep 2: 4\n#### 7", "- cats\n- 7 apples", "7 apples", "14/2", "7e0"]),
    (
        "7",
        1,
        ["Sure! The answer is 7. Let me know if you need 2 more.", "The answer is 7 cm, not 8"],
    ),
    ("7", 1, ["Some say the answer is 8, but I think the answer is 7", "0.7 x 10^1", "700%"]),
    ("7", 0, ["", "8", "-7", "77", "17", "0.7", "7%", "7/8", "7 or 8", "8 or 7", "not 7", "7th"]),
    ("7", 0, ["It is not 7", "1, 2, 3, 4, 5, 6, 7", "1 2 3 4 5 6 7", "5\n6\n7", "between 5 and 7"]),
    ("7", 0, ["more than 7", "at least 7", "5 to 7", "5-7", "3 + 4", "0 + 7", "6:07", "x7", "7x"]),
    ("7", 0, ["2024-05-7", "1.2.7", "7.5.1", "3,7", "the answer is 7,5", "seventy", "7 million"]),
    (
        "7",
        0,
        [r"\boxed{8 = 7}", r"\boxed{7} or \boxed{8}", r"\boxed{8}, \boxed{7}", r"\boxed{7, 8}"],
    ),
    ("7", 0, [r"\boxed{}", r"\boxed{7", r"7 \boxed{8}", r"\boxed{7 or 8}", r"\boxed{7!}"]),
    (
        "7",
        0,
        ["<answer>8</answer> 7", "<answer>6</answer><answer>7</answer>", "<answer></answer>7"],
    ),
    ("7", 0, ["<think>7</think>", "<think>7", "<think>7</think>8", r"<think>\boxed{7}</think>8"]),
    (
        "7",
        0,
        ["The answer is not 7", "The answer is 7 or 8", "The answer is 7 and 8", "Answer: 7/8"],
    ),
    ("7", 0, ["The answer is 7. No, wait, 8.", "The answer is 6. The answer is 7.", "one of 7"]),
    (
        "7",
        0,
        ["The answer is 10:07", "The answer is 6 because it is not 7", "7 dozen", "I see 7, 8"],
    ),
    ("42", 1, ["She has 6 x 7 = <<6*7=42>>42 apples\n#### 42", "the answer is 42 since 6*7 = 42"]),
    (
        "42",
        1,
        [r"The answer is $6 \cdot 7 = 42$.", r"\boxed{42 \, \text{m}^2}", r"\boxed{\$42}", "= 42"],
    ),
    (
        "42",
        1,
        [
            "The final answer is $\\boxed{42}$. I hope it is correct.",
            "The answer is 42 \u2014 not 43",
        ],
    ),
    (
        "42",
        1,
        [
            "Forty-two",
            "4.2e1",
            "4.2 \u00d7 10^1",
            "Answer: 42 (forty-two)",
            "84/2",
            r"\boxed{n = 42}",
        ],
    ),
    (
        "42",
        1,
        [r"\boxed{a + b = 42}", "Answer: 42,", "The answer is 42...", "\u2248 42", "42\u00b0"],
    ),
    (
        "42",
        0,
        [r"\boxed{2x = 42}", r"\boxed{x^2 = 42}", r"\boxed{42 \text{ or } 43}", "42nd", "2042"],
    ),
    (
        "42",
        0,
        ["The answer is anything but 42", "The answer is between 41 and 42", "$0.42", "40-42"],
    ),
    (
        "42",
        0,
        ["The answer is less than 42", "The answer is > 42", "at most 42", "4 2", "42 million"],
    ),
    ("1/2", 1, ["0.5", "1/2", "2/4", ".5", "50%", r"\frac{1}{2}", r"\boxed{\dfrac12}", "\u00bd"]),
    ("1/2", 0, ["2", "1", "12", "1 2", "1/3", "1:2", "-1/2", "1,2"]),
    ("1 234", 1, ["1234", "1,234", "1 234", "1,234.0", "1.234e3", r"1{,}234", "1_234"]),
    ("1 234", 0, ["234", "1", "1.234", "12 34", "1,23"]),
    ("3 x 10^2", 1, ["300", "3e2", "3 x 10^2", r"$3 \times 10^{2}$", "3\u00d710\u00b2", "300.0"]),
    ("3 x 10^2", 0, ["2", "10", "3", "102", "3 x 10^3", "3 x 10"]),
    ("7%", 1, ["7%", "0.07", r"\boxed{7\%}", "7 percent", "7 per cent", "The answer is 7%."]),
    ("7%", 0, ["7", "0.7", "700%", "The answer is 7"]),
    ("0.7 m", 1, ["0.7", "0.7 m", "70 cm", "700 mm", r"\boxed{70\text{ cm}}", "0.7 meters"]),
    ("0.7 m", 0, ["70", "70 m", "0.7 kg", "0.7 s", "7 cm", "0.7 cm"]),
    ("$5", 1, ["5", "$5", "5 dollars", r"\$5.00", "500 cents", "USD 5"]),
    ("$5", 0, ["\u20ac5", "$50", "5 cents", "5 euros"]),
    ("7 pm", 1, ["7 pm", "7 p.m.", "7"]),
    ("7 pm", 0, ["7 am", "19"]),
    (
        "-2.5",
        1,
        ["-2.5", "\u22122.5", "x=-2.5", r"\boxed{-2.5}", "-5/2", r"-\frac{5}{2}", "\u20132.5"],
    ),
    ("-2.5", 0, ["2.5", "5 -2.5", "-25", "+2.5"]),
    (["7", "8"], 1, ["7", "8"]),
    (["7", "8"], 0, ["9", "7 or 8"]),
]


@pytest.mark.parametrize(("truth", "amount"), TRUTHS)
def test_a_truth_is_read_as_a_whole(truth, amount):
    assert one("numeric", repr(amount), truth) == 1
    assert one("numeric", repr(amount + 1), truth) == 0


@pytest.mark.parametrize("truth", NOT_NUMBERS)
def test_a_truth_that_is_no_number_is_one_line(truth):
    with pytest.raises(ValueError, match="holds no number: write one number") as caught:
        one("numeric", "7", truth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(TABLE))
def test_verdicts(truth, verdict, text):
    assert one("numeric", text, truth) == verdict


def test_tolerances():
    assert one("numeric", "so it is 3.14", "3.14") == 1 and one("numeric", "3.15", "3.14") == 0
    assert one("numeric(tolerance=0.02)", "3.15", "3.14") == 1
    assert one("numeric(relative_tolerance=0.1)", "105", 100) == 1
    assert one("numeric(relative_tolerance=0.01)", "105", 100) == 0


def test_a_value_knows_its_unit():
    length = parse_value("70 cm")
    assert (length.amount, length.dimension, length.factor) == (70, "length", 0.01)
    assert answered_value("9" * 400) is None
    assert math.isclose(answered_value("-1,234.5e-2").amount, -12.345)
