"""The rewards that read boxes and JSON, against a person's verdicts."""

import pytest

from megatron_mm.rl.rewards.structured import boxes_in, iou
from support.rewards import cases, one

SQUARE = [10, 10, 30, 30]
BOXES = [
    (SQUARE, 1, ["[10, 10, 30, 30]", "[10,10,30,30]", "(10, 10, 30, 30)", "[10 10 30 30]"]),
    (
        SQUARE,
        1,
        ["[30, 30, 10, 10]", "[10, 30, 30, 10]", "[10.0, 10.0, 30.0, 30.0]", "[[10,10,30,30]]"],
    ),
    (
        SQUARE,
        1,
        ["(10,10),(30,30)", "[(10, 10), (30, 30)]", "[[10, 10], [30, 30]]", "[1e1,1e1,3e1,3e1]"],
    ),
    (SQUARE, 1, ["<box>[[10, 10, 30, 30]]</box>", '{"bbox_2d": [10, 10, 30, 30], "label": "cat"}']),
    (SQUARE, 1, ["The cat is at [10, 10, 30, 30].", "<answer>[10, 10, 30, 30]</answer>"]),
    (SQUARE, 1, ["<think>[0, 0, 1, 1]?</think>[10, 10, 30, 30]", r"\boxed{[10, 10, 30, 30]}"]),
    (
        SQUARE,
        1,
        [
            "[0, 0, 1, 1], no <answer>[10, 10, 30, 30]</answer>",
            "<ref>cat</ref><box>[[10,10,30,30]]</box>",
        ],
    ),
    (SQUARE, 0, ["", "nowhere", "10, 10, 30, 30", "[10, 10, 30]", "[10, 10, 30, 30, 50]", "[]"]),
    (SQUARE, 0, ["[40, 40, 50, 50]", "[30, 30, 50, 50]", "[a, b, c, d]", "[10, 10, 30, thirty]"]),
    (
        SQUARE,
        0,
        [
            "[0.1, 0.1, 0.3, 0.3]",
            "[10, 10, 10, 10]",
            "[-10, -10, -30, -30]",
            "<answer></answer>[10,10,30,30]",
        ],
    ),
    (
        SQUARE,
        0,
        [
            "<think>[10, 10, 30, 30]",
            "<think>[10, 10, 30, 30]</think>none",
            "[" + "9" * 400 + ",1,2,3]",
        ],
    ),
    (SQUARE, 0.5, ["[10, 10, 20, 30]", "[10, 10, 30, 20]", "[10, 10, 30, 30] [50, 50, 60, 60]"]),
    (SQUARE, 0.5, ["[10, 10, 30, 30] or [10, 10, 30, 30]"]),
    (
        SQUARE,
        0.25,
        ["[10, 10, 20, 20]", "[20, 20, 30, 30]", "[10, 10, 50, 50]", "[15, 15, 25, 25]"],
    ),
    (SQUARE, 1 / 3, ["[20, 10, 40, 30]", "[10, 20, 30, 40]"]),
    (SQUARE, 1 / 7, ["[20, 20, 40, 40]", "[0, 0, 20, 20]"]),
    (SQUARE, 1 / 4, ["[10,10,30,30]" + " [50,50,60,60]" * 3]),
    ([-2, -2, 2, 2], 1, ["[-2, -2, 2, 2]", "[\u22122, \u22122, 2, 2]"]),
    ("[10, 10, 30, 30]", 1, ["[10, 10, 30, 30]"]),
    ([[0, 0, 2, 2], [10, 10, 12, 12]], 1, ["[10, 10, 12, 12], [0, 0, 2, 2]"]),
    (
        [[0, 0, 2, 2], [10, 10, 12, 12]],
        0.5,
        ["[10, 10, 12, 12]", "[10, 10, 12, 12], [50, 50, 60, 60]"],
    ),
    ([[0, 0, 2, 2], [10, 10, 12, 12]], 2 / 3, ["[0, 0, 2, 2] [0, 0, 2, 2] [10, 10, 12, 12]"]),
]
TRUTH = {"a": 1, "b": [1, 2]}
JSON = [
    (
        TRUTH,
        1,
        [
            '{"a": 1, "b": [1, 2]}',
            '{"b":[1,2],"a":1}',
            '{"a": 1.0, "b": [1, 2e0]}',
            ' {"a":1,"b":[1,2]}\n',
        ],
    ),
    (
        TRUTH,
        1,
        [
            'Here:\n```json\n{"a": 1, "b": [1, 2]}\n```',
            '```\n{"a": 1, "b": [1, 2]}\n```\nDone [1].',
        ],
    ),
    (
        TRUTH,
        1,
        [
            'It is {"a": 1, "b": [1, 2]}.',
            '[1] says: {"a": 1, "b": [1, 2]}',
            'x [see {"a": 1, "b": [1, 2]}',
        ],
    ),
    (
        TRUTH,
        1,
        ['<answer>{"a": 1, "b": [1, 2]}</answer>', '<think>{"a": 2}</think>{"a": 1, "b": [1, 2]}'],
    ),
    (TRUTH, 1, ['{"a": 2} no: {"a": 1, "b": [1, 2]}', '{"\\u0061": 1, "b": [1, 2]}']),
    (
        TRUTH,
        2 / 3,
        ['{"a": 1, "b": [1, 3]}', '{"a": 2, "b": [1, 2]}', '{"a": 1, "b": [1]}', '{"b": [1, 2]}'],
    ),
    (
        TRUTH,
        2 / 3,
        ['{"a": "1", "b": [1, 2]}', '{"a": true, "b": [1, 2]}', '{"a": null, "b": [1, 2]}'],
    ),
    (TRUTH, 3 / 4, ['{"a": 1, "b": [1, 2, 3]}', '{"a": 1, "b": [1, 2], "c": 3}']),
    (TRUTH, 1 / 3, ['{"a": 1}', '{"a": 1, "b": [2, 1]}']),
    (TRUTH, 1 / 4, ['{"a": 1, "b": 1}', '{"a": 1, "b": {}}']),
    (
        TRUTH,
        0,
        [
            "",
            "no",
            "{}",
            "[]",
            "1",
            "null",
            "{'a': 1, 'b': [1, 2]}",
            '{"a": 1, "b": [1, 2]',
            '{"A": 1}',
        ],
    ),
    (
        TRUTH,
        0,
        [
            '{"a": 1, "a": 1, "b": [1, 2]}',
            '{"a": 1, "b": [1, 2], "a": 2}',
            '{"a": NaN, "b": Infinity}',
        ],
    ),
    (
        TRUTH,
        0,
        ['[{"a": 1, "b": [1, 2]}]', '{"x": {"a": 1, "b": [1, 2]}}', '"{\\"a\\": 1}"', "[1, 2]"],
    ),
    (
        TRUTH,
        0,
        [
            "a: 1\nb: [1, 2]",
            '{"a": 1, "b": [1, 2],}',
            "{a: 1, b: [1, 2]}",
            "[" * 100_000,
            "{" * 100_000,
        ],
    ),
    (
        TRUTH,
        0,
        [
            '<think>{"a": 1, "b": [1, 2]}',
            '<answer></answer>{"a": 1, "b": [1, 2]}',
            '{"a":' * 20_000,
        ],
    ),
    ({}, 1, ["{}", "It is {}"]),
    ({}, 0, ["[]", '{"a": 1}', ""]),
    ('{"b": [1, 2], "a": 1.0}', 1, ['{"a": 1, "b": [1, 2]}']),
    ("[1, 2]", 1, ["[1, 2]", "It is [1, 2]"]),
    ("7", 1, ["7"]),
    ({"name": "caf\u00e9"}, 1, ['{"name": "cafe\u0301"}']),
    ({"name": "cafe"}, 0, ['{"name": "Cafe"}', '{"name": "cafe "}', '{"name": ["cafe"]}']),
]


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(BOXES))
def test_box_iou(truth, verdict, text):
    assert one("box_iou", text, truth) == pytest.approx(verdict)


