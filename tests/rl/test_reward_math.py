"""The reward `math` against a person's verdicts."""

import pytest

from megatron_mm.errors import RLError
from support.rewards import cases, one

TABLE = [
    ("7", 1, ["Answer: There are 7 apples.", "The answer is the sum of 3 and 4, which is 7."]),
    ("7", 1, ["The answer is 7, because there are actually 2 dogs.", "Adding them gives\n7"]),
    ("7", 0, ["The answer is x + 7", "Answer: it is 5 or 7", "The answer is anything but 7"]),
    ("7", 1, ["The answer is actually 7", "The answer is 8. Actually, it is 7."]),
    (r"24 \text{ cm}^{2}", 1, ["24 cm^2", r"\boxed{24\text{ cm}^{2}}"]),
    (
        "7",
        1,
        ["7", "$7$", r"\(7\)", r"\[x = 7\]", "**7**", "x=7", "7.0", "It is 7", "seven", "14/2"],
    ),
    ("7", 1, [r"\boxed{7}", r"\boxed{x = 7}", r"\boxed{7 = x}", r"\boxed{3+4=7}", r"\boxed{7+0}"]),
    ("7", 1, [r"\boxed{\boxed{7}}", r"\boxed{\mathbf{7}}", r"\boxed{7 \text{ cm}}", r"\boxed{7.}"]),
    ("7", 1, [r"\boxed{3}, wrong: \boxed{7}", r"The answer is \boxed{7}.", r"\boxed{7}$ cm"]),
    ("7", 1, ["<answer>7</answer>", "<answer>$7$</answer>", r"<answer>\boxed{7}</answer>"]),
    ("7", 1, [r"The answer is 7 because $3+4=7$", "The answer is $7$.", "The answer is 7!"]),
    ("7", 1, [r"Hence $x=3$ and so $y=7$.", r"<think>$8$</think>$7$", "Answer: 8. Wait, no, 7."]),
    ("7", 0, ["", "8", "-7", "no idea", "7%", "7 or 8", "not 7", "77", "7x", "7!", "x", "70"]),
    ("7", 0, [r"\boxed{8 = 7}", r"\boxed{7 = 8}", r"\boxed{7, 8}", r"\boxed{7} or \boxed{8}"]),
    (
        "7",
        0,
        [r"\boxed{}", r"\boxed{7", r"\boxed{7\%}", r"\boxed{\pm 7}", r"\boxed{1,2,3,4,5,6,7}"],
    ),
    ("7", 0, ["The answer is $7$ or $8$", "The answer is not 7", "<think>7", r"\boxed{7x}", "7^2"]),
    ("7", 0, [r"\boxed{7_8}", r"\boxed{[7, 7]}", r"\boxed{x > 7}", r"\boxed{x \neq 7}", "7 8"]),
    (
        "5",
        1,
        [r"\boxed{\sqrt{25}}", r"\boxed{x = 2+3 = 5}", r"\boxed{|{-5}|}", r"\boxed{\{5\}}", "5."],
    ),
    ("5", 1, [r"\boxed{(5)}", r"\boxed{a+b=5}", "The answer is 5 apples", r"\boxed{5\,}"]),
    (
        "5",
        0,
        [r"\boxed{x^2 = 5}", r"\boxed{2x = 5}", r"\boxed{4 < 5}", r"\boxed{f(5)}", "x = 6 = 5"],
    ),
    ("5", 0, ["The answer is $6 = 5$", r"\boxed{5 \text{ or } 6}", r"\boxed{\{5, 6\}}", "5 = 6"]),
    (
        r"2\pi",
        1,
        [r"\boxed{2 \pi \text{ cm}}", r"The final answer is $2\pi$. I hope it is correct."],
    ),
    (r"2\pi", 0, ["2", "6.28", r"\boxed{\pi}"]),
    ("[2,5)", 1, [r"\boxed{[2, 5)}"]),
    ("[2,5)", 0, [r"\boxed{(2,5)}", r"\boxed{[2,5]}"]),
    ("7%", 1, ["7%", r"7\%", "0.07", r"\boxed{7\%}", "7 percent", r"\frac{7}{100}"]),
    ("7%", 0, ["7", "0.7", r"\boxed{7}", "The answer is $7$"]),
    ("yes", 1, ["yes", "Yes.", "**Yes**", "The answer is yes", r"\boxed{\text{yes}}", "YES"]),
    ("yes", 0, ["no", "", "yes or no", "sey", "The answer is not yes", "eyes"]),
    ("no", 0, ["on", "yes", "n o", "none"]),
    ("no solution", 1, [r"\boxed{\text{no solution}}", "No solution."]),
    (
        r"\frac{1}{2}",
        1,
        [r"$\frac{2}{4}$", "0.5", "1/2", r"\boxed{\dfrac12}", "50%", "\u00bd", ".5"],
    ),
    (r"\frac{1}{2}", 0, ["2", "1", "12", "0.05", r"\boxed{\frac{1}{2}\%}", "1 2"]),
    (r"\frac{1}{3}", 1, ["0.333333", "1/3", "2/6"]),
    (r"\frac{1}{3}", 0, ["0.33", "0.3", "3"]),
    (r"\sqrt{8}", 1, [r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", r"\boxed{\sqrt{4}\sqrt{2}}"]),
    (r"\sqrt{8}", 0, ["2.8", r"\boxed{\sqrt{2}}", "8"]),
    ("$(x+1)^2$", 1, [r"\boxed{x^2+2x+1}", "The answer is $(1+x)^2$.", "x^2 + 2x + 1"]),
    ("$(x+1)^2$", 0, [r"\boxed{x^2+1}", "x", r"\boxed{(x+1)^3}"]),
    ("y = 2x+1", 1, [r"\boxed{2x+1}", r"\boxed{y=2x+1}", r"\boxed{y = 1 + 2x}"]),
    ("y = 2x+1", 0, [r"\boxed{2x}", r"\boxed{y=2x-1}", r"\boxed{y}"]),
    (r"\{1, 2\}", 1, [r"\boxed{\{2, 1\}}", r"\boxed{\{1,2\}}"]),
    (r"\{1, 2\}", 0, [r"\boxed{\{1\}}", r"\boxed{\{1,2,3\}}", r"\boxed{1}"]),
    ("1, 2", 1, [r"\boxed{1, 2}", r"\boxed{2, 1}", r"\boxed{1}, \boxed{2}"]),
    ("1, 2", 0, [r"\boxed{1}", r"\boxed{1 or 2}", r"\boxed{1,2,3}"]),
    ("(1, 2)", 1, [r"\boxed{(1,2)}", r"\boxed{\left(1, 2\right)}"]),
    ("(1, 2)", 0, [r"\boxed{(2,1)}", r"\boxed{[1,2]}", r"\boxed{[1,2)}", r"\boxed{1}"]),
    ("x > 3", 1, [r"\boxed{x>3}", r"\boxed{3<x}"]),
    ("x > 3", 0, [r"\boxed{x<3}", r"\boxed{x \geq 3}", r"\boxed{3}"]),
    (r"\pi", 1, [r"\boxed{\pi}", r"$\pi$"]),
    (r"\pi", 0, [r"\boxed{3.14}", r"\boxed{2\pi}", "p"]),
    ("1+2i", 1, [r"\boxed{2i+1}"]),
    ("10", 0, [r"\boxed{10_2}"]),
    ("7!", 1, [r"\boxed{5040}", r"\boxed{7!}"]),
    ("7!", 0, [r"\boxed{7}", "720"]),
    ("1,234", 1, [r"\boxed{1{,}234}", "1234", r"\boxed{1\,234}"]),
    ("3 x 10^2", 1, [r"\boxed{3 \times 10^{2}}", "300"]),
    ("B", 1, [r"\boxed{\text{(B)}}", r"\boxed{B}"]),
    ("B", 0, [r"\boxed{C}", r"\boxed{\text{A or B}}"]),
    (["7", "8"], 1, ["8", r"\boxed{7}"]),
    (7, 1, ["7"]),
    (7.0, 1, ["7"]),
    (True, 1, ["true", "The answer is True."]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", 1, [r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", 0, [r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"]),
]


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(TABLE))
def test_verdicts(truth, verdict, text):
    assert one("math", text, truth) == verdict


def test_an_empty_truth_does_not_apply_and_another_type_is_one_line():
    assert one("math", "4", "") is None and one("math", "4", None) is None
    with pytest.raises(
        (ValueError, RLError), match="ground_truth is a dict; give a text, a number"
    ):
        one("math", "4", {"a": 1})


def test_a_very_long_answer_is_none():
    assert one("math", r"\boxed{" + "1+" * 50_000 + "1}", "50001") == 0
    assert one("math", "1 " * 50_000 + "\n\nThe answer is 7.", "7") == 1
