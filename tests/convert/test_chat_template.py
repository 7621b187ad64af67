"""The template of an export writes, by transformers' own rendering and tokenizing, the token ids
that training makes of the same conversation."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megatron_mm.convert.export_inputs import REMOTE, TEMPLATE
from megatron_mm.data.chat import encode_prompt, encode_row
from megatron_mm.data.tokenizer import load_tokenizer
from support.exports import grounding_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds <b>\u00e9</b> & more",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"q": "\u00e9"}},
}
TEXT_CALL = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
BARE_CALL = {"name": "add", "arguments": {"b": [1, None, True]}}


def user(content) -> dict:
    return {"role": "user", "content": content}


def said(content, role="assistant", **more) -> dict:
    return {"role": role, "content": content, **more}


CHATS = {
    "text": [user("what stands in cell 3?")],
    "a system turn": [said("Be brief.", "system"), user("why?")],
    "line breaks before a text": [said("\n\nBe brief.", "system"), user("\nwhat\n\n")],
    "spaces before a line break": [user("  \n  what")],
    "carriage returns": [user("\r\nwhat\r\n\r\n?")],
    "an answer behind line breaks": [user("a"), said("\n\n 7 8"), user("b")],
    "an answer behind spaces": [user("a"), said("  7"), user("b")],
    "an answer behind tabs and breaks": [user("a"), said(" \n\t7\n\n"), user("b")],
    "reasoning": [user("a"), said("\n\n7", reasoning_content="\n3 and 4\n"), user("b")],
    "reasoning, then a call": [
        user("a"),
        said("", reasoning_content="hm", tool_calls=[CALL, BARE_CALL]),
        said("x", "tool"),
        said("\n\nso", reasoning_content="hm", tool_calls=[CALL]),
        said("y", "tool"),
        user("b"),
    ],
    "reasoning alone": [user("a"), said("", reasoning_content="hm"), user("b")],
    "a call": [user("a"), said("", tool_calls=[CALL]), said("x", "tool"), user("b")],
    "calls behind text": [
        user("a"),
        said("so\n", tool_calls=[CALL, TEXT_CALL, BARE_CALL]),
        said("x", "tool", tool_call_id="c1", name="look_up"),
        said("\ny\n", "tool", tool_call_id="c2"),
        said("done"),
        said("z", "tool"),
        user("b"),
    ],
    "calls behind reasoning": [
        user("a"),
        said("t", reasoning_content="r", tool_calls=[CALL]),
        said("x", "tool"),
        said("y"),
        user("b"),
    ],
    "vocabulary": [user("where is <ref>the 7</ref>?"), said("<box>[[1, 2]]</box>"), user("so?")],
    "an escaped mark": [user("what is \\<image>, \\\\<image> and \\<image>?")],
    "parts": [user([{"type": "text", "text": "\nwhat "}, {"type": "text", "text": "<image>?"}])],
    "jinja and html": [user("{{ 1 }} {% if %} <b>&amp;</b> \\n \"'")],
    "unicode": [user("\u00e9 \u6f22\u5b57 \U0001f642 \u00a0\u2028x")],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our tokenizer and transformers', of one folder that has the export's template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    grounding_tokenizer().save_pretrained(folder)
    (folder / TEMPLATE).write_bytes((REMOTE / TEMPLATE).read_bytes())
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_line_breaks_are_one_token(both):
    """Else the cases below would not see where texts are joined."""
    ours, _ = both
    assert len(ours.encode("\n\n")) == 1 and len(ours.encode("user\n\n")) < 4


@pytest.mark.parametrize("tools", [[], [TOOL], [TOOL, {"name": "add"}]], ids=["-", "tool", "tools"])
@pytest.mark.parametrize("name", CHATS)
def test_prompts(both, name, tools):
    ours, theirs = both
    row = {"messages": CHATS[name], "tools": tools or None}
    expected = theirs.apply_chat_template(
        CHATS[name], tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(row, "row", ours, [], 9999).tokens == expected
    # Tools and calls may be JSON text, as parquet holds them.
    held = row | {"tools": json.dumps(tools)} if tools else row
    assert encode_prompt(held, "row", ours, [], 9999).tokens == expected


@pytest.mark.parametrize("name", CHATS)
def test_whole_conversations(both, name):
    ours, theirs = both
    messages = [*CHATS[name], said("7")]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert encode_row({"messages": messages}, "row", ours, [], 9999).tokens == expected


def test_images(both):
    """Marks and parts both write the image's token, which a processor multiplies."""
    ours, theirs = both
    marked = [user("first <image>, then<image>"), said("no"), user("why?")]
    parts = [{"type": "text", "text": "first "}, {"type": "image"}]
    parts += [{"type": "text", "text": ", then"}, {"type": "image"}]
    mine = encode_prompt({"messages": marked}, "row", ours, [1, 1], 999)
    again = encode_prompt({"messages": [user(parts), *marked[1:]]}, "row", ours, [1, 1], 999)
    assert mine == again and mine.image_starts == [
        n for n, t in enumerate(mine.tokens) if t == ours.image_context_id
    ]
    brackets = (ours.image_start_id, ours.image_end_id)
    for messages in (marked, [user(parts), *marked[1:]]):
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == [t for t in mine.tokens if t not in brackets]