def test_box_iou_has_a_threshold():
    assert one("box_iou(threshold=0.2)", "[10, 10, 20, 20]", SQUARE) == 1
    assert one("box_iou(threshold=0.3)", "[10, 10, 20, 20]", SQUARE) == 0


@pytest.mark.parametrize(
    "truth", ["left", [], [1, 2, 3], [1, 2, 1, 8], {"x": 1}, True, "[0, 0, 0, 0]"]
)
def test_a_truth_without_a_box_is_one_line(truth):
    for text in ("[0, 0, 1, 1]", ""):
        with pytest.raises(ValueError, match="holds (no box|a box without area)"):
            one("box_iou", text, truth)


def test_boxes():
    assert boxes_in("at [1, 2, 3.5, 4] and (5,6),(7,8)") == [(1, 2, 3.5, 4), (5, 6, 7, 8)]
    assert boxes_in("[[3, 4, 1, 2], [5 6 7 8]]") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert boxes_in("[1, 2, 3] and [1, 2, 3, 4, 5]") == []
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize(("truth", "verdict", "text"), cases(JSON))
def test_json_match(truth, verdict, text):
    assert one("json_match", text, truth) == pytest.approx(verdict)


@pytest.mark.parametrize("truth", ["abc", "", "{'a': 1}", '{"a": 1, "a": 2}', "NaN"])
def test_a_truth_that_is_no_json_is_one_line(truth):
    for text in ('{"a": 1}', ""):
        with pytest.raises(ValueError, match="is no JSON: ") as caught:
            one("json_match", text, truth)
        assert "\n" not in str(caught.value)
