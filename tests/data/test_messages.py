"""Every key of a row and of a message is used, or rejected in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mm.data.chat import encode_row
from megatron_mm.data.files.forms import normalise_row
from megatron_mm.data.files.keys import check_keys
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.messages import check_messages
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.errors import DataError
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.evaluation.scoring import score

ASK = {"role": "user", "content": "q"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}


def answer(**more) -> dict:
    return {"role": "assistant", "content": "yes", **more}


def learnt(tokenizer, *messages) -> str:
    encoded = encode_row({"messages": [*messages]}, "r:1", tokenizer, [], 999)
    pairs = zip(encoded.tokens, encoded.supervised, strict=True)
    return tokenizer.decode([token for token, on in pairs if on])


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"weight": 1, "loss": False}]
)
def test_a_turn_without_weight_is_read_and_not_learnt(tokenizer, off):
    first, second = answer() | off, answer(content="no")
    assert learnt(tokenizer, ASK, first, ASK, second) == "no<|im_end|>"
    on = {"weight": 1} if "weight" in off else {"loss": True}
    assert learnt(tokenizer, ASK, answer(**on), ASK, second) == "yes<|im_end|>no<|im_end|>"
    whole = encode_row({"messages": [ASK, first, ASK, second]}, "r:1", tokenizer, [], 999)
    plain = encode_row({"messages": [ASK, answer(), ASK, second]}, "r:1", tokenizer, [], 999)
    assert whole.tokens == plain.tokens


def test_reasoning_and_calls_are_learnt_before_the_end(tokenizer):
    message = answer(reasoning_content="because", tool_calls=[CALL])
    assert learnt(tokenizer, ASK, message) == (
        "<think>\nbecause\n</think>\n\nyes\n"
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    )


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (answer(reasoning="r"), "key 'reasoning', which nothing here uses; .*'reasoning_content'"),
        (answer(thinking="r"), "key 'thinking'.*'reasoning_content'"),
        (answer(function_call={}), "key 'function_call'.*'tool_calls'"),
        (answer(loss_scale=0.5), "key 'loss_scale'.*'weight'"),
        (answer(name="bot"), "key 'name'.* a message of the role assistant may have role, content"),
        (answer(images=["x"]), "key 'images'.*the row's key 'images'"),
        (answer(weight=0.5), "has weight 0.5; allowed: 0 and 1"),
        (answer(loss="no"), "has loss 'no'; allowed: true and false"),
        (answer(reasoning_content=3), "'reasoning_content' is a int"),
        (answer(tool_calls={"name": "f"}), "'tool_calls' is a dict"),
        (answer(tool_calls="[{"), "'tool_calls' is not JSON"),
        (answer(tool_calls=[{"function": {"name": "f"}, "extra": 1}]), "tool call 1 must be"),
        (answer(tool_calls=[{"type": "code", "function": {"name": "f"}}]), "of type 'code'"),
        (answer(tool_calls=[{"name": "f", "arguments": 3}]), "'arguments' is a int"),
        (answer(tool_calls=[{"name": "f", "arguments": "[1]"}]), "'arguments' is a list"),
        (answer(tool_calls=[{"name": "f", "arguments": ""}]), "'arguments' is not JSON"),
        (answer(tool_calls=[{"name": "f", "arguments": '{"a": 1}}, {'}]), "is not JSON"),
        (answer(tool_calls=[{"id": [1], "function": {"name": "f"}}]), "'id' is a list"),
        ({"role": "tool", "content": "x", "tool_call_id": [1]}, "'tool_call_id' is a list"),
        (ASK | {"weight": 0}, "key 'weight'"),
        (ASK | {"loss": True}, "has the role user and loss true; only answers are learnt"),
        (ASK | {"image": "x.png"}, "key 'image'.*the row's key 'images'"),
        (ASK | {"content": [{"type": "video"}]}, "part 1 of its content is none of"),
        (ASK | {"content": [{"type": "text", "text": "a", "weight": 0}]}, "part 1 of its content"),
        (ASK | {"content": [{"type": "image", "image": "x.png"}]}, "part 1 names its image"),
        (answer(content=[{"type": "image"}]), "part 1 of its content is none of"),
        (
            ASK | {"content": [{"type": "image"}, {"type": "text", "text": "<image>\nWhat?"}]},
            "part 2 holds <image> beside 1 parts of the type image; drop the mark",
        ),
        ({"role": "system", "content": "<image>"}, "the system turn holds <image>"),
        ({"role": "tool", "content": "<image>"}, "the tool turn holds <image>"),
        ({"role": "tool", "content": "x", "tool_call_id": "c9"}, "answers the tool call 'c9'"),
        (
            {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "g"},
            "of the tool 'g', its call 'c1' of 'f'",
        ),
    ],
)
def test_what_nothing_uses_is_rejected(message, what):
    messages = [ASK, answer(tool_calls=[CALL]), message]
    with pytest.raises(DataError, match=f"^f:3: message 3 of 3.*{what}") as caught:
        check_messages({"messages": messages}, "f:3")
    assert "\n" not in str(caught.value)


def test_a_key_without_a_value_is_not_there(tokenizer):
    """In parquet every message has the keys of all."""
    nothing = dict.fromkeys(("weight", "loss", "tool_calls", "reasoning_content", "other"))
    messages = [{**nothing, **ASK}, {**nothing, **answer()}]
    assert check_messages({"messages": messages}, "f:3") == check_messages(
        {"messages": [ASK, answer()]}, "f:3"
    )


def test_a_row_that_teaches_nothing_is_rejected(tokenizer):
    with pytest.raises(DataError, match="0 of 1 assistant turns are learnt; set the weight or"):
        learnt(tokenizer, ASK, answer(weight=0))


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        ({"id": 3, "source": "x"}, {}, r"2 of the row's 3 keys \('id', 'source'\); remove them"),
        ({"imagse": ["x"]}, {}, "did you mean 'images'"),
        ({"videos": ["v.mp4"]}, {"columns": True}, "'videos'"),
        ({"Images": ["x"]}, {"columns": True}, "did you mean 'images'"),
        ({"tool": [{}]}, {"columns": True}, "did you mean 'tools'"),
        ({"prompt": "x"}, {"columns": True}, "'prompt'"),
        ({"weight": 0}, {"columns": True}, "'weight'"),
        ({"rejected": "no"}, {"columns": True}, "'rejected'"),
        ({"system": "Be brief"}, {"columns": True}, "'system'"),
        ({"ability": "math"}, {}, "'ability'"),
        ({"scene": "1", "id": 1}, {"extra": ["scene"]}, r"\('id'\)"),
    ],
)
def test_keys_that_nothing_uses(row, options, what):
    with pytest.raises(DataError, match=f"^f:3: nothing uses .*{what}") as caught:
        check_keys({"messages": []} | row, "f:3", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"tools": [], "images": [], "skill": "a", "spans": [], "ground_truth": "1"}, {}),
        ({"id": None, "videos": None, "audios": []}, {}),
        ({"id": 1}, {"extra": ["id"]}),
        ({"id": 1, "videos": []}, {"extra": ["*"]}),
        ({"solution": "1", "level": 3}, {"columns": True}),
        ({"others": []}, {"more": ["others"]}),
        ({"data_source": "a", "ability": "b", "extra_info": {}, "reward_model": {}}, {}),
    ],
)
def test_keys_that_are_used(row, options):
    check_keys({"messages": []} | row, "f:3", **options)


def test_a_run_checks_its_rows(run, tokenizer, write_rows, make_row):
    path = write_rows(make_row(), make_row(id=3))
    rows, _ = open_row_files(path, RowGroupCache()).locate(0)
    builder = SampleBuilder(run, tokenizer)
    builder.training(rows[0], rows.where(0), rows.folder)
    for build in (builder.training, builder.prompt, builder.measure):
        with pytest.raises(DataError, match="rows.jsonl:2: nothing uses 1 of the row's 3 keys"):
            build(rows[1], rows.where(1), rows.folder)
    run.training.objective = "grpo"  # a reward may read it
    SampleBuilder(run, tokenizer).prompt(rows[1], rows.where(1), rows.folder)


def test_one_image_is_an_image():
    assert normalise_row({"messages": [], "image": "x.png"}, "f:1")["images"] == ["x.png"]
    assert normalise_row({"messages": [], "image": b"1"}, "f:1")["images"] == [b"1"]
    with pytest.raises(DataError, match="f:1: 1 'images' and an 'image'; list all"):
        normalise_row({"messages": [], "image": "x", "images": ["y"]}, "f:1")
    with pytest.raises(DataError, match="f:1: 1 'images' and an 'image'; list all"):
        normalise_row({"messages": [], "image": "x", "images": 3}, "f:1")
    struct = {"path": "x.png", "bytes": None, "resized_height": None}
    assert normalise_row({"messages": [], "images": [struct]}, "f:1")["images"] == ["x.png"]
    with pytest.raises(
        DataError, match="f:1: image 1 is of type dict with the keys path, .*height"
    ):
        normalise_row({"messages": [], "images": [struct | {"resized_height": 100}]}, "f:1")
    boxed = normalise_row({"messages": [], "image": struct | {"box": [0, 0, 1, 0.5]}}, "f:1")
    assert boxed["images"] == [{"path": "x.png", "box": [0.0, 0.0, 1.0, 0.5]}]
    assert normalise_row(boxed, "f:1") == boxed


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"ground_truth": 7}, "7"),
        ({"ground_truth": 7.0}, "7"),  # a column of integers with gaps
        ({"ground_truth": 0.5}, "0.5"),
        ({"ground_truth": True}, True),
        ({"ground_truth": ["7", "seven"]}, ["7", "seven"]),
        ({"reward_model": {"ground_truth": 7}}, "7"),
        ({"reward_model": '{"ground_truth": 7}'}, "7"),
        ({"reward_model": {"style": "rule"}}, None),
        ({"ground_truth": "7", "reward_model": {"ground_truth": 7}}, "7"),
    ],
)
@pytest.mark.parametrize("conversation", ["messages", "prompt"])
def test_truths_of_every_form(row, truth, conversation):
    assert normalise_row({conversation: [ASK]} | row, "f:1").get("ground_truth") == truth


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"ground_truth": "8", "reward_model": {"ground_truth": 7}}, "is '8', reward_model.*'7'"),
        ({"ground_truth": float("nan")}, "ground_truth is nan"),
        ({"reward_model": "{"}, "'reward_model' is not JSON"),
    ],
)
def test_truths_that_are_none(row, what):
    with pytest.raises(DataError, match=f"^f:1: .*{what}"):
        normalise_row({"messages": [ASK]} | row, "f:1")


def test_parquet_pads_objects_and_trains_on_none_of_it(tmp_path, tokenizer):
    """An object of a column has the keys of all others of it, null where it had none."""
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}, {"name": "g"}]
    rows = [
        {
            "messages": [ASK, answer(tool_calls=[call])],
            "tools": [{"name": "f", "parameters": {key: {"type": "integer"}}}],
            "spans": [{"text": "yes", "skill": "a"} | ({"value": "yes"} if n else {})],
            "looks": [{"box": [0, 0, 1, 1]} | ({"image": 0} if n else {})],
            "ground_truth": {"name": "x"} | ({"age": 3} if n else {}),
        }
        for n, (call, key) in enumerate(zip(calls, "ab", strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = {}
    for kind in ("jsonl", "parquet"):
        held, _ = open_row_files(tmp_path / f"rows.{kind}", RowGroupCache()).locate(0)
        read[kind] = [held[n] for n in range(2)]
    for one, other in zip(read["jsonl"], read["parquet"], strict=True):
        for key in ("spans", "tools", "looks", "ground_truth"):
            assert other[key] == one[key]
        encoded = [encode_row(row, "r:1", tokenizer, [], 999) for row in (one, other)]
        assert encoded[0] == encoded[1]


def test_a_parquet_column_that_is_there_twice(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array([[ASK]]), pa.array([["x"]]), pa.array([["y"]])], ["messages", "images", "images"]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: the column 'images' is there twice"):
        open_row_files(tmp_path / "rows.parquet", RowGroupCache())


@pytest.mark.parametrize(
    ("last", "truth"),
    [
        (answer(reasoning_content="because"), "yes"),
        (
            answer(content="", tool_calls=[CALL]),
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        ),
    ],
)
def test_a_question_is_compared_with_what_was_learnt(run, tokenizer, write_rows, last, truth):
    item = EvalSet(write_rows({"messages": [ASK, last]}), run, tokenizer)[0]
    assert item.ground_truth == truth
    whole = learnt(tokenizer, ASK, last).removesuffix("<|im_end|>")
    assert score("exact", whole, truth) == score("exact", truth, truth) == 1
    assert score("exact", "", truth) == score("exact", "<think>\nyes", truth) == 0


def test_a_question_without_an_answer_is_rejected(run, tokenizer, write_rows):
    thought = answer(content="", reasoning_content="because")
    with pytest.raises(DataError, match="rows.jsonl:1: no answer to compare with"):
        EvalSet(write_rows({"messages": [ASK, thought]}), run, tokenizer)[0]


def test_a_key_that_is_given_twice(tmp_path: Path):
    """JSON would keep the last: images or messages vanish."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"messages": [ASK], "images": ["x.png"]})
    path.write_text(row[:-1] + ', "images": []}\n')
    rows, _ = open_row_files(path, RowGroupCache()).locate(0)
    with pytest.raises(DataError, match="rows.jsonl:1: .*'images' is given twice"):
        rows[0]
