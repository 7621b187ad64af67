"""Inputs that the harness found once: each raised, hung or said too much."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mm.data.files.parquet import ParquetRows
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.earl.skill_map import FORMAT, load_skill_map
from megatron_mm.errors import DataError, OneLine, RLError
from tests.hostile import rows

HEAD = {"format": FORMAT, "num_layers": 2, "num_experts": 4, "moe_router_topk": 2}
MAPS = {
    "a size of a line break": {"num_experts": "\n"},
    "a size of a truth": {"moe_router_topk": True},
    "an expert of 5,000 letters": {"skills": {"ocr": [["a" * 5000], [0]]}},
    "an expert in 300 lists": {"skills": {"ocr": [json.loads("[" * 300 + "]" * 300), [0]]}},
    "a skill of 5,000 letters": {"skills": {"a" * 5000: [[9], [0]]}},
    "info of a list": {"info": [1]},
}


@pytest.mark.parametrize("kind", MAPS)
def test_skill_maps(kind, tmp_path):
    held = HEAD | {"skills": {"ocr": [[1], [0]]}} | MAPS[kind]
    (tmp_path / "map.json").write_text(json.dumps(held))
    with pytest.raises(RLError) as caught:
        load_skill_map(tmp_path / "map.json", 2, 4, 2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2100


def test_a_skill_map_in_lists_without_an_end(tmp_path):
    (tmp_path / "map.json").write_text("[" * 100_000)
    with pytest.raises(RLError, match="not JSON"):
        load_skill_map(tmp_path / "map.json", 2, 4, 2)


ASK, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}
DEEP = "[" * 5000
CALL = {"type": "function", "function": {"name": "f", "arguments": DEEP}}
ROWS = {
    "tools in lists without an end": {"messages": [ASK, ANSWER], "tools": DEEP},
    "arguments in lists": {"messages": [ASK, ANSWER | {"tool_calls": [CALL]}]},
    "calls in lists": {"messages": [ASK, ANSWER | {"tool_calls": DEEP}]},
    "a truth of 400 digits": {"messages": [ASK, ANSWER], "ground_truth": 10**400},
    "a reward model in lists": {"prompt": [ASK], "response": "3", "reward_model": DEEP},
    "an image of 5,000 letters": {"messages": [ASK, ANSWER], "images": ["a" * 5000]},
    "an image in folders": {"messages": [ASK, ANSWER], "images": ["a/" * 5000 + "b"]},
    "an image of NUL": {"messages": [ASK, ANSWER], "images": ["a\0b"]},
    "an image of half a pair": {"messages": [ASK, ANSWER], "images": ["a\ud800b"]},
    "a role of 5,000 letters": {"messages": [ASK | {"role": "a\n" * 5000}, ANSWER]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows(kind, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[kind]))
    with pytest.raises(DataError, match=r"rows.jsonl:1: ") as caught:
        rows.use(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2100


def test_a_parquet_file_of_damaged_counts(tmp_path):
    """Every byte of a footer that could be the count of a group's, or of the file's, rows; -1 among
    what it becomes. Each is one line, or the two rows that are there."""
    path = tmp_path / "rows.parquet"
    texts = [json.dumps(dict(messages=[ASK, ANSWER]))] * 2
    pq.write_table(pa.table({"messages": texts}), path)
    whole = path.read_bytes()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(begin, len(whole) - 8):
        if whole[place] != 4:  # 2 in the footer's zigzag
            continue
        for count in (1, 3, 0, 2, 126):  # -1, -2, 0, 1, 63
            path.write_bytes(whole[:place] + bytes([count]) + whole[place + 1 :])
            try:
                assert len(ParquetRows(path, RowGroupCache(0))) == 2
            except DataError as error:
                refused += "is damaged, write it again" in str(error)
                assert "\n" not in str(error)
    assert refused >= 8


def test_a_parquet_file_whose_columns_are_no_unicode(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": ["[]"], "columnname": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"columnname", b"column\x80ame"))
    with pytest.raises(DataError, match="rows.parquet: cannot be read as parquet"):
        rows.use(path)


def test_a_long_message_keeps_both_ends():
    error = DataError(f"rows:1: {'a' * 9000}\nb; change it")
    assert str(error).startswith("rows:1: aaa") and str(error).endswith("\\nb; change it")
    assert len(str(error)) < 2100 and isinstance(error, OneLine) and isinstance(error, ValueError)
