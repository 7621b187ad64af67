"""TRL's two forms of a reward, and results that are no rewards."""

import pytest

from megatron_mm.rl.rewards.forms import Reading, Text
from megatron_mm.rl.rewards.runner import RewardRunner
from support.rewards import one

ASKED = [{"role": "user", "content": "quest"}]


def scored(spec, completions, batch_size=1, **columns):
    with RewardRunner([f"support.misbehaving.{spec}"], 1, batch_size=batch_size) as runner:
        prompts = [ASKED] * len(completions)
        return runner.score(prompts, completions, [[1]] * len(completions), columns)


@pytest.mark.parametrize(
    "name", ["conversational", "by_get", "careful", "patient_messages", "both_forms"]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_reward_of_either_form_gets_what_it_reads(name, batch_size):
    found = scored(name, ["abc", "", "a", ""], batch_size)
    assert [row[0] for row in found.values] == [3, 0, 1, 0] and not found.failures
    calls = [value for metric, value in found.logged if metric == "mine/calls"]
    assert calls == ([1] * 4 if name == "by_get" else [])  # the first attempt logs nothing


@pytest.mark.parametrize("name", ["conversational", "by_get", "patient_messages"])
def test_an_empty_completion_comes_first(name):
    found = scored(name, ["", "ab"])
    assert [row[0] for row in found.values] == [0, 2] and not found.failures


def test_messages_have_their_roles():
    assert scored("messages_of", ["a", "b"]).values == [[1.0], [1.0]]


def test_a_reward_of_the_text_form_gets_texts():
    found = scored("plain_texts", ["ion", "IO", "ion"])
    assert found.values == [[1.0], [0.0], [1.0]] and not found.failures


def test_prompts_may_be_read_as_messages_beside_texts():
    assert scored("of_prompts", ["ion", "or"]).values == [[1.0], [0.0]]


def test_indexing_what_a_text_holds_is_no_such_reading():
    found = scored("of_json", ['{"answer": 2}', '"7"', '{"answer": 3}'])
    assert [row[0] for row in found.failed] == [False, True, False]
    assert found.values[2] == [3.0]
    assert found.failures[0].reason.startswith("TypeError: string indices must be integers")


@pytest.mark.parametrize("name", ["exact", "multiple_choice", "numeric", "math", "anls", "scorer"])
def test_built_in_rewards_read_conversations(name):
    completion = [{"role": "assistant", "content": "B" if name == "multiple_choice" else "7"}]
    truth = "B" if name == "multiple_choice" else "7"
    assert one(name, completion, truth, scorer="exact") == 1
    assert one(name, completion, "C" if truth == "B" else "8", scorer="exact") == 0


def test_a_text_that_notes_its_reading_is_a_text():
    reading = Reading()
    text = Text.of("ab\u00e9", reading)
    assert text == "ab\u00e9" and list(text) == ["a", "b", "\u00e9"] and text[1:] == "b\u00e9"
    assert "".join(text) == "ab\u00e9" and text[-1] == "\u00e9" and hash(text) == hash("ab\u00e9")
    assert not hasattr(text, "tolist") and isinstance(text, str)
    assert not reading.as_messages
    for read in (lambda: text["content"], lambda: text[0]["content"], lambda: text.get("role")):
        reading.as_messages = False
        with pytest.raises((TypeError, AttributeError)):
            read()
        assert reading.as_messages


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("dict", "returned a dict, not a list of rewards"),
        ("set", "returned a set, not a list of rewards"),
        ("text", "returned a str, not a list of rewards"),
        ("texts", "returned a str, not a number"),
        ("huge", "returned 1e+300"),
        ("integer", "returned inf"),
        ("nested", "returned a list, not a number"),
        ("number", "TypeError: 'float' object is not iterable"),
    ],
)
def test_what_only_looks_like_rewards_is_a_failure(shape, reason):
    found = scored("shaped", ["a"], shape=[shape])
    assert [f.reason for f in found.failures] == [reason] and found.failed == [[True]]


def test_a_generator_is_a_list_of_rewards():
    assert scored("shaped", ["a", "b"], 2, shape=["generator"] * 2).values == [[1.0], [1.0]]


def test_verls_dict_needs_a_score():
    found = scored("no_score", ["a"], data_source=["d"], ground_truth=["7"])
    assert found.failures[0].reason == "RLError: returned a dict without 'score'; it has acc"


def test_a_coroutine_may_fail():
    assert scored("late_error", ["a"]).failures[0].reason == "RuntimeError: the judge is down"
